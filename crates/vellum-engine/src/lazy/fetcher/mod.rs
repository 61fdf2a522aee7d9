//! The process that brings blocks of a store's lazy layers. docs/lazy.md, "Who does what".

mod ahead;
mod background;
mod cache;
mod coming;
mod healing;
mod hot;
mod layer;
mod limit;
#[cfg(test)]
mod tests;
mod worker;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde_json::Value;
use uuid::Uuid;

use super::pull_secrets::OfSnapshotter;
use super::{BACKGROUND, COMPLETE, Complete, Damaged, HEAL, STATUS, TRAFFIC, WANT, Waiting, Want};
use crate::wire::encode;
use ahead::Ahead;
use background::Background;
use cache::Cache;
use healing::{Healing, span_of};
use hot::HotPacks;
use layer::Incoming;
use limit::Limit;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::LockMode;
use vellum_export::device::ControlHandler;
use vellum_export::device::control_server::ControlServer;
use vellum_store::Store;
use worker::Worker;

/// The hidden subcommand that is the fetcher.
pub const FETCHER_COMMAND: &str = "fetcher";

/// Who may wait at once.
const CONNECTIONS: usize = 1024;
/// How often what came is made durable.
const SYNC: Duration = Duration::from_secs(5);
/// How often one who rests looks whether it is to end.
const PAUSE: Duration = Duration::from_millis(50);
/// It ends when nobody has wanted anything for so long.
const IDLE: Duration = Duration::from_secs(60);

/// Serves until nobody has wanted anything for a minute, and nothing is to be completed in the background. Returns at once where another one serves the store.
///
/// # Errors
/// Where the socket cannot be made.
pub fn serve(store: &Store) -> Result<()> {
    let path = store.runs().fetcher_lock();
    let lock = store
        .storage()
        .lock(&path, LockMode::Exclusive, false)
        .context(|| format!("cannot lock {}", path.display()))?;
    let Some(_lock) = lock else {
        return Ok(());
    };
    let fetcher = Arc::new(Fetcher::new(store.clone()));
    // Before anybody has a layer opened. Blocks come also where the bound is damaged.
    match store.cache_limit() {
        Ok(limit) => fetcher.cache.set_limit(limit.bytes),
        Err(error) => tracing::error!("nothing is evicted but for a full disk: {error}"),
    }
    let handler: Arc<dyn ControlHandler> = fetcher.clone();
    let server = ControlServer::start_for(CONNECTIONS, &store.runs().fetcher(), handler)?;
    // What a killed one, or a host that crashed, did not come to.
    if let Err(error) = fetcher.look() {
        tracing::warn!("what is to be brought although nobody waits for it: {error}");
    }
    let workers = Worker::start_all(&fetcher).context(|| "a thread of the fetcher")?;
    // A store that was removed is nobody's.
    while !fetcher.is_idle() && path.exists() {
        std::thread::sleep(SYNC);
        for (layer, open) in fetcher.synced() {
            fetcher.complete_if_all_is_here(layer, &open);
        }
        fetcher.keep_to_limits();
    }
    drop(workers);
    // From now on another one may start; who still has a connection here is answered.
    drop(server);
    while fetcher.busy.load(Ordering::Acquire) > 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    // Others wait for the lock.
    fetcher.synced();
    Ok(())
}

struct Fetcher {
    store: Store,
    layers: Mutex<HashMap<Uuid, Arc<Incoming>>>,
    limit: Arc<Limit>,
    cache: Arc<Cache>,
    ahead: Arc<Ahead>,
    /// All lazy layers were opened, so that it is known what they take.
    all_open: AtomicBool,
    /// Why it is not known how much they may take, as it was told last.
    told: Mutex<String>,
    healing: Healing,
    background: Background,
    hot: HotPacks,
    stopped: AtomicBool,
    /// Requests that are being answered.
    busy: AtomicUsize,
    last: Mutex<Instant>,
}

