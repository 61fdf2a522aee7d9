//! Which chain a device server opens, and how.

use std::ffi::OsString;
use std::sync::{Arc, OnceLock};

use uuid::Uuid;

use super::{OpenChain, layer_options, layer_options_without_syncs};
use crate::lazy::waits_for_any;
use vellum_base::error::{Error, Result};
use vellum_base::storage::{ScratchStorage, Storage};
use vellum_core::chain::{
    Chain, ChainSpec, ChainStats, look_at_chain, open_counted_chain, open_read_only_chain,
};
use vellum_export::device::{AttachSpec, TransportChoice, Waits};
use vellum_store::{ContainerRecord, ContainerRef, LayerLease, Resolved, Store};

/// Which chain to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A container's, writable.
    Container(ContainerRef),
    /// A container's, to look at: no file of it is changed, and nobody writes it meanwhile.
    Look(ContainerRef),
    /// A layer in `staging` on its parents, writable. Whoever staged it keeps it leased. It is thrown away:
    /// nothing of it becomes durable ([`ScratchStorage`]).
    Staged(Uuid),
    /// A published layer on its parents: writable until it is sealed.
    Layer(Uuid),
    /// A sealed layer on its parents, read-only.
    Sealed(Uuid),
}

impl Target {
    /// A container's chain, writable.
    pub fn of(container: &ContainerRecord) -> Target {
        Target::Container(container.into())
    }

    /// A container's chain, to look at.
    pub fn look_at(container: &ContainerRecord) -> Target {
        Target::Look(container.into())
    }

    /// The arguments that name it to `vellum device-server`. The name of a container is there for
    /// people, and for `vellum umount` in a store that cannot be read; servers go by its id, since
    /// they open the chain again when one of them has died, and it may be renamed by then.
    pub fn arguments(&self) -> Vec<OsString> {
        let container = |option: &str, container: &ContainerRef| {
            let (name, id) = ((&container.name).into(), container.id.to_string().into());
            vec![option.into(), name, "--id".into(), id]
        };
        match self {
            Target::Container(which) => container("--container", which),
            Target::Look(which) => container("--look", which),
            Target::Staged(layer) => vec!["--staged".into(), layer.to_string().into()],
            Target::Layer(layer) => vec!["--layer".into(), layer.to_string().into()],
            Target::Sealed(layer) => vec!["--sealed".into(), layer.to_string().into()],
        }
    }

    /// The container's id, or that of the topmost layer.
    pub fn id(&self) -> Uuid {
        match self {
            Target::Container(which) | Target::Look(which) => which.id,
            Target::Staged(layer) | Target::Layer(layer) | Target::Sealed(layer) => *layer,
        }
    }

    /// True when it cannot be written.
    pub fn is_read_only(&self) -> bool {
        matches!(self, Target::Sealed(_) | Target::Look(_))
    }

    /// The published layers of the chain, from the bottom up.
    ///
    /// # Errors
    /// What is wrong with a record or a layer, by name.
    pub fn layers(&self, store: &Store) -> Result<Vec<Uuid>> {
        match self {
            Target::Container(which) | Target::Look(which) => {
                let resolved = store.resolve(&store.find_container(which)?)?;
                let mut layers = resolved.sealed;
                layers.push(resolved.top);
                Ok(layers)
            }
            Target::Staged(layer) => {
                let dir = store.staging_dir(*layer);
                let header = vellum_core::layer::Header::read(&**store.storage(), &dir)?;
                store.ancestry(header.parent)
            }
            Target::Layer(layer) | Target::Sealed(layer) => store.ancestry(Some(*layer)),
        }
    }

