//! What is exported: an image, a snapshot, or a container as it is now.

use uuid::Uuid;

use super::super::complete::complete_layer;
use super::super::device::{OpenChain, Target};
use super::super::diff::foreign;
use super::super::mount_point::mounted;
use super::super::seal::{How, seal_container};
use super::super::teardown::take_over;
use super::super::temporary::TemporaryMount;
use super::super::{lock_container, snapshot};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::Held;
use vellum_core::layer::SealedLayer;
use vellum_image::{Foreign, ImageConfig};
use vellum_store::{
    ContainerRecord, ContainerRef, DiskInfo, ImageRecord, Scaffold, Store, StoreGuard, now,
};

/// Layers that are exported, which stay as they are meanwhile.
pub(crate) struct Subject<'a> {
    pub store: &'a Store,
    pub name: String,
    /// The sealed layers, from the bottom up.
    pub layers: Vec<Uuid>,
    /// A container whose writable layer lies above them.
    pub container: Option<ContainerRef>,
    pub config: ImageConfig,
    /// It is an image: its configuration has a step for each of its layers.
    pub is_image: bool,
    /// When it became what it is, RFC 3339.
    pub created: String,
    pub disk: DiskInfo,
    scaffold: Scaffold,
    // Given back in this order.
    _pin: Option<StoreGuard>,
    _busy: Option<Box<dyn Held>>,
}

/// One state of the subject: up to one of its layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Up to this sealed layer.
    Sealed(Uuid),
    /// With the container's writable layer.
    Now,
}

/// True where the writable layer of a container that is not mounted says nothing: what lies below is all of it.
///
/// # Errors
/// [`ErrorKind::InUse`] while an NBD server has it.
fn says_nothing(store: &Store, container: &ContainerRecord) -> Result<bool> {
    let top = store.resolve(container)?.top;
    let _lease = store.lease_for_reading(top)?;
    let top = SealedLayer::open_unsealed(&**store.storage(), &store.layer_dir(top))?;
    let mut nothing = true;
    top.for_each_run(|_| nothing = false)?;
    Ok(nothing)
}

impl<'a> Subject<'a> {
    /// Finds what `name` means: a container, a snapshot as `C@NAME`, else an image. A container that is
    /// mounted is sealed as by a commit, and goes on; where all layers are to be `sealed`, any is.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a name that is none of them; [`ErrorKind::InUse`] while an NBD server has
    /// the container.
    pub fn find(store: &'a Store, name: &str, sealed: bool) -> Result<Subject<'a>> {
        let no_container = match store.container(name) {
            Ok(container) => return Subject::of_container(store, container, sealed),
            Err(error) => error,
        };
        // Before it is looked at, so that what it names stays.
        let pin = Some(store.pin_layers()?);
        if let Some(found) = snapshot::find(store, name)? {
            return Ok(Subject::of_snapshot(store, name, found, pin));
        }
        match store.image(name) {
            Ok(image) => Subject::of_image(store, image, pin),
            Err(damaged) if damaged.kind() == ErrorKind::Corrupt => Err(damaged),
            Err(_) => Err(snapshot::nothing_called(store, name, no_container)),
        }
    }

    fn of_image(
        store: &'a Store,
        image: ImageRecord,
        pin: Option<StoreGuard>,
    ) -> Result<Subject<'a>> {
        image.top()?;
        Ok(Subject {
            store,
            name: image.name,
            layers: image.layers,
            container: None,
            created: image.config.created.clone().unwrap_or(image.created),
            config: image.config,
            is_image: true,
            disk: image.disk,
            scaffold: Scaffold::default(),
            _pin: pin,
            _busy: None,
        })
    }