/// A request that is being answered.
struct Busy<'a>(&'a Fetcher);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        *self.0.last.lock() = Instant::now();
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Fetcher {
    fn new(store: Store) -> Self {
        let keychain = Arc::new(OfSnapshotter::new(&store.runs()));
        Fetcher {
            store,
            layers: Mutex::default(),
            limit: Arc::new(Limit::knowing(keychain)),
            cache: Arc::default(),
            ahead: Arc::default(),
            all_open: AtomicBool::new(false),
            told: Mutex::default(),
            healing: Healing::default(),
            background: Background::default(),
            hot: HotPacks::default(),
            stopped: AtomicBool::new(false),
            busy: AtomicUsize::new(0),
            last: Mutex::new(Instant::now()),
        }
    }

    fn begin(&self) -> Busy<'_> {
        self.busy.fetch_add(1, Ordering::AcqRel);
        Busy(self)
    }

    fn is_idle(&self) -> bool {
        self.busy.load(Ordering::Acquire) == 0
            && self.last.lock().elapsed() >= IDLE
            && !self.background.is_busy()
            && !self.hot.is_busy()
    }

    /// Looks for what is to be brought although nobody waits for it.
    fn look(&self) -> Result<()> {
        let open: Vec<(Uuid, Arc<Incoming>)> = {
            let layers = self.layers.lock();
            let open = layers.iter();
            open.map(|(layer, open)| (*layer, Arc::clone(open)))
                .collect()
        };
        for (layer, open) in open {
            if let Err(error) = open.look_again(&self.store) {
                tracing::warn!(%layer, "whether somebody wants all of it is not known: {error}");
            }
            if !open.is_evictable() {
                self.cache.release(layer);
            }
        }
        self.keep_to_limits();
        self.hot.look(self)?;
        self.background.look(self)
    }

    /// Whether its threads are to end.
    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Waits for so long, unless its threads are to end.
    fn rest(&self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end && !self.is_stopped() {
            std::thread::sleep(PAUSE.min(end.saturating_duration_since(Instant::now())));
        }
    }

    /// The layer, opened where it is not; `None` where it is whole.
    fn layer(&self, layer: Uuid) -> Result<Option<Arc<Incoming>>> {
        let mut layers = self.layers.lock();
        if let Some(open) = layers.get(&layer) {
            return Ok(Some(Arc::clone(open)));
        }
        let shared = (&self.limit, &self.cache, &self.ahead);
        let opened = Incoming::open(&self.store, layer, shared)?.map(Arc::new);
        if let Some(opened) = &opened {
            // Before anybody has it.
            if opened.is_evictable() {
                self.cache.adopt(layer, opened);
            }
            layers.insert(layer, Arc::clone(opened));
        }
        Ok(opened)
    }

    /// A layer that was opened changes no more, and is opened anew when it is wanted.
    fn forget(&self, layer: Uuid, open: &Arc<Incoming>) {
        let mut layers = self.layers.lock();
        // Before another one can be opened: what this one knows of the layer is not so any more then.
        open.retire();
        if layers
            .get(&layer)
            .is_some_and(|known| Arc::ptr_eq(known, open))
        {
            layers.remove(&layer);
            self.cache.release(layer);
        }
    }

    /// Keeps to what the store says of the space that fetched blocks may take, as far as that is known.
    fn keep_to_limits(&self) {
        let limit = self.store.cache_limit();
        let limit = limit.map(|limit| self.cache.set_limit(limit.bytes));
        let space = self.store.space();
        let short = space
            .as_ref()
            .ok()
            .and_then(Option::as_ref)
            .map_or(0, |space| {
                let wanted = space.refuse_bytes.max(space.stop_bytes);
                wanted.saturating_sub(space.available)
            });
        let wants_room = self.cache.is_bounded() || short > 0;
        let opened = match wants_room {
            true => self.open_all(),
            false => Ok(()),
        };
        self.tell(
            [limit.err(), space.err(), opened.err()]
                .into_iter()
                .flatten(),
        );
        if wants_room {
            self.cache.note_reads();
            self.cache.make_room(0);
            self.cache.evict(short);
        }
    }

    /// Opens all lazy layers, once.
    fn open_all(&self) -> Result<()> {
        if self.all_open.load(Ordering::Acquire) {
            return Ok(());
        }
        for layer in self.store.layers()? {
            // Of one that cannot be opened others tell.
            let _ = self.layer(layer);
        }
        self.all_open.store(true, Ordering::Release);
        Ok(())
    }

    /// Tells why it is not known how much may be taken, unless that was told last time.
    fn tell(&self, errors: impl Iterator<Item = Error>) {
        let errors: Vec<String> = errors.map(|error| error.to_string()).collect();
        let now = errors.join("; ");
        let mut told = self.told.lock();
        if !now.is_empty() && *told != now {
            tracing::warn!("the space that fetched blocks may take is not known: {now}");
        }
        *told = now;
    }

    /// Makes durable what came. What went wrong, and what was removed, is forgotten: it is opened anew when it is
    /// wanted. Returns the others.
    fn synced(&self) -> Vec<(Uuid, Arc<Incoming>)> {
        let mut layers: Vec<(Uuid, Arc<Incoming>)> = {
            let layers = self.layers.lock();
            let open = layers.iter();
            open.map(|(layer, open)| (*layer, Arc::clone(open)))
                .collect()
        };
        layers.retain(|(layer, open)| {
            let synced = open.sync();
            if let Err(error) = &synced
                && !open.is_retired()
            {
                tracing::error!(%layer, "what came of a lazy layer is not durable: {error}");
            }
            let stays = synced.is_ok() && open.is_there();
            if !stays {
                self.forget(*layer, open);
            }
            stays
        });
        layers
    }

    /// Tries once: it is opened anew when somebody asks for that.
    fn complete_if_all_is_here(&self, layer: Uuid, open: &Arc<Incoming>) {
        // What is whole is no cache any more.
        let stays_lazy = self.cache.is_bounded() && self.cache.holds(layer);
        if !stays_lazy
            && open.is_all_here()
            && let Err(error) = self.complete(layer, open)
        {
            tracing::error!(%layer, "a lazy layer cannot be completed: {error}");
        }
    }

    fn complete(&self, layer: Uuid, open: &Arc<Incoming>) -> Result<()> {
        let completed = open.complete(&self.store);
        self.forget(layer, open);
        completed
    }

    fn want(&self, want: &Want) -> Result<()> {
        let wanted = self.with_layer(want.layer, |open| open.want(want.windows.clone()));
        wanted.map(|_| ())
    }

    /// Does something with a layer; once more where it was opened anew meanwhile. `None` where it is whole.
    fn with_layer<T>(
        &self,
        layer: Uuid,
        work: impl Fn(&Incoming) -> Result<T>,
    ) -> Result<Option<T>> {
        while let Some(open) = self.layer(layer)? {
            match work(&open) {
                Err(_) if open.is_retired() => {}
                other => return other.map(Some),
            }
        }
        Ok(None)
    }

    fn heal(&self, damaged: &Damaged) -> Result<bool> {
        let span = span_of(damaged)?;
        match self.with_layer(damaged.layer, |open| open.heal(span))? {
            Some(healed) => Ok(healed),
            None => self.healing.heal(&self.store, damaged, &self.limit),
        }
    }

    /// Whether something is wanted more than what nobody waits for.
    fn wants_more(&self) -> bool {
        if self.hot.is_busy() {
            return true;
        }
        let layers = self.layers.lock();
        layers.values().any(|open| open.has_waiters())
    }

    fn status(&self) -> Vec<Waiting> {
        let layers = self.layers.lock();
        layers
            .iter()
            .filter_map(|(layer, open)| open.waiting(*layer))
            .collect()
    }
}

