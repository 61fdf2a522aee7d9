//! Ways in which a container comes from a registry: pulled whole or lazily, each time into an empty
//! store, over one link.

mod containerd;
mod remote;
mod vellum;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result};

use super::{About, Base, Driver, Image, Kind, missing, not_in_kernel};

use remote::Estargz;
pub use remote::{Link, Remote, SERVICE};

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// containerd with its overlayfs snapshotter.
    Overlay,
    /// `vellum pull`.
    Full,
    /// `vellum pull --lazy`.
    Lazy,
    /// The same, of an image that was pushed with a trace of its start.
    Hot,
    /// containerd with stargz-snapshotter.
    Stargz,
}

/// A driver of this file.
pub(super) struct Pull {
    way: Way,
    /// The vellum program, which also pushes what the others pull.
    vellum: PathBuf,
    /// From `prepare` to `open`.
    remote: RefCell<Option<Rc<Remote>>>,
}

impl Pull {
    pub(super) fn new(way: Way, vellum: &Path) -> Self {
        Pull {
            way,
            vellum: vellum.to_owned(),
            remote: RefCell::new(None),
        }
    }
}

impl Driver for Pull {
    fn about(&self) -> About {
        let (id, title, what) = match self.way {
            Way::Overlay => (
                "pull-overlayfs",
                "overlayfs, whole",
                "The reference of pulls: containerd fetches all layers and unpacks them for its overlayfs \
                 snapshotter.",
            ),
            Way::Full => (
                "pull-full",
                "vellum, whole",
                "vellum pull: all block layers are fetched and written.",
            ),
            Way::Lazy => (
                "pull-lazy",
                "vellum, lazily",
                "vellum pull --lazy, of an image as vellum push makes it: its file system's metadata comes ahead, all \
                 else when it is read.",
            ),
            Way::Hot => (
                "pull-hot",
                "vellum, hot pack",
                "The same of an image that was pushed with a trace of its start, which comes ahead in one \
                 piece.",
            ),
            Way::Stargz => (
                "pull-stargz",
                "stargz",
                "containerd with stargz-snapshotter, lazily, of an eStargz image that ctr-remote optimized \
                 for its start.",
            ),
        };
        About {
            id,
            title,
            what,
            kind: Kind::Pull,
            brought: false,
        }
    }

    fn absent(&self) -> Option<String> {
        let all = missing(&[
            ("docker-registry", "docker-registry"),
            ("ip", "iproute2"),
            ("tc", "iproute2"),
            ("unshare", "util-linux"),
        ]);
        // What `vellum push` lays the image out by, and mounts.
        let pushed = || missing(&[("mke2fs", "e2fsprogs")]).or_else(|| not_in_kernel("fuse"));
        all.or_else(|| match self.way {
            Way::Overlay => containerd::absent(),
            Way::Full | Way::Lazy => pushed(),
            // Its start is traced in a container.
            Way::Hot => missing(&[("crun", "crun")]).or_else(pushed),
            Way::Stargz => containerd::absent().or_else(containerd::stargz_absent),
        })
    }

    fn version(&self) -> Option<String> {
        match self.way {
            Way::Overlay => super::kernel_and("containerd", "containerd"),
            Way::Full | Way::Lazy | Way::Hot => {
                super::version_of(&self.vellum.to_string_lossy(), "vellum")
            }
            Way::Stargz => containerd::stargz_version(),
        }
    }

    fn prepare(&self, _dir: &Path, base: &Base) -> Result<()> {
        let remote = base.remote()?;
        remote.limit(false)?;
        match self.way {
            Way::Overlay => drop(remote.plain()?),
            Way::Stargz => drop(remote.estargz()?),
            Way::Full | Way::Lazy => remote.blocks(&self.vellum)?,
            Way::Hot => remote.hot(&self.vellum)?,
        }
        self.remote.replace(Some(remote));
        Ok(())
    }

    fn open(&self, dir: &Path) -> Result<Box<dyn Image>> {
        let remote = self.remote.take();
        let remote = remote.context("no registry was prepared for this pull")?;
        Ok(match self.way {
            Way::Full | Way::Lazy | Way::Hot => {
                Box::new(vellum::Store::new(self.way, &self.vellum, dir, remote))
            }
            Way::Overlay => {
                let parent = remote.plain()?;
                Box::new(containerd::Daemon::start(dir, remote, None, parent)?)
            }
            Way::Stargz => {
                let Estargz { daemon, parent } = remote.estargz()?;
                Box::new(containerd::Daemon::start(
                    dir,
                    remote,
                    Some(daemon),
                    parent,
                )?)
            }
        })
    }
}

/// What only pulls have. [`Image::create`] pulls into an empty store, and makes the container;
/// [`Image::remove`] makes the store empty again.
pub trait Pulling {
    /// Whether the rest comes by reading a started container, since there is no command for it.
    fn completes_by_reading(&self) -> bool;

    /// Has in memory what the registry and the programs of this way read from the disk: all begin alike, whoever
    /// ran before. Not a part of what is timed.
    fn warm(&self) -> Result<()>;

    /// Brings everything that is not here yet; afterwards no read asks the registry.
    fn complete(&mut self) -> Result<()>;

    /// The registry and the link to it.
    fn remote(&self) -> &Remote;
}
