//! Hot packs are fetched, each by one request. docs/lazy.md, "The hot pack".

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::super::hot::Hot;
use super::super::stall::Pauses;
use super::Fetcher;
use super::coming::Coming;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_registry::artifact::{ChunkReader, HOT_HEADER_LEN, HotFrame, HotPack};
use vellum_registry::{BlobReader, Failure, Flow};

/// How often a thread looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);
/// A pack of which nothing has come for so long is dropped.
const GIVE_UP: Duration = Duration::from_secs(60);
/// What is here already is passed over by another request, where it is longer than this.
const WORTH_A_REQUEST: u64 = 1 << 20;

/// The packs that are to be fetched.
#[derive(Debug, Default)]
pub(super) struct HotPacks {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// By the layers in whose directories they are noted: those that nobody is at yet.
    queue: VecDeque<(Uuid, Hot)>,
    /// All of them.
    known: HashMap<Uuid, Arc<Coming>>,
}

impl HotPacks {
    /// Looks for packs that are noted in the store.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub fn look(&self, fetcher: &Fetcher) -> Result<()> {
        let store = &fetcher.store;
        for layer in store.layers()? {
            let dir = store.layer_dir(layer);
            let hot = match Hot::read(&**store.storage(), &dir) {
                Ok(None) => continue,
                Ok(Some(hot)) => hot,
                Err(error) => {
                    tracing::warn!("a hot pack is dropped: {error}");
                    Hot::remove(&dir)?;
                    continue;
                }
            };
            let coming = Arc::new(Coming::announced());
            match self.state.lock().known.entry(layer) {
                Entry::Occupied(_) => continue,
                Entry::Vacant(new) => drop(new.insert(Arc::clone(&coming))),
            }
            for layer in &hot.layers {
                // Of one that cannot be opened others tell.
                if let Ok(Some(open)) = fetcher.layer(*layer) {
                    open.expect(&coming);
                }
            }
            self.state.lock().queue.push_back((layer, hot));
            self.changed.notify_one();
        }
        Ok(())
    }

    /// Whether one is to be fetched.
    pub fn is_busy(&self) -> bool {
        !self.state.lock().known.is_empty()
    }

    /// Fetches packs, one after the other.
    pub fn work(&self, fetcher: &Fetcher) {
        while !fetcher.is_stopped() {
            let mut state = self.state.lock();
            let Some((layer, hot)) = state.queue.pop_front() else {
                self.changed.wait_for(&mut state, LOOK);
                continue;
            };
            let coming = state.known.get(&layer).cloned();
            drop(state);
            if let Some(coming) = coming {
                bring(fetcher, layer, &hot, &coming);
                // Before it may be noted, and looked for, anew.
                self.state.lock().known.remove(&layer);
            }
        }
    }
}

/// Fetches a pack, or drops it, and forgets it.
fn bring(fetcher: &Fetcher, noted_at: Uuid, hot: &Hot, coming: &Arc<Coming>) {
    let digest = &hot.digest;
    let brought = hot.place().and_then(|(reference, access)| {
        let ranges = BlobReader::open(&reference, access, &fetcher.limit.seen)?;
        Stream::new(fetcher, hot, coming)?.run(&ranges)
    });
    let open: Vec<_> = {
        let layers = hot.layers.iter();
        layers
            .filter_map(|layer| fetcher.layer(*layer).ok()?)
            .collect()
    };
    open.iter().for_each(|open| open.expect_no_more(coming));
    if fetcher.is_stopped() {
        // The next fetcher goes on with it.
        return;
    }
    match brought {
        Ok(()) => tracing::info!("the hot pack {digest} has come"),
        Err(error) => tracing::warn!("the hot pack {digest} is dropped: {error}"),
    }
    // What came of it is not asked for once more: first it is made durable.
    let synced: Result<()> = open.iter().try_for_each(|open| open.sync());
    let dir = fetcher.store.layer_dir(noted_at);
    let forgotten = synced.and_then(|()| match Hot::read(&**fetcher.store.storage(), &dir)? {
        // Of a pull meanwhile.
        Some(another) if another != *hot => Ok(()),
        _ => Hot::remove(&dir),
    });
    if let Err(error) = forgotten {
        tracing::warn!("the hot pack {digest} is not forgotten: {error}");
    }
}

/// A pack on its way.
struct Stream<'a> {
    fetcher: &'a Fetcher,
    hot: &'a Hot,
    coming: &'a Coming,
    /// How many bytes of the blob have come, or were passed over.
    at: u64,
    /// Those that came last and are not used yet.
    bytes: Vec<u8>,
    /// The frames that have not come, each with its place, the next one first; `None` until the list has come.
    frames: Option<VecDeque<(u64, HotFrame)>>,
    reader: ChunkReader,
}