    /// Opens the chain. For a container this takes the right to write it.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::InUse`] while another process has a container's layer; what is wrong with a
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
            Target::Container(which) if !store.is_read_only() => {
                open_container(store, which, stats, Store::lease_layer, write)
            }
            Target::Container(which) | Target::Look(which) => {
                open_container(store, which, stats, Store::lease_for_reading, look)
            }
            Target::Staged(layer) => {
                let top = store.staging_dir(*layer);
                let header = vellum_core::layer::Header::read(&**store.storage(), &top)?;
                let sealed = store.layer_dirs(&store.ancestry(header.parent)?);
                let spec = ChainSpec {
                    sealed,
                    top: Some(top),
                    options: layer_options_without_syncs(),
                };
                let storage: Arc<dyn Storage> = Arc::new(ScratchStorage);
                Ok(OpenChain::new(
                    store,
                    // Of one who looks at a container through it the parent may not be sealed.
                    look_at_chain(&storage, &spec, stats)?,
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

/// Lets the chain of a container show the bytes that its device has.
fn show_size(container: &ContainerRecord, open: OpenChain) -> Result<OpenChain> {
    let chain = open.chain();
    chain.show(container.disk.shown_of(chain.whole_size()))?;
    Ok(open)
}

/// Opens a container's chain once its top is leased. Not everybody who does has the container's lock: a
/// snapshot may have put another top in its place between looking and leasing.
fn open_container(
    store: &Store,
    which: &ContainerRef,
    stats: Arc<ChainStats>,
    lease: fn(&Store, Uuid) -> Result<LayerLease>,
    open: fn(&Store, &Resolved, Arc<ChainStats>) -> Result<Chain>,
) -> Result<OpenChain> {
    loop {
        let seen = store.find_container(which)?;
        let named = |error: Error| error.context(format!("the container {}", seen.name));
        let top = store.resolve(&seen).map_err(named)?.top;
        let held = lease(store, top).map_err(named)?;
        // From here on nobody seals it.
        let container = store.find_container(which)?;
        let resolved = store.resolve(&container).map_err(named)?;
        if resolved.top == top {
            let chain = open(store, &resolved, stats).map_err(named)?;
            return show_size(&container, OpenChain::new(store, chain, Some(held))).map_err(named);
        }
    }
}

/// A container's chain, writable.
fn write(store: &Store, resolved: &Resolved, stats: Arc<ChainStats>) -> Result<Chain> {
    store.check_place()?;
    let spec = store.chain_spec(resolved, layer_options(store));
    open_counted_chain(store.storage(), &spec, stats)
}

/// A container's chain to look at, while nobody writes it.
fn look(store: &Store, resolved: &Resolved, stats: Arc<ChainStats>) -> Result<Chain> {
    let sealed = store.layer_dirs(&resolved.sealed);
    let top = store.layer_dir(resolved.top);
    open_read_only_chain(store.storage(), &sealed, &top, stats)
}

/// The hidden subcommand that serves a device.
pub const SERVER_COMMAND: &str = "device-server";

/// What [`choose_transport`] was told.
static TRANSPORT: OnceLock<TransportChoice> = OnceLock::new();

/// Says how the requests of the devices come that this process attaches from now on. Only the first word
/// counts; without one the host decides.
pub fn choose_transport(choice: TransportChoice) {
    let _ = TRANSPORT.set(choice);
}

/// Whether somebody waits for blocks of the target's chain, looked at anew whenever it is asked.
fn waits_for_registry(store: &Store, target: &Target) -> Waits {
    let (store, target) = (store.clone(), target.clone());
    Waits(Arc::new(move || {
        let layers = target.layers(&store);
        layers.is_ok_and(|layers| waits_for_any(&store, &layers))
    }))
}

/// How to start the server of a target. It may take as long as a registry does that has its first blocks.
pub fn attach_spec(store: &Store, target: &Target) -> AttachSpec {
    let mut arguments: Vec<OsString> =
        vec!["--root".into(), store.root().into(), SERVER_COMMAND.into()];
    arguments.extend(target.arguments());
    AttachSpec {
        read_only: target.is_read_only(),
        transport: *TRANSPORT.get().unwrap_or(&TransportChoice::Auto),
        waits: Some(waits_for_registry(store, target)),
        ..AttachSpec::new(arguments)
    }
}
