//! What a device server opens: the chain of a container, of a layer being made, or of sealed
//! layers alone.

use std::ffi::OsString;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::import::forget_ext4_journal;
use crate::chain::{Chain, ChainSpec, ChainStatsSnapshot, open_chain};
use crate::error::{Error, ErrorKind, Result};
use crate::export::device::{ControlHandler, Opened};
use crate::layer::{LayerOptions, LayerStatsSnapshot, WritableLayer};
use crate::store::{LayerLease, Resolved, Store};

/// Asks a device server to seal its top layer and go on in another: [`SealTop`].
pub const SEAL_TOP: &str = "seal-top";
/// Tells a device server that [`SEAL_TOP`] with the same arguments comes next: it opens the layer
/// and makes durable what there is, so that less is left to do then.
pub const PREPARE_SEAL: &str = "prepare-seal";
/// Asks a device server to seal its top layer for good; the answer is [`Sealed`].
pub const SEAL: &str = "seal";
/// Asks a device server for its counters: [`DeviceStats`].
pub const STATS: &str = "stats";

/// Which chain to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A container's, writable. Its name.
    Container(String),
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
            Target::Staged(layer) => vec!["--staged".into(), layer.to_string().into()],
            Target::Layer(layer) => vec!["--layer".into(), layer.to_string().into()],
            Target::Sealed(layer) => vec!["--sealed".into(), layer.to_string().into()],
        }
    }

    /// True when it cannot be written.
    pub fn is_read_only(&self) -> bool {
        matches!(self, Target::Sealed(_))
    }

    /// Opens a container's chain as it was resolved before.
    pub(super) fn open_unsettled(&self, store: &Store, resolved: &Resolved) -> Result<OpenChain> {
        let lease = store.lease_layer(resolved.top)?;
        let spec = store.chain_spec(resolved, layer_options(store));
        Ok(OpenChain::new(
            store,
            open_chain(store.storage(), &spec)?,
            Some(lease),
        ))
    }

    /// Opens the chain. For a container this takes the right to write it.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while another process has a container's layer; what is wrong with a
    /// layer, by name.
    pub fn open(&self, store: &Store) -> Result<OpenChain> {
        let options = layer_options(store);
        match self {
            Target::Container(name) => {
                let resolved = store.resolve_name(name)?;
                self.open_unsettled(store, &resolved)
                    .map_err(|error| error.context(format!("the container {name}")))
            }
            Target::Staged(layer) => {
                let top = store.staging_dir(*layer);
                let header = crate::layer::Header::read(&**store.storage(), &top)?;
                let sealed = store.layer_dirs(&store.ancestry(header.parent)?);
                let spec = ChainSpec {
                    sealed,
                    top: Some(top),
                    options,
                };
                Ok(OpenChain::new(
                    store,
                    open_chain(store.storage(), &spec)?,
                    None,
                ))
            }
            Target::Layer(layer) => {
                let dir = store.layer_dir(*layer);
                let header = crate::layer::Header::read(&**store.storage(), &dir)?;
                if header.sealed {
                    // A server that died after it sealed its top.
                    return Target::Sealed(*layer).open(store);
                }
                let lease = store.lease_layer(*layer)?;
                let sealed = store.layer_dirs(&store.ancestry(header.parent)?);
                let spec = ChainSpec {
                    sealed,
                    top: Some(dir),
                    options,
                };
                let chain = open_chain(store.storage(), &spec)?;
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
                    open_chain(store.storage(), &spec)?,
                    Some(lease),
                ))
            }
        }
    }
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

/// Answer of [`SEAL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// Data blocks in the sealed layer.
    pub blocks: u64,
}

/// Counters of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Data blocks in the top layer.
    pub top_blocks: u64,
    /// Layers below the top.
    pub depth: u64,
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
    leases: Mutex<Vec<LayerLease>>,
    /// The layer that [`PREPARE_SEAL`] opened.
    next: Mutex<Option<Next>>,
}

#[derive(Debug)]
struct Next {
    layer: Arc<WritableLayer>,
    lease: LayerLease,
}

impl OpenChain {
    fn new(store: &Store, chain: Chain, lease: Option<LayerLease>) -> Self {
        OpenChain {
            store: store.clone(),
            chain: Arc::new(chain),
            leases: Mutex::new(lease.into_iter().collect()),
            next: Mutex::new(None),
        }
    }

