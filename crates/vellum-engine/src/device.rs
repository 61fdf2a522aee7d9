//! What a device server opens: the chain of a container, of a layer being made, or of sealed
//! layers alone.

use std::ffi::OsString;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::complete::checksum_layer;
use super::wire::encode;
use vellum_base::block::{Block, BlockDevice, BlockState, Offset, Span};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::chain::{
    Chain, ChainSpec, ChainStats, ChainStatsSnapshot, CopiedUp, STATS_LEN, Source, look_at_chain,
    open_counted_chain, open_read_only_chain,
};
use vellum_core::layer::{LayerOptions, LayerStatsSnapshot, SpaceStatus, WritableLayer};
use vellum_export::device::{AttachSpec, ControlHandler, Memory, Opened};
use vellum_fs::superblock::Superblock;
use vellum_store::{LayerLease, Resolved, Store};

/// Asks a device server to seal its top layer and go on in another: [`SealTop`].
pub const SEAL_TOP: &str = "seal-top";
/// Tells a device server that [`SEAL_TOP`] with the same arguments comes next: it opens the layer
/// and makes durable what there is, so that less is left to do then.
pub const PREPARE_SEAL: &str = "prepare-seal";
/// Asks a device server to seal its top layer for good; the answer is [`Sealed`].
pub const SEAL: &str = "seal";
/// Asks a device server for its counters: [`DeviceStats`].
pub const STATS: &str = "stats";
/// Asks a device server where its blocks come from: [`AskMap`], answered by [`MapPart`].
pub const MAP: &str = "map";
/// Asks a device server to copy blocks up: [`CopyUp`], answered by [`CopiedUp`].
pub const COPY_UP: &str = "copy-up";
/// Asks a device server to go on with other sealed layers of the same content: [`ReplaceSealed`].
pub const REPLACE_SEALED: &str = "replace-sealed";
/// Asks a device server to make its device larger: [`Grow`]. One that is as large is fine.
pub const GROW: &str = "grow";

/// Requests of a block device that wait for minutes make the kernel complain of hung tasks.
const MAX_FULL_WAIT: Duration = Duration::from_secs(600);
/// How long a server leaves a layer that it sealed without checksums: a commit makes them itself.
const BEFORE_CHECKSUMS: Duration = Duration::from_secs(10);
/// Runs in one answer about the map, so that it fits a line of the control socket.
const MAX_RUNS: usize = 16 << 10;

/// Which chain to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A container's, writable. Its name.
    Container(String),
    /// A container's, to look at: no file of it is changed, and nobody writes it meanwhile. Its name.
    Look(String),
    /// A layer in `staging` on its parents, writable. Whoever staged it keeps it leased.
    Staged(Uuid),
    /// A published layer on its parents: writable until it is sealed.
    Layer(Uuid),
    /// A sealed layer on its parents, read-only.
    Sealed(Uuid),
}

impl Target {
    /// The arguments that name it to `vellum device-server`.
    pub fn arguments(&self) -> Vec<OsString> {
        match self {
            Target::Container(name) => vec!["--container".into(), name.into()],
            Target::Look(name) => vec!["--look".into(), name.into()],
            Target::Staged(layer) => vec!["--staged".into(), layer.to_string().into()],
            Target::Layer(layer) => vec!["--layer".into(), layer.to_string().into()],
            Target::Sealed(layer) => vec!["--sealed".into(), layer.to_string().into()],
        }
    }

    /// True when it cannot be written.
    pub fn is_read_only(&self) -> bool {
        matches!(self, Target::Sealed(_) | Target::Look(_))
    }

    /// Opens a container's chain as it was resolved before.
    pub(super) fn open_unsettled(
        &self,
        store: &Store,
        resolved: &Resolved,
        stats: Arc<ChainStats>,
    ) -> Result<OpenChain> {
        if store.is_read_only() {
            let lease = store.lease_for_reading(resolved.top)?;
            let sealed = store.layer_dirs(&resolved.sealed);
            let top = store.layer_dir(resolved.top);
            let chain = open_read_only_chain(store.storage(), &sealed, &top, stats)?;
            return Ok(OpenChain::new(store, chain, Some(lease)));
        }
        let lease = store.lease_layer(resolved.top)?;
        store.check_place()?;
        let spec = store.chain_spec(resolved, layer_options(store));
        Ok(OpenChain::new(
            store,
            open_counted_chain(store.storage(), &spec, stats)?,
            Some(lease),
        ))
    }