/// An answer of the fetcher's, which cannot be taken for a fetcher that does not answer.
fn own(error: Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::Io | ErrorKind::Protocol => {
            Error::new(ErrorKind::Absent, error.to_string())
        }
        _ => error,
    }
}

fn parse<T: DeserializeOwned>(verb: &str, args: Value) -> Result<T> {
    serde_json::from_value(args).map_err(|error| {
        Error::with_source(
            ErrorKind::InvalidInput,
            format!("the arguments of {verb}"),
            error,
        )
    })
}

impl ControlHandler for Fetcher {
    fn handle(&self, verb: &str, args: Value) -> Result<Value> {
        match verb {
            WANT => {
                let _busy = self.begin();
                self.want(&parse(verb, args)?).map_err(own)?;
                Ok(Value::Null)
            }
            COMPLETE => {
                let _busy = self.begin();
                let Complete { layer } = parse(verb, args)?;
                if let Some(open) = self.layer(layer).map_err(own)? {
                    self.complete(layer, &open).map_err(own)?;
                }
                Ok(Value::Null)
            }
            HEAL => {
                let _busy = self.begin();
                let damaged = parse(verb, args)?;
                Ok(Value::Bool(self.heal(&damaged).map_err(own)?))
            }
            BACKGROUND => {
                let _busy = self.begin();
                self.look().map_err(own)?;
                Ok(Value::Null)
            }
            STATUS => encode(&self.status()),
            TRAFFIC => encode(&self.limit.seen.traffic()),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                format!("the fetcher knows no command {verb:?}"),
            )),
        }
    }
}
