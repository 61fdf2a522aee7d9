//! Containers in the store.

use std::path::PathBuf;
use std::time::SystemTime;

use uuid::Uuid;

use super::container_snapshots::ContainerSnapshot;
use super::names::{check_name, check_reference};
use super::prune::PruneReport;
use super::records::{ContainerRecord, DiskInfo, ImageRecord, LastRun, LayerInfo, RunEnd};
use super::rename::ContainerRef;
use super::{Store, StoreGuard};
use vellum_base::block::BLOCK_SIZE;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_base::moment::rfc3339;
use vellum_core::chain::ChainSpec;
use vellum_core::layer::{Header, LayerOptions};
use vellum_fs::ext4::Atime;

/// What a new container is made of.
#[derive(Debug, Clone, Default)]
pub struct NewContainer<'a> {
    /// The image's name.
    pub image: &'a str,
    /// The container's name; one is made up where it is `None`.
    pub name: Option<&'a str>,
    /// Size in bytes, which becomes whole blocks where it is another than the image's; the image's where it is
    /// `None`. Never smaller than that.
    pub virtual_size: Option<u64>,
    /// What appears in it when it runs.
    pub volumes: Vec<super::VolumeMount>,
    /// Access times of its files; the default where it is `None`.
    pub atime: Option<Atime>,
    /// What it may do and use when it runs.
    pub confinement: super::Confinement,
}

/// The layers of a container as they stand now, a commit that was cut off included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// Sealed layers, from the bottom up.
    pub sealed: Vec<Uuid>,
    /// The writable layer.
    pub top: Uuid,
}

impl Store {
    /// All containers, sorted by name.
    ///
    /// # Errors
    /// Where the directory cannot be read; a damaged record is left out with a warning.
    pub fn containers(&self) -> Result<Vec<ContainerRecord>> {
        let mut containers = self.container_records(Store::warn_damaged)?;
        containers.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(containers)
    }

    /// The container of that name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], with what to do.
    pub fn container(&self, name: &str) -> Result<ContainerRecord> {
        let checked = check_name("container", name);
        if checked.is_ok()
            && let Some(container) = self.named_container(name)?
        {
            return Ok(container);
        }
        if let Some(error) = self.snapshot_hint(name) {
            return Err(error);
        }
        let absent = |hint: &str| format!("there is no container {name}: {hint}");
        let quarantined = self.quarantine_hint("containers", name);
        let text = match quarantined.map(|hint| absent(&hint)) {
            None => self.name_of_another_kind(name),
            quarantined => quarantined,
        };
        let (kind, text) = match (checked, text) {
            (Ok(()), Some(text)) => (ErrorKind::NotFound, text),
            (Err(bad), Some(text)) => (bad.kind(), text),
            (Err(bad), None) => return Err(bad),
            (Ok(()), None) => {
                let hint = "`vellum ps` lists them, `vellum create` makes one";
                (ErrorKind::NotFound, absent(hint))
            }
        };
        Err(Error::new(kind, text))
    }

    /// Why a name is none of a container, where it is that of a snapshot of one, or of an image.
    fn name_of_another_kind(&self, name: &str) -> Option<String> {
        let is_image = check_reference(name).is_ok()
            && self
                .read_json::<ImageRecord>(&self.record_path("images", name))
                .is_ok_and(|image| image.is_some());
        if is_image {
            return Some(format!(
                "{name} is an image, and a container is wanted: `vellum create {name}` makes one of it"
            ));
        }
        let (owner, snapshot) = name.split_once('@')?;
        check_name("container", owner).ok()?;
        let owner = self.named_container(owner).ok()??;
        Some(match owner.snapshot(snapshot) {
            Ok(_) => format!(
                "{name} is a snapshot, and a container is wanted: `vellum fork {} NEW --from {snapshot}` makes one of \
                 it",
                owner.name
            ),
            Err(no_snapshot) => no_snapshot.to_string(),
        })
    }

