//! Images in the store.

use super::names::check_reference;
use super::records::ImageRecord;
use super::{Store, StoreGuard};
use crate::error::{Error, ErrorKind, Result};

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

    /// Removes an image, and the layers that nothing else uses.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while containers are made from it: the message names them.
    pub fn remove_image(&self, name: &str) -> Result<()> {
        {
            let _lock = self.lock()?;
            let image = self.image(name)?;
            let users: Vec<String> = self
                .containers()?
                .into_iter()
                .filter(|container| container.image_id == image.id)
                .map(|container| container.name)
                .collect();
            if !users.is_empty() {
                return Err(Error::new(
                    ErrorKind::InUse,
                    format!(
                        "the image {name} is in use by container {}: remove that first (`vellum rm {}`)",
                        users.join(", "),
                        users.join(" ")
                    ),
                ));
            }
            let top = image.layers.last().copied();
            let mut others = self.images()?.into_iter();
            let shared = others.any(|other| {
                other.id != image.id && top.is_some_and(|top| other.layers.contains(&top))
            });
            if !shared && top.is_some_and(|top| self.has_readers(top)) {
                return Err(Error::new(
                    ErrorKind::InUse,
                    format!(
                        "the image {name} is in use by another process: stop its NBD server, or \
                         wait for the `vellum diff` that reads it"
                    ),
                ));
            }
            self.remove_json(&self.record_path("images", name))?;
        }
        self.collect_layers().map(drop)
    }
}
