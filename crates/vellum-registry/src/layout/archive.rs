//! An OCI layout in a tar, which is read in place.

use std::fs::File;
use std::sync::Arc;

use vellum_image::OciArchive;

/// A tar that is a layout.
#[derive(Debug)]
pub(super) struct Archive {
    archive: OciArchive,
}

impl Archive {
    pub fn new(archive: OciArchive) -> Self {
        Archive { archive }
    }

    /// Where in the tar one of its files is: at which byte it begins, and how many it has. `None` where there is none.
    pub fn open(&self, name: &str) -> Option<(Arc<File>, u64, u64)> {
        let (at, len) = self.archive.find(name)?;
        Some((self.archive.file(), at, len))
    }
}