    /// Makes a container: an empty writable layer on the image's. Copies nothing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for the image, [`ErrorKind::AlreadyExists`] for the name,
    /// [`ErrorKind::InvalidInput`] for a size smaller than the image's; as [`Store::check_space_for`].
    pub fn create_container(&self, new: &NewContainer<'_>) -> Result<ContainerRecord> {
        self.check_space_for("container")?;
        let pin = self.pin_layers()?;
        let image = self.image(new.image)?;
        if let Some(name) = new.name {
            self.check_new_container(name)?;
        }
        let shown = image.disk.shown();
        // To name the size that it would have anyhow makes it no larger.
        let wanted = new.virtual_size.filter(|size| *size != shown);
        let wanted = wanted.map(|size| size.next_multiple_of(BLOCK_SIZE));
        let virtual_size = wanted.unwrap_or(image.disk.virtual_size);
        if virtual_size < shown {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{virtual_size} bytes is smaller than the image {} ({} bytes): a container can \
                     only be larger",
                    image.name, shown
                ),
            ));
        }
        let fixed = image.disk.fs.as_ref().and_then(|fs| fs.fixed.as_ref());
        if let (Some(why), true) = (fixed, wanted.is_some()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the image {} cannot be made larger than its {} bytes, since {why}: leave \
                     --size out",
                    image.name, shown
                ),
            ));
        }
        let staged = self.stage_layer(Some(image.top()?), virtual_size)?;
        // Later the layer would be left to prune.
        interrupt::check()?;
        let placed = staged.place(&LayerInfo::writable(), &pin)?;

        let _lock = self.lock()?;
        // It may have been removed meanwhile.
        let image = self.image(new.image)?;
        let name = match new.name {
            Some(name) => name.to_owned(),
            None => self.free_name(&image.name)?,
        };
        self.check_new_container(&name)?;
        let record = ContainerRecord {
            name,
            id: Uuid::new_v4(),
            image: image.name,
            image_id: image.id,
            layers: image.layers,
            top: placed.uuid,
            next: None,
            next_snapshot: None,
            snapshots: Vec::new(),
            at: None,
            disk: DiskInfo {
                virtual_size,
                device_size: image.disk.device_size.filter(|_| wanted.is_none()),
                ..image.disk
            },
            config: image.config,
            volumes: new.volumes.clone(),
            scaffold: super::Scaffold::default(),
            atime: new.atime,
            confinement: new.confinement.clone(),
            last_run: None,
            created: now(),
        };
        let path = self.record_path("containers", &record.name);
        self.write_json_naming(&path, &record, Some(&placed))?;
        Ok(record)
    }

    pub(super) fn check_new_container(&self, name: &str) -> Result<()> {
        check_name("container", name)?;
        if self.named_container(name)?.is_some() {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!(
                    "there is a container {name} already: remove it with `vellum rm {name}` or take another name"
                ),
            ));
        }
        Ok(())
    }

    /// A name for a container that got none: the image's last word and a number.
    fn free_name(&self, image: &str) -> Result<String> {
        let word: String = image
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || "_-".contains(*c))
            .collect();
        let word = if word.is_empty() {
            "container".to_owned()
        } else {
            word
        };
        let taken = self.containers()?;
        (1u32..)
            .map(|number| format!("{word}-{number}"))
            .find(|name| taken.iter().all(|container| container.name != *name))
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "no free container name"))
    }

    /// The layers of a container as they stand on disk.
    ///
    /// # Errors
    /// Where the top layer's header cannot be read.
    pub fn resolve(&self, container: &ContainerRecord) -> Result<Resolved> {
        let mut sealed = container.layers.clone();
        if let Some(next) = container.next {
            let header = Header::read(&*self.storage, &self.layer_dir(container.top))?;
            if header.sealed {
                sealed.push(container.top);
                return Ok(Resolved { sealed, top: next });
            }
        }
        Ok(Resolved {
            sealed,
            top: container.top,
        })
    }

    /// The top layer of the image that a container was made from, while that image is there.
    ///
    /// # Errors
    /// Where the images cannot be listed.
    pub fn image_of(&self, container: &ContainerRecord) -> Result<Option<Uuid>> {
        let images = self.images()?;
        let image = images
            .into_iter()
            .find(|image| image.id == container.image_id);
        Ok(image.and_then(|image| image.layers.last().copied()))
    }

    /// How to open a container's chain for writing. Hold the lease of [`Resolved::top`] before.
    pub fn chain_spec(&self, resolved: &Resolved, options: LayerOptions) -> ChainSpec {
        ChainSpec {
            sealed: self.layer_dirs(&resolved.sealed),
            top: Some(self.layer_dir(resolved.top)),
            options,
        }
    }

    /// Prepares a commit or a snapshot: makes the layer that the container goes on in, and notes it, and
    /// what is to be kept. Sealing the top is then the step that decides; before it, nothing has changed.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where the container is gone.
    pub fn prepare_commit(
        &self,
        name: &str,
        snapshot: Option<ContainerSnapshot>,
        pin: &StoreGuard,
    ) -> Result<(ContainerRecord, Resolved)> {
        let mut record = self.settle(name)?;
        let staged = self.stage_layer(Some(record.top), record.disk.virtual_size)?;
        let next = staged.place(&LayerInfo::writable(), pin)?;
        let _lock = self.lock()?;
        if snapshot.is_some() {
            self.allow_snapshots()?;
        }
        record.next = Some(next.uuid);
        record.next_snapshot = snapshot;
        self.write_json_naming(&self.record_path("containers", name), &record, Some(&next))?;
        let resolved = self.resolve(&record)?;
        Ok((record, resolved))
    }

    /// Brings a container's record up to date with a commit or a growth that came to its end or was cut
    /// off.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn settle(&self, name: &str) -> Result<ContainerRecord> {
        let _lock = self.lock()?;
        let record = self.container(name)?;
        let size = self.size_of(&record);
        match &size {
            Ok(size) if record.next.is_some() || *size > record.disk.virtual_size => {}
            Err(_) if record.next.is_some() => {}
            // Whoever opens a damaged layer says so; it can be removed as it is.
            _ => return Ok(record),
        }
        let size = size?;
        let mut settled = self.as_settled(record)?;
        if size > settled.disk.virtual_size {
            settled.disk.virtual_size = size;
            settled.disk.device_size = None;
        }
        self.write_json(&self.record_path("containers", name), &settled)?;
        Ok(settled)
    }

    /// Lets the device of a container that ends within its last block show all of that, durably, from when it is
    /// opened next or [grows](vellum_core::chain::Chain::grow).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where the container is gone; where the host fails.
    pub fn show_last_block(&self, name: &str) -> Result<()> {
        let _lock = self.lock()?;
        let mut record = self.container(name)?;
        record.disk.device_size = None;
        self.write_json(&self.record_path("containers", name), &record)
    }

    /// Bytes of a container's layers: what the header of its writable layer says. The record follows it
    /// when it is [settled](Store::settle).
    ///
    /// # Errors
    /// As [`Store::resolve`]; where that header cannot be read.
    pub fn size_of(&self, container: &ContainerRecord) -> Result<u64> {
        let top = self.resolve(container)?.top;
        Ok(Header::read(&*self.storage, &self.layer_dir(top))?.virtual_size)
    }

    /// A container's record as [`Store::settle`] would write it.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn as_settled(&self, mut record: ContainerRecord) -> Result<ContainerRecord> {
        let resolved = self.resolve(&record)?;
        let sealed = resolved.top != record.top;
        record.layers = resolved.sealed;
        record.top = resolved.top;
        record.next = None;
        if let Some(snapshot) = record.next_snapshot.take()
            && sealed
        {
            record.keep_snapshot(snapshot)?;
        }
        Ok(record)
    }

    /// Notes how a container is run, as this record says; nothing else of its record changes.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where it was removed; where the host fails.
    pub fn configure_container(&self, record: &ContainerRecord) -> Result<()> {
        let _lock = self.lock()?;
        let mut now = self.find_locked(&record.into())?;
        now.config = record.config.clone();
        self.write_json(&self.record_path("containers", &now.name), &now)
    }

    /// Notes that a container's command begins to run.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where it was removed; where the host fails.
    pub fn begin_run(&self, container: &ContainerRef) -> Result<()> {
        self.note_run(container, |_| {
            Some(LastRun {
                began: now(),
                ended: None,
            })
        })
    }

    /// Notes how a container's command ended, unless its end is noted already.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub fn end_run(&self, container: &ContainerRef, status: u8) -> Result<()> {
        self.note_run(container, |run| {
            let mut run = run?;
            run.ended
                .get_or_insert_with(|| RunEnd { at: now(), status });
            Some(run)
        })
    }

    fn note_run(
        &self,
        container: &ContainerRef,
        change: impl FnOnce(Option<LastRun>) -> Option<LastRun>,
    ) -> Result<()> {
        let _lock = self.lock()?;
        let mut record = self.find_locked(container)?;
        record.last_run = change(record.last_run);
        self.write_json(&self.record_path("containers", &record.name), &record)
    }

    /// Replaces a container's record, by whoever has its lock and has read it since. It keeps the name that it
    /// has by now, whatever this one says.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where it was removed; where the host fails.
    pub fn update_container(&self, record: &ContainerRecord) -> Result<()> {
        let _lock = self.lock()?;
        let name = self.find_locked(&record.into())?.name;
        let path = self.record_path("containers", &name);
        let record = ContainerRecord {
            name,
            ..record.clone()
        };
        self.write_json(&path, &record)
    }

    /// Removes a container with its writable layer. It is not mounted or served. The report says busy
    /// where other commands were at work on layers, so that some of the container's were left to
    /// [`Store::prune`].
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while some process writes its layer.
    pub fn remove_container(&self, name: &str) -> Result<PruneReport> {
        let (layers, own) = {
            let _lock = self.lock()?;
            let record = self.container(name)?;
            let top = self.layer_dir(self.resolve(&record)?.top);
            if self.is_leased(&top) {
                return Err(Error::new(
                    ErrorKind::InUse,
                    format!(
                        "the container {name} is in use by another process{}: stop its server or unmount it first (`vellum umount {name}`)",
                        self.lease_holder(&top)
                    ),
                ));
            }
            self.remove_json(&self.record_path("containers", name))?;
            let run = self.run_dir(&record);
            self.storage
                .remove_tree(run.path())
                .context(|| format!("cannot remove {run}"))?;
            let own = self.trash_own_layers(&record)?;
            (record.layers, own)
        };
        let mut report = self.collect_layers(own)?;
        report.busy = report.busy && self.has_unnamed_layers(&layers)?;
        Ok(report)
    }

    /// Moves the layers that were a container's alone to the trash, once its record is gone. Unlike
    /// others that no record names, nobody can be about to name them: that would be a commit of this
    /// container, and whoever removes it has locked it.
    fn trash_own_layers(&self, record: &ContainerRecord) -> Result<Vec<PathBuf>> {
        // Where a record cannot be read, it may name any of them.
        let Some(used) = self.used_layers()? else {
            return Ok(Vec::new());
        };
        let mut trashed = Vec::new();
        for layer in std::iter::once(record.top).chain(record.next) {
            if !used.contains(&layer) && !self.is_leased(&self.layer_dir(layer)) {
                trashed.extend(self.trash_layer(layer)?);
            }
        }
        Ok(trashed)
    }
}

/// The time as RFC 3339 in UTC, to the second.
pub fn now() -> String {
    rfc3339(SystemTime::now())
}