    fn of_snapshot(
        store: &'a Store,
        name: &str,
        found: snapshot::Found,
        pin: Option<StoreGuard>,
    ) -> Subject<'a> {
        Subject {
            store,
            name: name.to_owned(),
            layers: found.layers,
            container: None,
            config: found.container.config,
            is_image: false,
            created: found.snapshot.created,
            disk: found.snapshot.disk,
            scaffold: found.snapshot.scaffold,
            _pin: pin,
            _busy: None,
        }
    }

    fn of_container(
        store: &'a Store,
        container: ContainerRecord,
        sealed: bool,
    ) -> Result<Subject<'a>> {
        if store.is_read_only() {
            let layers = store.resolve(&container)?.sealed;
            return Ok(Subject::of_record(store, container, layers, None, None));
        }
        let (container, busy) = lock_container(store, &container)?;
        let pin = store.pin_layers()?;
        take_over(store, &container)?;
        if mounted(store, &container)?.is_none() && (!sealed || says_nothing(store, &container)?) {
            let layers = store.resolve(&container)?.sealed;
            let (pin, busy) = (Some(pin), Some(busy));
            let subject = Subject::of_record(store, container, layers, pin, busy);
            return Ok(match sealed {
                false => subject,
                true => Subject {
                    container: None,
                    ..subject
                },
            });
        }
        let sealing = seal_container(store, &container, How::Frozen, None, &pin)?;
        complete_layer(store, sealing.layer)?;
        let mut info = store.layer_info(sealing.layer)?;
        info.origin = format!("vellum export {}", container.name);
        store.set_layer_info(sealing.layer, &info)?;
        // What was sealed stays, whatever becomes of the container: others need not wait for us.
        drop(busy);
        let layers = sealing.container.layers.clone();
        let subject = Subject::of_record(store, sealing.container, layers, Some(pin), None);
        Ok(Subject {
            container: None,
            ..subject
        })
    }

    fn of_record(
        store: &'a Store,
        container: ContainerRecord,
        layers: Vec<Uuid>,
        pin: Option<StoreGuard>,
        busy: Option<Box<dyn Held>>,
    ) -> Subject<'a> {
        Subject {
            store,
            container: Some((&container).into()),
            name: container.name,
            layers,
            config: container.config,
            is_image: false,
            created: now(),
            disk: container.disk,
            scaffold: container.scaffold,
            _pin: pin,
            _busy: busy,
        }
    }

    /// Its states from the lowest layer up; the last is what it is.
    pub fn states(&self) -> Vec<State> {
        let sealed = self.layers.iter().copied().map(State::Sealed);
        let now = self.container.iter().map(|_| State::Now);
        sealed.chain(now).collect()
    }

    fn target(&self, state: State) -> Result<Target> {
        match (state, &self.container) {
            (State::Sealed(layer), _) => Ok(Target::Sealed(layer)),
            (State::Now, Some(container)) => Ok(Target::Look(container.clone())),
            (State::Now, None) => Err(Error::internal("sealed layers have no writable one above")),
        }
    }

    /// Opens the chain of a state, to be read.
    pub fn open(&self, state: State) -> Result<OpenChain> {
        self.target(state)?.open(self.store)
    }

    /// The last state: what is exported.
    pub fn whole(&self) -> Result<State> {
        let state = self.states().pop();
        state.ok_or_else(|| Error::internal("an export without a layer"))
    }

    /// Opens the chain of the whole, with the bytes that its device shows.
    pub fn open_whole(&self) -> Result<OpenChain> {
        let open = self.open(self.whole()?)?;
        let chain = open.chain();
        chain.show(self.disk.shown_of(chain.whole_size()))?;
        Ok(open)
    }

    /// Mounts the files of a state, to be read.
    pub fn mount(&self, state: State) -> Result<TemporaryMount> {
        match (state, &self.container) {
            (State::Now, Some(container)) => {
                TemporaryMount::of_container(self.store, &self.store.find_container(container)?)
            }
            (State::Sealed(layer), _) => TemporaryMount::of_image(self.store, layer),
            (State::Now, None) => self
                .target(state)
                .and_then(|target| TemporaryMount::new(self.store, &target)),
        }
    }

    /// What running a container made in it.
    pub fn foreign(&self) -> Foreign {
        foreign(&self.scaffold)
    }

    /// Refuses formats of files for a disk that holds none.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`].
    pub fn need_files(&self) -> Result<()> {
        if self.disk.fs.is_some() {
            return Ok(());
        }
        let holds = self.disk.holds.as_deref().unwrap_or("something unknown");
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{} holds {holds}, and no ext4 that could be mounted: give --format raw or qcow2",
                self.name
            ),
        ))
    }
}