    /// The block device.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// For a device server.
    pub fn into_served(self) -> Opened {
        Opened {
            device: self.chain.clone(),
            control: Arc::new(self),
        }
    }

    /// Opens the layer `next` for [`OpenChain::seal_top`] and flushes the top.
    ///
    /// # Errors
    /// Where `next` cannot be opened, and as [`WritableLayer::flush`].
    pub fn prepare_seal(&self, next: Uuid) -> Result<()> {
        let mut prepared = self.next.lock();
        if prepared.as_ref().map(|there| there.layer.header().uuid) != Some(next) {
            // One of a seal that never came: its lease goes with it.
            *prepared = None;
            *prepared = Some(self.open_next(next)?);
        }
        drop(prepared);
        self.chain.top().map_or(Ok(()), |top| top.prepare_seal())
    }

    fn open_next(&self, next: Uuid) -> Result<Next> {
        let lease = self.store.lease_layer(next)?;
        let layer = WritableLayer::open(
            self.store.storage().clone(),
            &self.store.layer_dir(next),
            layer_options(&self.store),
        )?;
        Ok(Next { layer, lease })
    }

    /// Seals the top and goes on in the layer `next`.
    ///
    /// # Errors
    /// As [`Chain::seal_top`].
    pub fn seal_top(&self, next: Uuid) -> Result<()> {
        let prepared = self.next.lock().take();
        let Next { layer, lease } = match prepared {
            Some(there) if there.layer.header().uuid == next => there,
            // Also where the server that prepared it died since.
            _ => self.open_next(next)?,
        };
        self.chain.seal_top(layer)?;
        self.leases.lock().push(lease);
        Ok(())
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
            blocks: sealed.data_blocks(),
        })
    }

    /// The counters now.
    pub fn stats(&self) -> DeviceStats {
        let top = self.chain.top();
        DeviceStats {
            top_blocks: top.as_ref().map_or(0, |top| top.data_blocks()),
            depth: self.chain.base().depth() as u64,
            chain: self.chain.stats().snapshot(),
            layer: top.map(|top| top.stats().snapshot()).unwrap_or_default(),
        }
    }
}

impl ControlHandler for OpenChain {
    fn handle(&self, verb: &str, args: Value) -> Result<Value> {
        match verb {
            SEAL_TOP => {
                let args: SealTop = serde_json::from_value(args).map_err(|error| {
                    Error::with_source(ErrorKind::InvalidInput, "seal-top wants a layer", error)
                })?;
                self.seal_top(args.next).map(|()| Value::Null)
            }
            PREPARE_SEAL => {
                let args: SealTop = serde_json::from_value(args).map_err(|error| {
                    Error::with_source(ErrorKind::InvalidInput, "prepare-seal wants a layer", error)
                })?;
                self.prepare_seal(args.next).map(|()| Value::Null)
            }
            SEAL => serde_json::to_value(self.seal()?).map_err(|error| {
                Error::with_source(ErrorKind::Io, "the answer cannot be encoded", error)
            }),
            STATS => serde_json::to_value(self.stats()).map_err(|error| {
                Error::with_source(ErrorKind::Io, "the counters cannot be encoded", error)
            }),
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

impl Store {
    /// Layers from the bottom up to `layer`, found by the parents that their headers name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where one is missing, [`ErrorKind::Corrupt`] for a circle.
    pub fn ancestry(&self, layer: Option<Uuid>) -> Result<Vec<Uuid>> {
        let mut layers = Vec::new();
        let mut seen = std::collections::HashSet::new();
        let mut at = layer;
        while let Some(layer) = at {
            if !seen.insert(layer) {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("the layer {layer} is its own ancestor"),
                ));
            }
            layers.push(layer);
            let header = crate::layer::Header::read(&**self.storage(), &self.layer_dir(layer))?;
            at = header.parent;
        }
        layers.reverse();
        Ok(layers)
    }

    /// The layers of a container as [`Target::open`] finds them, without opening them.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn resolve_name(&self, name: &str) -> Result<Resolved> {
        self.resolve(&self.container(name)?)
    }
}
