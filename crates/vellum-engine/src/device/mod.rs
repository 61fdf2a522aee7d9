//! What a device server has open: the chain of a container, of a layer being made, or of sealed
//! layers alone.

mod messages;
mod target;

pub use messages::{
    AskMap, COPY_UP, CopyUp, DeviceStats, GIVE_BACK, GROW, Grow, HOLE, KEEP_FREE, KeepFree, MAP,
    MapPart, PREPARE_SEAL, REPLACE_SEALED, ReplaceSealed, SEAL, SEAL_TOP, STATS, SealTop, Sealed,
    SealedTop, ZERO,
};
pub use target::{SERVER_COMMAND, Target, attach_spec, choose_transport};

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::Value;
use uuid::Uuid;

use crate::complete::checksum_layer;
use crate::space::follow_policy;
use crate::wire::encode;
use vellum_base::block::{BlockDevice, BlockState, Offset, Span};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::chain::{Chain, ChainStats, CopiedUp, STATS_LEN};
use vellum_core::layer::{LayerOptions, WritableLayer};
use vellum_export::device::{ControlHandler, Memory, Opened};
use vellum_fs::superblock::Superblock;
use vellum_store::{LayerLease, Store};

/// Requests of a block device that wait for minutes make the kernel complain of hung tasks.
const MAX_FULL_WAIT: Duration = Duration::from_secs(600);
/// How long a server leaves a layer that it sealed without checksums: a commit makes them itself.
const BEFORE_CHECKSUMS: Duration = Duration::from_secs(10);
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

/// How the writers of a layer meet a disk that is full, or nearly so.
fn meet_full_disk(store: &Store, layer: &WritableLayer) {
    if let Some(wait) = full_wait() {
        layer.hold_writes_for(wait);
    }
    follow_policy(store, layer);
}

/// How a writable layer of this store trades.
fn layer_options(store: &Store) -> LayerOptions {
    let memory = nix::sys::statfs::statfs(store.root())
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC);
    let mut options = LayerOptions::default();
    if memory {
        options = layer_options_without_syncs();
        // Space ahead would be memory at once.
        options.preallocate = 0;
    }
    options
}

/// How a layer trades where a sync costs nothing: copying blocks to avoid one only costs.
fn layer_options_without_syncs() -> LayerOptions {
    LayerOptions {
        journal_blocks: 0,
        ..LayerOptions::default()
    }
}

/// False with `VELLUM_STATS=off` in the environment, which is there to find out what counting costs.
pub(crate) fn counts() -> bool {
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
    /// A server has it, and lives for long: sealed layers get their checksums there.
    served: bool,
}

impl OpenChain {
    fn new(store: &Store, chain: Chain, lease: Option<LayerLease>) -> Self {
        let mut chain = chain;
        if let Some(top) = chain.top() {
            meet_full_disk(store, &top);
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

    /// For a server that goes on when layers are sealed: they get their checksums here.
    pub fn for_long(mut self) -> Self {
        self.served = true;
        self.complete_sealed();
        self
    }

    /// For a device server.
    pub fn into_served(self) -> Opened {
        let this = self.for_long();
        Opened {
            device: this.chain.clone(),
            control: Arc::new(this),
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
    /// [`crate::check::finish_commits`].
    fn complete_sealed(&self) {
        // Whoever only looks changes nothing.
        if !self.served || self.chain.top().is_none() {
            return;
        }
        let layers = self.chain.base().layers();
        // Of a lazy one the fetcher does it.
        let pending = layers
            .iter()
            .filter(|layer| !layer.is_checksummed() && !layer.is_lazy());
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
        meet_full_disk(&self.store, &layer);
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
pub(crate) fn forget_ext4_journal(open: &OpenChain) -> Result<()> {
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
            KEEP_FREE => {
                let args: KeepFree = parse(args, "keep-free wants bytes")?;
                if let Some(top) = self.chain.top() {
                    top.keep_free(args.bytes);
                }
                Ok(Value::Null)
            }
            GIVE_BACK => {
                if let Some(top) = self.chain.top() {
                    top.give_back_preallocated();
                }
                Ok(Value::Null)
            }
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
