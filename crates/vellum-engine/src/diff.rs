//! What a container changed, by paths.

use super::lock_container;
use super::mount_point::mounted;
use super::teardown::take_over;
use super::temporary::TemporaryMount;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_image::{Change, Foreign, diff_trees_but};
use vellum_store::{Scaffold, Store};

/// The paths by which a container differs from its image, sorted. Looking changes neither.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where the image holds no ext4; [`ErrorKind::InUse`] while an NBD
/// server has the container.
pub fn diff(store: &Store, name: &str) -> Result<Vec<Change>> {
    let container = store.container(name)?;
    let _busy = lock_container(store, &container)?;
    let _pin = store.pin_layers()?;
    // The image's own top: commits may have put layers of the container above it.
    let image_top = store
        .image_of(&container)?
        .filter(|_| container.disk.fs.is_some());
    let image_top = image_top.ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!("the image of {name} holds no ext4"),
        )
    })?;
    let foreign = foreign(&container.scaffold);
    take_over(store, &container)?;
    let lower = TemporaryMount::of_image(store, image_top)?;
    let changes = match mounted(store, &container)? {
        Some(mount) => diff_trees_but(lower.dir(), &mount.dir, &foreign)?,
        None => {
            let upper = TemporaryMount::of_container(store, &container)?;
            let changes = diff_trees_but(lower.dir(), upper.dir(), &foreign)?;
            upper.end()?;
            changes
        }
    };
    lower.end()?;
    Ok(changes)
}

/// What running the container made in it.
fn foreign(scaffold: &Scaffold) -> Foreign {
    let points = scaffold.points.iter();
    let touched = scaffold.touched.iter();
    Foreign {
        points: points
            .map(|point| (point.path.clone(), point.directory))
            .collect(),
        times: touched
            .map(|touched| (touched.path.clone(), touched.after))
            .collect(),
    }
}