    /// Opens the chain. For a container this takes the right to write it.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while another process has a container's layer; what is wrong with a
    /// layer, by name.
    pub fn open(&self, store: &Store) -> Result<OpenChain> {
        self.open_counted(store, Arc::default())
    }

    /// As [`Target::open`], counting in `stats`, which may hold what was counted before.
    ///
    /// # Errors
    /// As [`Target::open`].
    pub fn open_counted(&self, store: &Store, stats: Arc<ChainStats>) -> Result<OpenChain> {
        let options = layer_options(store);
        match self {
            Target::Container(name) => {
                let resolved = store.resolve_name(name)?;
                let open = || {
                    let open = self.open_unsettled(store, &resolved, stats)?;
                    if let Some(size) = store.container(name)?.disk.device_size {
                        open.chain().show(size)?;
                    }
                    Ok(open)
                };
                open().map_err(|error: Error| error.context(format!("the container {name}")))
            }
            Target::Look(name) => {
                let resolved = store.resolve_name(name)?;
                let what = |error: Error| error.context(format!("the container {name}"));
                let lease = store.lease_for_reading(resolved.top).map_err(what)?;
                let sealed = store.layer_dirs(&resolved.sealed);
                let top = store.layer_dir(resolved.top);
                let chain =
                    open_read_only_chain(store.storage(), &sealed, &top, stats).map_err(what)?;
                Ok(OpenChain::new(store, chain, Some(lease)))
            }
            Target::Staged(layer) => {
                let top = store.staging_dir(*layer);
                let header = vellum_core::layer::Header::read(&**store.storage(), &top)?;
                let sealed = store.layer_dirs(&store.ancestry(header.parent)?);
                let spec = ChainSpec {
                    sealed,
                    top: Some(top),
                    options,
                };
                Ok(OpenChain::new(
                    store,
                    // Of one who looks at a container through it the parent may not be sealed.
                    look_at_chain(store.storage(), &spec, stats)?,
                    None,
                ))
            }
            Target::Layer(layer) => {
                let dir = store.layer_dir(*layer);
                let header = vellum_core::layer::Header::read(&**store.storage(), &dir)?;
                if header.sealed {
                    // A server that died after it sealed its top.
                    return Target::Sealed(*layer).open_counted(store, stats);
                }
                let lease = store.lease_layer(*layer)?;
                store.check_place()?;
                let sealed = store.layer_dirs(&store.ancestry(header.parent)?);
                let spec = ChainSpec {
                    sealed,
                    top: Some(dir),
                    options,
                };
                let chain = open_counted_chain(store.storage(), &spec, stats)?;
                Ok(OpenChain::new(store, chain, Some(lease)))
            }
            Target::Sealed(layer) => {
                let sealed = store.layer_dirs(&store.ancestry(Some(*layer))?);
                let spec = ChainSpec {
                    sealed,
                    top: None,
                    options,
                };
                let lease = store.read_layer(*layer)?;
                Ok(OpenChain::new(
                    store,
                    open_counted_chain(store.storage(), &spec, stats)?,
                    Some(lease),
                ))
            }
        }
    }
}

/// How long writers are held while the host's disk is full: `VELLUM_FULL_WAIT` in the environment,
/// seconds, at most [`MAX_FULL_WAIT`]; `None` for the default.
fn full_wait() -> Option<Duration> {
    let value = std::env::var_os("VELLUM_FULL_WAIT")?;
    let seconds = value
        .to_str()
        .and_then(|text| text.trim().parse::<f64>().ok());
    let wait = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    if wait.is_none() {
        tracing::warn!(?value, "VELLUM_FULL_WAIT: no number of seconds");
    }
    wait.map(|wait| wait.min(MAX_FULL_WAIT))
}

/// How a writable layer of this store trades.
fn layer_options(store: &Store) -> LayerOptions {
    let memory = nix::sys::statfs::statfs(store.root())
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC);
    let mut options = LayerOptions::default();
    if memory {
        // A sync costs nothing there, so copying blocks to avoid one only costs.
        options.journal_blocks = 0;
    }
    options
}

/// Arguments of [`SEAL_TOP`].
#[derive(Debug, Serialize, Deserialize)]
pub struct SealTop {
    /// The empty layer to go on in.
    pub next: Uuid,
}

/// Arguments of [`REPLACE_SEALED`].
#[derive(Debug, Serialize, Deserialize)]
pub struct ReplaceSealed {
    /// From the bottom up.
    pub layers: Vec<Uuid>,
}

