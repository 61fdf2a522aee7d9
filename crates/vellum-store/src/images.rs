//! Images in the store.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::names::check_reference;
use super::prune::PruneReport;
use super::records::{ContainerRecord, ImageRecord};
use super::{Store, StoreGuard};
use vellum_base::error::{Error, ErrorKind, Result};

impl Store {
    /// All images, sorted by name.
    ///
    /// # Errors
    /// Where the directory cannot be read; a damaged record is left out with a warning.
    pub fn images(&self) -> Result<Vec<ImageRecord>> {
        let mut images: Vec<ImageRecord> = self.read_records("images", Store::warn_damaged)?;
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// The image of that name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], with what to do.
    pub fn image(&self, name: &str) -> Result<ImageRecord> {
        check_reference(name).map_err(|error| self.snapshot_hint(name).unwrap_or(error))?;
        self.read_json(&self.record_path("images", name))?
            .ok_or_else(|| {
                if let Some(error) = self.snapshot_hint(name) {
                    return error;
                }
                let hint = self.quarantine_hint("images", name).unwrap_or_else(|| {
                    "`vellum images` lists them, `vellum import` makes one".into()
                });
                Error::new(
                    ErrorKind::NotFound,
                    format!("there is no image {name}: {hint}"),
                )
            })
    }

    /// Checks that an image can take this name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a bad name, [`ErrorKind::AlreadyExists`] for a taken one.
    pub fn check_new_image(&self, name: &str) -> Result<()> {
        check_reference(name)?;
        if self
            .read_json::<ImageRecord>(&self.record_path("images", name))?
            .is_some()
        {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!(
                    "there is an image {name} already: remove it with `vellum rmi {name}` or take another name"
                ),
            ));
        }
        Ok(())
    }

    /// Adds an image. Its layers are published, and `_pin` has kept them.
    ///
    /// # Errors
    /// As [`Store::check_new_image`].
    pub fn put_image(&self, image: &ImageRecord, _pin: &StoreGuard) -> Result<()> {
        let _lock = self.lock()?;
        self.check_new_image(&image.name)?;
        self.write_json(&self.record_path("images", &image.name), image)
    }

    /// Gives an image one more name: another record of the same image, id, layers and all. Each name is
    /// removed by itself, and the layers stay while one is left. A name that is this image's already
    /// stays so.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] without such an image, [`ErrorKind::AlreadyExists`] where the name is
    /// another's, [`ErrorKind::InvalidInput`] for a bad one.
    pub fn tag_image(&self, name: &str, new: &str) -> Result<ImageRecord> {
        // Both in one step: an image that is there has its layers, and keeps them while it has a name.
        let _lock = self.lock()?;
        let mut image = self.image(name)?;
        check_reference(new)?;
        let there: Option<ImageRecord> = self.read_json(&self.record_path("images", new))?;
        if let Some(there) = there.filter(|there| there.id == image.id) {
            return Ok(there);
        }
        self.check_new_image(new)?;
        new.clone_into(&mut image.name);
        self.write_json(&self.record_path("images", new), &image)?;
        Ok(image)
    }

    /// Removes an image, or one of its names, and the layers that nothing else uses. Where the report
    /// says busy, other commands were at work on layers, and [`Store::prune`] removes these later.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] for the last name while containers are made from the image: the message
    /// names them.
    pub fn remove_image(&self, name: &str) -> Result<PruneReport> {
        let (each, collected) = self.remove_images(&[name.to_owned()])?;
        each.into_iter().collect::<Result<()>>()?;
        collected
    }

    /// As [`Store::remove_image`] for each of these; what all of them want to know is read once.
    /// Returns what became of each, and of the layers.
    ///
    /// # Errors
    /// Where the store's records cannot be read; then none is removed.
    pub fn remove_images(
        &self,
        names: &[String],
    ) -> Result<(Vec<Result<()>>, Result<PruneReport>)> {
        let mut layers = Vec::new();
        let each: Vec<Result<()>> = {
            let _lock = self.lock()?;
            let mut users = Users::new(&self.images()?, self.containers()?);
            let mut remove = |name: &String| {
                let image = self.remove_unused_image(name, &mut users)?;
                layers.extend(image.layers);
                Ok(())
            };
            names.iter().map(&mut remove).collect()
        };
        let collected = if each.iter().any(Result::is_ok) {
            self.collect_image_layers(&layers)
        } else {
            Ok(PruneReport::default())
        };
        Ok((each, collected))
    }

    /// Removes the layers of images that are gone, as far as nothing else uses them.
    fn collect_image_layers(&self, layers: &[Uuid]) -> Result<PruneReport> {
        let mut report = self.collect_layers(Vec::new())?;
        report.busy = report.busy && self.has_unnamed_layers(layers)?;
        Ok(report)
    }

    fn remove_unused_image(&self, name: &str, users: &mut Users) -> Result<ImageRecord> {
        let image = self.image(name)?;
        let last_name = users.names.get(&image.id).is_none_or(|count| *count <= 1);
        if let (Some(containers), true) = (users.containers.get(&image.id), last_name) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "the image {name} is in use by container {}: remove that first (`vellum rm {}`)",
                    containers.join(", "),
                    containers.join(" ")
                ),
            ));
        }
        let top = image.layers.last().copied();
        let shared = top.is_some_and(|top| users.images.get(&top).is_some_and(|count| *count > 1));
        if !shared && top.is_some_and(|top| self.has_readers(top)) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "the image {name} is in use by another process{}: stop its server, or \
                     wait for the `vellum diff` that reads it",
                    top.map_or(String::new(), |top| self.reader(top))
                ),
            ));
        }
        self.remove_json(&self.record_path("images", name))?;
        users.forget(&image);
        Ok(image)
    }
}

/// Who uses what.
struct Users {
    /// Containers' names by the id of the image that they are made from.
    containers: HashMap<Uuid, Vec<String>>,
    /// In how many images a layer is; each name of one counts.
    images: HashMap<Uuid, u64>,
    /// Names of images by their ids.
    names: HashMap<Uuid, u64>,
    /// The names that were counted: a record that could not be read when all were listed is not among them.
    counted: HashSet<String>,
}

impl Users {
    fn new(images: &[ImageRecord], containers: Vec<ContainerRecord>) -> Self {
        let mut users = Users {
            containers: HashMap::new(),
            images: HashMap::new(),
            names: HashMap::new(),
            counted: HashSet::new(),
        };
        for container in containers {
            let names = users.containers.entry(container.image_id).or_default();
            names.push(container.name);
        }
        for image in images {
            users.counted.insert(image.name.clone());
            *users.names.entry(image.id).or_default() += 1;
            for layer in &image.layers {
                *users.images.entry(*layer).or_default() += 1;
            }
        }
        users
    }

    /// The image is gone.
    fn forget(&mut self, image: &ImageRecord) {
        if !self.counted.remove(&image.name) {
            return;
        }
        let less = |count: &mut u64| {
            assert!(*count > 0, "an image that was not counted is forgotten");
            *count -= 1;
        };
        less(self.names.entry(image.id).or_default());
        for layer in &image.layers {
            less(self.images.entry(*layer).or_default());
        }
    }
}