impl<'a> Stream<'a> {
    fn new(fetcher: &'a Fetcher, hot: &'a Hot, coming: &'a Coming) -> Result<Self> {
        Ok(Stream {
            fetcher,
            hot,
            coming,
            at: 0,
            bytes: Vec::new(),
            frames: None,
            reader: ChunkReader::new()?,
        })
    }

    /// Fetches it to its end. What breaks off goes on there.
    fn run(mut self, ranges: &BlobReader) -> Result<()> {
        let mut pauses = Pauses::default();
        let mut moved = Instant::now();
        loop {
            interrupt::check()?;
            let before = self.at;
            let (digest, size) = (&self.hot.digest, self.hot.size);
            let streamed = ranges.stream(digest, before..size, |bytes| self.take(bytes));
            if self.frames.as_ref().is_some_and(VecDeque::is_empty) {
                return Ok(());
            }
            if self.at > before {
                moved = Instant::now();
                pauses = Pauses::default();
            }
            let Err(failure) = streamed else {
                continue;
            };
            self.coming.failed();
            let given_up = moved.elapsed() >= GIVE_UP || self.fetcher.is_stopped();
            if given_up || !failure.passes {
                return Err(failure.error);
            }
            let pause = pauses.next(failure.after);
            tracing::warn!("{}; once more in {pause:?}", failure.error);
            self.fetcher.rest(pause);
        }
    }

    /// Takes the bytes that follow those before.
    fn take(&mut self, bytes: &[u8]) -> Result<Flow, Failure> {
        if self.fetcher.is_stopped() {
            return Err(Error::new(ErrorKind::Interrupted, "the fetcher ends").into());
        }
        self.bytes.extend_from_slice(bytes);
        self.at += bytes.len() as u64;
        if self.frames.is_none() {
            if !self.read_list()? {
                return Ok(Flow::Go);
            }
            if self.pass_over() {
                return Ok(Flow::Stop);
            }
        }
        self.put_frames()?;
        let done = self.frames.as_ref().is_some_and(VecDeque::is_empty);
        Ok(if done { Flow::Stop } else { Flow::Go })
    }

    /// Reads the list, if all of it has come.
    fn read_list(&mut self) -> Result<bool> {
        if self.bytes.len() < HOT_HEADER_LEN {
            return Ok(false);
        }
        let size = self.hot.size;
        let front = HotPack::front_len(&self.bytes, size)?;
        if self.bytes.len() < front {
            return Ok(false);
        }
        let rest = self.bytes.split_off(front);
        let pack = HotPack::decode(&std::mem::replace(&mut self.bytes, rest), size)?;
        if pack.layers as usize != self.hot.layers.len() {
            let (found, wanted) = (pack.layers, self.hot.layers.len());
            let text = format!("it is of an image of {found} layers, not {wanted}");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let frames: VecDeque<_> = pack.placed().collect();
        let place = |(at, frame): &(u64, HotFrame)| Some(((self.layer(frame)?, frame.window), *at));
        self.coming.holds(frames.iter().filter_map(place).collect());
        self.coming.has_come(front as u64);
        self.frames = Some(frames);
        Ok(true)
    }

    fn layer(&self, frame: &HotFrame) -> Option<Uuid> {
        self.hot.layers.get(frame.layer as usize).copied()
    }

    /// Passes over frames that are here, as where a fetcher was killed in the middle, if that is worth another request.
    /// False where the bytes that come are the next ones.
    fn pass_over(&mut self) -> bool {
        let Some(frames) = &self.frames else {
            return false;
        };
        let here = |(_, frame): &&(u64, HotFrame)| {
            let open = self.layer(frame).map(|layer| self.fetcher.layer(layer));
            match open {
                Some(Ok(Some(open))) => open.has(frame.window),
                _ => true,
            }
        };
        let passed = frames.iter().take_while(here).count();
        let next = frames.get(passed).map_or(self.hot.size, |(at, _)| *at);
        if next < self.at + WORTH_A_REQUEST && passed < frames.len() {
            return false;
        }
        self.frames
            .iter_mut()
            .for_each(|frames| drop(frames.drain(..passed)));
        self.bytes.clear();
        self.at = next;
        self.coming.has_come(next);
        true
    }

    /// Puts the frames that have come where they are read.
    fn put_frames(&mut self) -> Result<(), Failure> {
        let mut used = 0;
        while let Some((at, frame)) = self
            .frames
            .as_ref()
            .and_then(|frames| frames.front().copied())
        {
            let Some(stored) = self.bytes.get(used..used + frame.len as usize) else {
                break;
            };
            used += stored.len();
            self.coming.has_come(at + u64::from(frame.len));
            if let Some(layer) = self.layer(&frame)
                && let Some(open) = self.fetcher.layer(layer)?
            {
                open.put_hot(frame.window, stored, &mut self.reader)?;
            }
            if let Some(frames) = &mut self.frames {
                frames.pop_front();
            }
        }
        self.bytes.drain(..used);
        Ok(())
    }
}