/// Answer of [`SEAL_TOP`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedTop {
    /// For how many microseconds requests waited, at most.
    pub waited_us: u64,
}

/// Answer of [`SEAL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// Data blocks in the sealed layer.
    pub blocks: u64,
}

/// Arguments of [`COPY_UP`].
#[derive(Debug, Serialize, Deserialize)]
pub struct CopyUp {
    /// (first byte, length in bytes) of each range.
    pub ranges: Vec<(u64, u64)>,
}

/// Arguments of [`GROW`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Grow {
    /// Bytes that the device shall have.
    pub size: u64,
}

/// Arguments of [`MAP`].
#[derive(Debug, Serialize, Deserialize)]
pub struct AskMap {
    /// First block.
    pub start: u64,
    /// How many runs at most.
    pub max: usize,
}

/// Stands for a hole among the numbers of layers.
pub const HOLE: i64 = -1;
/// Stands for zero among the numbers of layers.
pub const ZERO: i64 = -2;

/// Answer of [`MAP`]: the runs from where it was asked for on.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct MapPart {
    /// Layers below the top.
    pub depth: u64,
    /// Size of the device in bytes.
    pub virtual_size: u64,
    /// (blocks, source): [`HOLE`], [`ZERO`], else a layer's number from the bottom; the top
    /// has the number `depth`. Without gaps.
    pub runs: Vec<(u64, i64)>,
}

impl MapPart {
    /// A part of a chain's map.
    ///
    /// # Errors
    /// As [`Chain::sources`].
    pub(super) fn new(chain: &Chain, ask: &AskMap) -> Result<Self> {
        let depth = chain.base().depth() as u64;
        let runs = chain.sources(Block::new(ask.start), ask.max.min(MAX_RUNS));
        let runs = runs.into_iter().map(|run| {
            let code = match run.value {
                Source::Hole => HOLE,
                Source::Zero => ZERO,
                Source::Sealed(number) => i64::from(number),
                Source::Top => depth as i64,
            };
            (run.len().get(), code)
        });
        Ok(MapPart {
            depth,
            virtual_size: chain.whole_size(),
            runs: runs.collect(),
        })
    }
}

/// False with `VELLUM_STATS=off` in the environment, which is there to find out what counting costs.
pub(super) fn counts() -> bool {
    std::env::var_os("VELLUM_STATS").is_none_or(|value| value != "off")
}

/// Counters for the worker of a device, in the memory that outlives it.
///
/// # Errors
/// Where the memory cannot be mapped.
pub fn served_stats(memory: Memory<'_>) -> Result<Arc<ChainStats>> {
    if memory.len < STATS_LEN {
        return Ok(Arc::default());
    }
    let stats = ChainStats::in_file(memory.file, memory.offset)?;
    Ok(Arc::new(stats.counting(counts())))
}

/// Counters of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Data blocks in the top layer.
    pub top_blocks: u64,
    /// Layers below the top.
    pub depth: u64,
    /// Its size in bytes.
    #[serde(default)]
    pub virtual_size: u64,
    /// How its top layer stands with the host's space.
    #[serde(default)]
    pub space: SpaceStatus,
    /// Requests and copy-ups.
    pub chain: ChainStatsSnapshot,
    /// Flushes and the journal.
    pub layer: LayerStatsSnapshot,
}

/// A chain that this process has open, with the right to write it.
#[derive(Debug)]
pub struct OpenChain {
    store: Store,
    chain: Arc<Chain>,
    /// Of the top; none for one that is being made.
    lease: Mutex<Option<LayerLease>>,
    /// The layer that [`PREPARE_SEAL`] opened. Without a lease: if whoever wants it dies before it
    /// comes to that, the layer is nobody's.
    next: Mutex<Option<Arc<WritableLayer>>>,
    /// A device server has it, and lives for long: sealed layers get their checksums there.
    served: bool,
}

impl OpenChain {
    fn new(store: &Store, chain: Chain, lease: Option<LayerLease>) -> Self {
        let mut chain = chain;
        if let Some(top) = chain.top() {
            if let Some(wait) = full_wait() {
                top.hold_writes_for(wait);
            }
            // Without an ext4 there is nothing to favour.
            if let Ok(superblock) = chain.uncounted(|chain| Superblock::read(chain)) {
                let journal = superblock.journal.into_iter();
                let bytes = |range: Range<u64>| Offset::new(range.start)..Offset::new(range.end);
                top.favour(journal.map(bytes).collect());
            }
        }
        OpenChain {
            store: store.clone(),
            chain: Arc::new(chain),
            lease: Mutex::new(lease),
            next: Mutex::new(None),
            served: false,
        }
    }

