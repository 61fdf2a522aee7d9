//! Drivers that share files of the host's file system: overlayfs, fuse-overlayfs, full copies.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use nix::sys::signal::Signal;

use super::{About, Access, Base, Driver, Image, Kind, missing, not_in_kernel};
use crate::host::{self, Mount, Server, allocated, copy_tree, is_mounted};

/// The drivers of this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileLevel {
    Overlay,
    FuseOverlay,
    Copy,
}

impl Driver for FileLevel {
    fn about(&self) -> About {
        match self {
            FileLevel::Overlay => About {
                id: "overlayfs",
                title: "overlayfs",
                what: "File-level, in the kernel, what Docker uses by default: a file is copied \
                       whole when it is first opened for writing.",
                kind: Kind::Files,
                brought: false,
            },
            FileLevel::FuseOverlay => About {
                id: "fuse-overlayfs",
                title: "fuse-overlayfs",
                what: "The same in user space, what rootless Podman uses on older kernels.",
                kind: Kind::Files,
                brought: false,
            },
            FileLevel::Copy => About {
                id: "copy",
                title: "full copy",
                what: "Docker's driver “vfs”: each container is a copy of all files, on the \
                       host's file system.",
                kind: Kind::Files,
                brought: false,
            },
        }
    }

    fn absent(&self) -> Option<String> {
        match self {
            FileLevel::Overlay => not_in_kernel("overlay"),
            FileLevel::FuseOverlay => {
                missing(&[("fuse-overlayfs", "fuse-overlayfs")]).or_else(|| not_in_kernel("fuse"))
            }
            FileLevel::Copy => None,
        }
    }

    fn version(&self) -> Option<String> {
        match self {
            FileLevel::Overlay => super::kernel(),
            FileLevel::FuseOverlay => super::version_of("fuse-overlayfs", "fuse-overlayfs"),
            FileLevel::Copy => super::version_of("cp", "cp"),
        }
    }

    fn prepare(&self, dir: &Path, base: &Base) -> Result<()> {
        for (number, layer) in base.layers.iter().enumerate() {
            let to = match self {
                FileLevel::Copy => dir.join("0"),
                FileLevel::Overlay | FileLevel::FuseOverlay => dir.join(number.to_string()),
            };
            // Nobody writes them: links do, where the directory is on the same file system.
            if copy_tree(layer, &to, &["--link"]).is_err() {
                copy_tree(layer, &to, &[])?;
            }
        }
        Ok(())
    }

    fn open(&self, dir: &Path) -> Result<Box<dyn Image>> {
        let layers = (0..)
            .take_while(|number| dir.join(number.to_string()).exists())
            .count();
        Ok(Box::new(Containers {
            driver: *self,
            dir: dir.to_owned(),
            layers,
            started: HashMap::new(),
        }))
    }
}

struct Containers {
    driver: FileLevel,
    dir: PathBuf,
    layers: usize,
    /// The mount before its server.
    started: HashMap<String, (Mount, Option<Server>)>,
}

impl Containers {
    /// Paths relative to the directory: 128 layers have to fit the page of mount(2).
    fn options(&self, name: &str) -> String {
        let lower: Vec<String> = (0..self.layers).rev().map(|n| n.to_string()).collect();
        format!(
            "lowerdir={},upperdir={name}.upper,workdir={name}.work",
            lower.join(":")
        )
    }
}

impl Image for Containers {
    fn create(&mut self, name: &str) -> Result<()> {
        if self.driver == FileLevel::Copy {
            let to = self.dir.join(format!("{name}.mnt"));
            return copy_tree(&self.dir.join("0"), &to, &["--reflink=never"]);
        }
        for part in ["upper", "work", "mnt"] {
            fs::create_dir(self.dir.join(format!("{name}.{part}")))?;
        }
        Ok(())
    }

    fn start(&mut self, name: &str) -> Result<Access> {
        let dir = self.dir.join(format!("{name}.mnt"));
        let options = self.options(name);
        match self.driver {
            FileLevel::Copy => {}
            FileLevel::Overlay => {
                let arguments = ["-t", "overlay", "overlay", "-o", &options];
                let mount = Mount::new(&dir, &self.dir, &arguments)?;
                self.started.insert(name.to_owned(), (mount, None));
            }
            FileLevel::FuseOverlay => {
                let server = Server::start(
                    Command::new("fuse-overlayfs")
                        .current_dir(&self.dir)
                        .args(["-f", "-o", &options])
                        .arg(&dir),
                    Signal::SIGTERM,
                    || is_mounted(&dir),
                )?;
                let mount = Mount::existing(&dir);
                self.started.insert(name.to_owned(), (mount, Some(server)));
            }
        }
        Ok(Access::Dir(dir))
    }

    fn fork(&mut self, name: &str, new: &str) -> Result<()> {
        let own = match self.driver {
            FileLevel::Copy => "mnt",
            FileLevel::Overlay | FileLevel::FuseOverlay => {
                self.create(new)?;
                "upper"
            }
        };
        let path = |name: &str| self.dir.join(format!("{name}.{own}"));
        copy_tree(&path(name), &path(new), &["--reflink=never"])?;
        host::sync_fs(&self.dir)
    }

    fn stop(&mut self, name: &str) -> Result<()> {
        if let Some((mount, server)) = self.started.remove(name) {
            mount.unmount()?;
            if let Some(server) = server {
                server.stop()?;
            }
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<()> {
        for part in ["upper", "work", "mnt"] {
            let dir = self.dir.join(format!("{name}.{part}"));
            if dir.exists() {
                fs::remove_dir_all(dir)?;
            }
        }
        Ok(())
    }

    fn servers(&self, name: &str) -> Vec<u32> {
        let server = self
            .started
            .get(name)
            .and_then(|(_, server)| server.as_ref());
        server.and_then(Server::pid).into_iter().collect()
    }

    fn used(&self) -> Result<u64> {
        host::sync_fs(&self.dir)?;
        Ok(allocated(&self.dir))
    }
}
