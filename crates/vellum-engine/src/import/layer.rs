//! One layer of an import: a file system that is filled, and laid out anew.

use std::path::Path;
use std::sync::Arc;

use super::{Ground, Importer, LayerOutcome};
use crate::canonical;
use crate::complete::finish_layer;
use crate::device::{OpenChain, Target, forget_ext4_journal};
use crate::seal::sync_file_system;
use crate::staged::open_staged;
use crate::temporary::TemporaryMount;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_core::layer::WritableLayer;
use vellum_fs::ext4;
use vellum_image::Aside;
use vellum_store::{LayerInfo, StagedLayer};

impl Importer<'_> {
    /// Makes one layer: `fill` writes into the mounted file system, but for what new files hold.
    pub(super) fn layer(
        &self,
        ground: &Ground,
        origin: String,
        diff_id: Option<String>,
        chain_key: Option<String>,
        fill: impl FnOnce(&Path, &mut Aside) -> Result<()>,
    ) -> Result<LayerOutcome> {
        let staged = self
            .store
            .stage_layer(Some(ground.top()), ground.virtual_size)?;
        let target = Target::Staged(staged.header.uuid);
        let mount = TemporaryMount::new(self.store, &target)?;
        let mut aside = self.aside(ground)?;
        fill(mount.dir(), &mut aside)
            .map_err(|error| self.name_the_limit(error, mount.dir(), ground))?;
        mount.end()?;
        let open = target.open(self.store)?;
        let laid = canonical::lay_out(self.store, ground.top(), &open, &aside)?;
        let (staged, layer) = match laid {
            Some(laid) => {
                drop(open);
                laid
            }
            None => self.as_filled(ground, staged, open, &aside)?,
        };
        drop(aside);
        let bytes = layer.data_blocks().bytes();
        let info = LayerInfo {
            origin,
            diff_id: diff_id.clone(),
            chain_key,
            bytes,
            damaged: None,
        };
        let layer = finish_layer(staged, layer, info, self.pin)?;
        Ok(LayerOutcome {
            diff_id,
            layer,
            existed: false,
            bytes,
        })
    }

    /// Where the contents of a new layer's files are kept until they are laid out: as much as its file system can hold.
    fn aside(&self, ground: &Ground) -> Result<Aside> {
        let staging = self.store.root().join("staging");
        let spool = tempfile::tempfile_in(&staging)
            .context(|| format!("making a file without a name in {}", staging.display()))?;
        Ok(Aside::new(spool, ground.virtual_size))
    }

    /// The layer as the kernel filled it, with the contents that are aside.
    fn as_filled(
        &self,
        ground: &Ground,
        staged: StagedLayer,
        open: OpenChain,
        aside: &Aside,
    ) -> Result<(StagedLayer, Arc<WritableLayer>)> {
        let target = Target::Staged(staged.header.uuid);
        let open = if aside.is_empty() {
            open
        } else {
            open.close()?;
            drop(open);
            let mount = TemporaryMount::new(self.store, &target)?;
            aside
                .write_back(mount.dir())
                .map_err(|error| self.name_the_limit(error, mount.dir(), ground))?;
            mount.end()?;
            target.open(self.store)?
        };
        forget_ext4_journal(&open)?;
        open.close()?;
        // It was not to stay, so nothing of it is durable yet.
        sync_file_system(&staged.dir())?;
        let layer = open_staged(self.store, &staged)?;
        Ok((staged, layer))
    }

    /// Says which of its limits the file system at `dir` has reached, and what to do.
    fn name_the_limit(&self, error: Error, dir: &Path, ground: &Ground) -> Error {
        let Ok(usage) = ext4::usage(dir) else {
            return error;
        };
        if error.kind() != ErrorKind::NoSpace {
            return error;
        }
        let size = ground.virtual_size;
        let remedy = match ground.has_image {
            true => "import the image that --from names anew with a larger --size",
            false => "give a larger --size",
        };
        if usage.files_used >= usage.files {
            return error.context(format!(
                "the image's file system of {size} bytes has {} inodes, one for each file and \
                 directory, and all are in use: {remedy}",
                usage.files
            ));
        }
        if usage.free < (size / 100).max(1 << 20) {
            return error.context(format!(
                "the image's file system of {size} bytes is full: {remedy}"
            ));
        }
        match nix::sys::statvfs::statvfs(self.store.root()) {
            Ok(disk) if disk.blocks_available() * disk.fragment_size() < 16 << 20 => {
                error.context(format!(
                    "the disk of the store {} is full",
                    self.store.root().display()
                ))
            }
            _ => error,
        }
    }
}