    /// The block device.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// For a device server.
    pub fn into_served(mut self) -> Opened {
        self.served = true;
        self.complete_sealed();
        Opened {
            device: self.chain.clone(),
            control: Arc::new(self),
        }
    }

    /// Makes the journal of the top in a thread of its own, while the kernel is still told of the
    /// device: the mount's first flush wants it.
    pub fn prepare_journal(&self) {
        let Some(top) = self.chain.top() else {
            return;
        };
        let prepare = move || {
            if let Err(error) = top.prepare_journal() {
                tracing::warn!(%error, "the journal is left to the first flush");
            }
        };
        // Without a thread the first flush makes it.
        let _ = std::thread::Builder::new()
            .name("vellum-journal".into())
            .spawn(prepare);
    }

    /// Gives sealed layers of the chain that have no checksums yet theirs, in a thread of its own, which
    /// leaves most of the disk's time to others, and the first seconds to a command that waits for them and to
    /// whatever begins in the container. What it does not come to is left to the next server, or to
    /// [`super::check::finish_commits`].
    fn complete_sealed(&self) {
        // Whoever only looks changes nothing.
        if !self.served || self.chain.top().is_none() {
            return;
        }
        let layers = self.chain.base().layers();
        let pending = layers.iter().filter(|layer| !layer.is_checksummed());
        let pending: Vec<Uuid> = pending.map(|layer| layer.header().uuid).collect();
        if pending.is_empty() {
            return;
        }
        let store = self.store.clone();
        let complete = move || {
            std::thread::sleep(BEFORE_CHECKSUMS);
            for layer in pending {
                let mut began = Instant::now();
                let completed = checksum_layer(&store, layer, |_| {
                    std::thread::sleep(began.elapsed() * 2);
                    began = Instant::now();
                });
                match completed {
                    Err(error) if error.kind() != ErrorKind::NotFound => {
                        tracing::warn!(%layer, %error, "a layer got no checksums yet");
                    }
                    _ => {}
                }
            }
        };
        // Without a thread the next server does it.
        let _ = std::thread::Builder::new()
            .name("vellum-digest".into())
            .spawn(complete);
    }

    /// Opens the layer `next` for [`OpenChain::seal_top`] and flushes the top.
    ///
    /// # Errors
    /// Where `next` cannot be opened, and as [`WritableLayer::flush`].
    pub fn prepare_seal(&self, next: Uuid) -> Result<()> {
        let mut prepared = self.next.lock();
        if prepared.as_ref().map(|there| there.header().uuid) != Some(next) {
            *prepared = Some(self.open_next(next)?);
        }
        drop(prepared);
        self.chain.top().map_or(Ok(()), |top| top.prepare_seal())
    }

    fn open_next(&self, next: Uuid) -> Result<Arc<WritableLayer>> {
        let layer = WritableLayer::open_counted(
            self.store.storage().clone(),
            &self.store.layer_dir(next),
            layer_options(&self.store),
            self.chain.stats().clone(),
        )?;
        if let Some(wait) = full_wait() {
            layer.hold_writes_for(wait);
        }
        Ok(layer)
    }

    /// Seals the top and goes on in the layer `next`.
    ///
    /// # Errors
    /// As [`Chain::seal_top`].
    pub fn seal_top(&self, next: Uuid) -> Result<SealedTop> {
        let lease = self.store.lease_layer(next)?;
        let prepared = self.next.lock().take();
        let layer = match prepared {
            Some(there) if there.header().uuid == next => there,
            // Also where the server that prepared it died since.
            _ => self.open_next(next)?,
        };
        let began = Instant::now();
        self.chain.seal_top(layer)?;
        let waited = began.elapsed();
        // The layer before never changes again, so its lease is of no use.
        *self.lease.lock() = Some(lease);
        self.complete_sealed();
        Ok(SealedTop {
            waited_us: waited.as_micros() as u64,
        })
    }

    /// Seals the top for good: the device can only be read from now on. Nobody has the file system
    /// mounted, so the blocks of its journal are dropped.
    ///
    /// # Errors
    /// As [`Chain::seal_last`].
    pub fn seal(&self) -> Result<Sealed> {
        forget_ext4_journal(self)?;
        let sealed = self.chain.seal_last()?;
        Ok(Sealed {
            blocks: sealed.data_blocks().get(),
        })
    }

