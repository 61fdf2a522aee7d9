//! `vellum load`: the images of an OCI archive, by the names that they have in it.

use std::path::{Path, PathBuf};

use serde::Serialize;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_image::OciArchive;
use vellum_registry::Place;
use vellum_store::Store;

use super::super::watch::Watch;
use super::pull::{PullOptions, PullReport, platform, take};

/// What a load made.
#[derive(Debug, Clone, Serialize)]
pub struct LoadReport {
    /// Each image.
    pub images: Vec<PullReport>,
}

/// Makes the images of the OCI archive `source`, `-` for standard input: of block layers where it has them, else of tars,
/// which are unpacked. Encrypted layers are read by these identities, or those that
/// [`vellum_registry::Identities::find`] finds. An image is there when all of it is and was checked; those before it stay where one fails.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] for a name, before anything is done; [`ErrorKind::InvalidInput`] where nothing in it has a
/// name; [`ErrorKind::Corrupt`]; as [`OciArchive::open`] and [`super::pull()`].
pub fn load(
    store: &Store,
    source: &Path,
    identities: &[PathBuf],
    watch: &dyn Watch,
) -> Result<LoadReport> {
    store.check_space_for("image")?;
    let shown = source.display().to_string();
    let archive = OciArchive::open(source, &store.root().join("staging"))?;
    let place = Place::of_archive(archive, &shown)?;
    let options = PullOptions {
        identities: identities.to_vec(),
        ..PullOptions::default()
    };
    let platform = platform(&options);
    let named = place.named(&platform)?;
    if named.is_empty() {
        let text = format!(
            "nothing in {shown} has a name: `vellum import NAME {shown}` gives an image one, and takes its tars"
        );
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    for image in &named {
        store.check_new_image(&image.name)?;
    }
    let mut images = Vec::new();
    for image in named {
        let loaded = place
            .find_digest(&image.digest, &platform)
            .and_then(|found| take(store, &place, found, &image.name, &options, watch));
        images.push(
            loaded
                .map_err(|error| error.context(format!("loading {} from {shown}", image.name)))?,
        );
    }
    Ok(LoadReport { images })
}
