//! Chains as NBD exports, and as disks of virtual machines.

use std::sync::Arc;

use serde_json::Value;
use uuid::Uuid;

use super::contexts::contexts;
use super::device::{
    COPY_UP, GROW, KEEP_FREE, MAP, OpenChain, PREPARE_SEAL, REPLACE_SEALED, SEAL_TOP, STATS,
    Target, counts,
};
use super::serving::WHO;
use super::snapshot;
use super::wire::encode;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::Holder;
use vellum_core::chain::ChainStats;
use vellum_export::device::ControlHandler;
use vellum_export::device::control_server::ControlServer;
use vellum_export::nbd::Export;
use vellum_export::space_thread::SpaceThread;
use vellum_export::vhost::{Disk, Server as DiskServer};
use vellum_store::{ContainerRecord, Store};

/// A chain that is served, and the socket on which others ask for its counters. Both are closed in
/// order when it is dropped, after the server's shutdown.
#[derive(Debug)]
pub struct Serving {
    // These two first, since they hold the chain too.
    space: SpaceThread,
    _control: Option<ControlServer>,
    chain: Arc<OpenChain>,
}

impl Serving {
    /// Closes the chain in order, after the server's shutdown.
    ///
    /// # Errors
    /// Where what was written could not be made durable, or something is left to recover.
    pub fn close(self) -> Result<()> {
        drop(self.space);
        self.chain.close()
    }
}

/// What others may ask an NBD server for: nothing that would end or change what it serves. A disk's they may
/// ask to go on in another layer, or with another size.
struct Answers {
    chain: Arc<OpenChain>,
    disk: Option<DiskServer>,
}

impl ControlHandler for Answers {
    fn handle(&self, verb: &str, args: Value) -> Result<Value> {
        match (verb, &self.disk) {
            (STATS | MAP | COPY_UP | KEEP_FREE, _) => self.chain.handle(verb, args),
            (SEAL_TOP | PREPARE_SEAL | REPLACE_SEALED, Some(_)) => self.chain.handle(verb, args),
            (GROW, Some(disk)) => {
                let grown = self.chain.handle(verb, args)?;
                disk.size_changed();
                Ok(grown)
            }
            (WHO, _) => encode(&Holder::current()),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                format!("a server of clients knows no command {verb:?}"),
            )),
        }
    }
}

/// What a name stands for.
struct Exported {
    target: Target,
    /// The container that is served itself. Several servers may have an image or a snapshot, so none of them
    /// answers for it.
    id: Option<Uuid>,
    /// The bytes that its device shows where they are fewer than the layers have.
    shown: Option<u64>,
    /// The container that it is of.
    container: Option<ContainerRecord>,
}

fn exported(store: &Store, name: &str) -> Result<Exported> {
    let no_container = match store.container(name) {
        Ok(container) => {
            let container = store.as_settled(container)?;
            return Ok(Exported {
                target: Target::of(&container),
                id: Some(container.id),
                shown: None,
                container: Some(container),
            });
        }
        Err(error) => error,
    };
    if let Some(found) = snapshot::find(store, name)? {
        return Ok(Exported {
            target: Target::Sealed(found.top()?),
            id: None,
            shown: found.snapshot.disk.device_size,
            container: Some(found.container),
        });
    }
    match store.image(name) {
        Ok(image) => Ok(Exported {
            target: Target::Sealed(image.top()?),
            id: None,
            shown: image.disk.device_size,
            container: None,
        }),
        Err(damaged) if damaged.kind() == ErrorKind::Corrupt => Err(damaged),
        Err(_) => Err(snapshot::nothing_called(store, name, no_container)),
    }
}

/// A chain that is about to be served.
struct Opened {
    chain: OpenChain,
    exported: Exported,
}

/// Opens what has a name: a container (to be written, unless the store cannot be), a snapshot or an image.
fn open(store: &Store, name: &str, read_only: bool) -> Result<Opened> {
    // Until all of them are open, the layers that the record names stay.
    let _pin = store.pin_layers()?;
    let exported = exported(store, name)?;
    let stats = Arc::new(ChainStats::default().counting(counts()));
    let chain = match &exported.target {
        // Who only reads changes no file of it.
        Target::Container(which) if read_only => Target::Look(which.clone()),
        other => other.clone(),
    }
    .open_counted(store, stats)?;
    if let Some(size) = exported.shown {
        chain.chain().show(size)?;
    }
    Ok(Opened { chain, exported })
}

/// Answers others about a container's chain.
fn answer(
    store: &Store,
    id: Option<Uuid>,
    chain: Arc<OpenChain>,
    disk: Option<DiskServer>,
) -> Serving {
    // In a store that cannot be written there is no place for a socket, and nothing is counted but
    // reads.
    let control = id.filter(|_| !store.is_read_only()).and_then(|id| {
        let socket = store.runs().socket_beside(id);
        let chain = chain.clone();
        ControlServer::start(&socket, Arc::new(Answers { chain, disk }))
            .inspect_err(|error| tracing::warn!(%error, "nobody can ask for counters"))
            .ok()
    });
    Serving {
        space: SpaceThread::start(chain.chain().clone()),
        _control: control,
        chain,
    }
}

/// The export of a container (writable, unless the store is not), a snapshot or an image (read-only) under
/// its name.
///
/// # Errors
/// [`vellum_base::ErrorKind::NotFound`] for a name that is neither; [`vellum_base::ErrorKind::InUse`] while the
/// container is mounted or served.
pub fn export(store: &Store, name: &str, read_only: bool) -> Result<(Export, Serving)> {
    let Opened { chain, exported } = open(store, name, read_only)?;
    let chain = Arc::new(chain);
    let mut export = Export::new(name, chain.chain().clone());
    export.read_only = read_only;
    export.contexts = contexts(store, &chain, exported.container.as_ref());
    Ok((export, answer(store, exported.id, chain, None)))
}

/// A server of a container (writable, unless the store is not), a snapshot or an image (read-only) as the disk
/// of a virtual machine, with so many queues.
///
/// # Errors
/// As [`export`] and [`DiskServer::new`].
pub fn disk(
    store: &Store,
    name: &str,
    read_only: bool,
    queues: u16,
) -> Result<(DiskServer, Serving)> {
    let Opened { chain, exported } = open(store, name, read_only)?;
    let chain = Arc::new(chain.for_long());
    let disk = Disk {
        device: chain.chain().clone(),
        serial: exported.target.id().simple().to_string(),
        read_only,
    };
    let server = DiskServer::new(disk, queues)?;
    let serving = answer(store, exported.id, chain, Some(server.clone()));
    Ok((server, serving))
}
