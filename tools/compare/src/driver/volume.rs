//! Drivers that need a file system of their own, which is made on a loop device for the run:
//! btrfs snapshots, XFS reflink copies.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Result;
use nix::sys::statvfs::statvfs;

use super::{About, Access, Base, Driver, Image, Kind, missing, not_in_kernel};
use crate::host::{self, Loop, Mount, copy_tree, sh};

/// The drivers of this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Volume {
    Btrfs,
    Xfs,
}

impl Driver for Volume {
    fn about(&self) -> About {
        match self {
            Volume::Btrfs => About {
                id: "btrfs",
                title: "btrfs",
                what: "A snapshot of a subvolume for each container, on a btrfs on a raw file.",
                kind: Kind::Files,
                brought: false,
            },
            Volume::Xfs => About {
                id: "xfs-reflink",
                title: "XFS reflink",
                what: "A copy of all files that shares their blocks (cp --reflink), on an XFS on \
                       a raw file.",
                kind: Kind::Files,
                brought: false,
            },
        }
    }

    fn absent(&self) -> Option<String> {
        match self {
            Volume::Btrfs => missing(&[("mkfs.btrfs", "btrfs-progs"), ("btrfs", "btrfs-progs")])
                .or_else(|| not_in_kernel("btrfs")),
            Volume::Xfs => missing(&[("mkfs.xfs", "xfsprogs")]).or_else(|| not_in_kernel("xfs")),
        }
    }

    fn version(&self) -> Option<String> {
        match self {
            Volume::Btrfs => super::kernel_and("mkfs.btrfs", "btrfs"),
            Volume::Xfs => super::kernel(),
        }
    }

    fn prepare(&self, dir: &Path, base: &Base) -> Result<()> {
        let file = dir.join("volume.img");
        // Sparse; room for copies of whole files when several containers rewrite them.
        File::create(&file)?.set_len(base.size * 2)?;
        let path = file.to_string_lossy();
        match self {
            Volume::Btrfs => sh("mkfs.btrfs", &["-q", "-f", &path])?,
            Volume::Xfs => sh("mkfs.xfs", &["-q", "-f", "-m", "reflink=1", &path])?,
        };
        let volume = Opened::new(*self, dir)?;
        for (number, layer) in base.layers.iter().enumerate() {
            let this = volume.path(&format!("layer-{number}"));
            match (self, number.checked_sub(1)) {
                (Volume::Btrfs, None) => {
                    sh("btrfs", &["subvolume", "create", &this.to_string_lossy()])?;
                }
                (_, Some(below)) => volume.copy(&format!("layer-{below}"), &this)?,
                (Volume::Xfs, None) => {}
            }
            copy_tree(layer, &this, &[])?;
        }
        fs::rename(
            volume.path(&format!("layer-{}", base.layers.len().saturating_sub(1))),
            volume.path("base"),
        )?;
        Ok(())
    }

    fn open(&self, dir: &Path) -> Result<Box<dyn Image>> {
        Ok(Box::new(Opened::new(*self, dir)?))
    }
}

/// The file system, mounted.
struct Opened {
    driver: Volume,
    mount: Mount,
    _device: Loop,
}

impl Opened {
    fn new(driver: Volume, dir: &Path) -> Result<Self> {
        let device = Loop::new(&dir.join("volume.img"))?;
        // As the ext4 of the other drivers: what is removed becomes a hole of the file below.
        let (kind, options) = match driver {
            Volume::Btrfs => ("btrfs", "discard=async"),
            Volume::Xfs => ("xfs", "discard"),
        };
        let arguments = ["-t", kind, "-o", options, device.device()];
        let mount = Mount::new(&dir.join("volume"), Path::new("/"), &arguments)?;
        Ok(Opened {
            driver,
            mount,
            _device: device,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.mount.dir().join(name)
    }

    fn copy(&self, from: &str, to: &Path) -> Result<()> {
        let from = self.path(from);
        match self.driver {
            Volume::Btrfs => sh(
                "btrfs",
                &[
                    "subvolume",
                    "snapshot",
                    &from.to_string_lossy(),
                    &to.to_string_lossy(),
                ],
            )
            .map(drop),
            Volume::Xfs => copy_tree(&from, to, &["--reflink=always"]),
        }
    }
}

impl Image for Opened {
    fn create(&mut self, name: &str) -> Result<()> {
        self.copy("base", &self.path(&format!("c-{name}")))
    }

    fn start(&mut self, name: &str) -> Result<Access> {
        Ok(Access::Dir(self.path(&format!("c-{name}"))))
    }

    fn fork(&mut self, name: &str, new: &str) -> Result<()> {
        self.copy(&format!("c-{name}"), &self.path(&format!("c-{new}")))?;
        host::sync_fs(self.mount.dir())
    }

    fn stop(&mut self, _name: &str) -> Result<()> {
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<()> {
        let path = self.path(&format!("c-{name}"));
        match self.driver {
            Volume::Btrfs => {
                sh("btrfs", &["subvolume", "delete", &path.to_string_lossy()]).map(drop)
            }
            Volume::Xfs => Ok(fs::remove_dir_all(path)?),
        }
    }

    fn servers(&self, _name: &str) -> Vec<u32> {
        Vec::new()
    }

    fn used(&self) -> Result<u64> {
        host::sync_fs(self.mount.dir())?;
        let stat = statvfs(self.mount.dir())?;
        Ok((stat.blocks() - stat.blocks_free()) * stat.fragment_size())
    }
}