    /// Flushes and leaves nothing to recover, as dropping it does, but says whether that went well.
    ///
    /// # Errors
    /// As [`Chain::close`].
    pub fn close(&self) -> Result<()> {
        self.chain.close()
    }

    /// The counters now.
    pub fn stats(&self) -> DeviceStats {
        let top = self.chain.top();
        DeviceStats {
            top_blocks: top.as_ref().map_or(0, |top| top.data_blocks().get()),
            depth: self.chain.base().depth() as u64,
            virtual_size: self.chain.size(),
            space: top.as_ref().map(|top| top.space()).unwrap_or_default(),
            chain: self.chain.stats().snapshot(),
            layer: top.map(|top| top.stats().snapshot()).unwrap_or_default(),
        }
    }
}

/// Lets a layer say nothing of the ext4 journal's blocks: after an orderly unmount they mean
/// nothing, and every layer would carry them.
pub(super) fn forget_ext4_journal(open: &OpenChain) -> Result<()> {
    let chain = open.chain();
    let superblock = match Superblock::read(&**chain) {
        Ok(superblock) if superblock.clean => superblock,
        // What needs recovery, and what is no ext4, stays as it is.
        _ => return Ok(()),
    };
    let Some(top) = chain.top() else {
        return Ok(());
    };
    for range in superblock.journal {
        let start = Offset::new(range.start).block_from();
        let end = Offset::new(range.end.min(chain.size())).block();
        if start < end {
            let whole = Span::between(start, end);
            let held = top.lock_blocks(whole)?;
            top.clear_blocks(&held, whole, BlockState::Parent)?;
        }
    }
    Ok(())
}

/// The hidden subcommand that serves a device.
pub const SERVER_COMMAND: &str = "device-server";

/// How to start the server of a target.
pub fn attach_spec(store: &Store, target: &Target) -> AttachSpec {
    let mut arguments: Vec<OsString> =
        vec!["--root".into(), store.root().into(), SERVER_COMMAND.into()];
    arguments.extend(target.arguments());
    AttachSpec {
        read_only: target.is_read_only(),
        ..AttachSpec::new(arguments)
    }
}

fn parse<T: serde::de::DeserializeOwned>(args: Value, what: &str) -> Result<T> {
    serde_json::from_value(args)
        .map_err(|error| Error::with_source(ErrorKind::InvalidInput, what, error))
}

impl ControlHandler for OpenChain {
    fn handle(&self, verb: &str, args: Value) -> Result<Value> {
        match verb {
            SEAL_TOP => {
                let args: SealTop = parse(args, "seal-top wants a layer")?;
                encode(&self.seal_top(args.next)?)
            }
            PREPARE_SEAL => {
                let args: SealTop = parse(args, "prepare-seal wants a layer")?;
                self.prepare_seal(args.next).map(|()| Value::Null)
            }
            REPLACE_SEALED => {
                let args: ReplaceSealed = parse(args, "replace-sealed wants layers")?;
                let dirs = self.store.layer_dirs(&args.layers);
                self.chain
                    .replace_sealed(self.store.storage(), &dirs)
                    .map(|()| Value::Null)
            }
            SEAL => encode(&self.seal()?),
            STATS => encode(&self.stats()),
            MAP => {
                let ask: AskMap = parse(args, "map wants a place and a number")?;
                encode(&MapPart::new(&self.chain, &ask)?)
            }
            GROW => {
                let args: Grow = parse(args, "grow wants a size")?;
                self.chain.grow(args.size).map(|()| Value::Null)
            }
            COPY_UP => {
                let args: CopyUp = parse(args, "copy-up wants ranges")?;
                let mut done = CopiedUp::default();
                for (offset, len) in args.ranges {
                    done.add(self.chain.copy_up(Offset::new(offset), len)?);
                }
                // Not for the copies, but for the clients' next flush, which would have to sync them.
                self.chain.top().map_or(Ok(()), |top| top.flush())?;
                encode(&done)
            }
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                format!("the device server knows no command {verb:?}"),
            )),
        }
    }
}

impl Drop for OpenChain {
    fn drop(&mut self) {
        // What was flushed is safe anyway; closing spares the next open a recovery.
        if let Err(error) = self.chain.close() {
            tracing::error!(%error, "the chain was not closed in order");
        }
    }
}
