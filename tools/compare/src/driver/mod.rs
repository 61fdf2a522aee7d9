//! The drivers: ways to give a container its own writable copy of an image.

mod by_command;
mod file_level;
mod loop_file;
mod nbd;
mod pull;
mod qemu;
mod vellum;
mod volume;

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

use crate::host::{self, find_program};
use pull::{Pull, Way};
use qemu::Qemu;

pub use by_command::Brought;
pub use pull::{Link, Pulling, Remote, SERVICE};

/// What containers are made from.
pub struct Base {
    /// Trees, from the bottom up; each adds files to those below.
    pub layers: Vec<PathBuf>,
    /// Bytes of the block devices and file systems that drivers make for it.
    pub size: u64,
    /// The same as one raw disk image, when a driver has asked for it.
    raw: OnceLock<PathBuf>,
    /// What the registry is like that it is pulled from.
    link: Link,
    /// The same in that registry, when a driver has asked for it.
    remote: OnceCell<Rc<Remote>>,
}

impl Base {
    /// An image of these trees.
    pub fn of_layers(layers: Vec<PathBuf>, size: u64) -> Self {
        Base {
            layers,
            size,
            raw: OnceLock::new(),
            link: Link::default(),
            remote: OnceCell::new(),
        }
    }

    /// An image that is a raw disk, without a file system.
    pub fn of_raw(raw: PathBuf, size: u64) -> Self {
        Base {
            raw: OnceLock::from(raw),
            ..Base::of_layers(Vec::new(), size)
        }
    }

    /// The same, pulled over such a link.
    pub fn over(self, link: Link) -> Self {
        Base { link, ..self }
    }

    /// A registry for it, made once.
    fn remote(&self) -> Result<Rc<Remote>> {
        if let Some(remote) = self.remote.get() {
            return Ok(Rc::clone(remote));
        }
        let [tree] = &*self.layers else {
            bail!(
                "an image of one layer is pulled, not of {}",
                self.layers.len()
            );
        };
        let dir = tree.with_extension("remote");
        let remote = Remote::new(&dir, (tree, self.size), &self.link);
        let remote = Rc::new(remote.context("a registry with the image")?);
        Ok(Rc::clone(self.remote.get_or_init(|| remote)))
    }

    /// A raw disk image with all layers on one ext4, made once.
    pub fn raw(&self) -> Result<&Path> {
        if let Some(raw) = self.raw.get() {
            return Ok(raw);
        }
        let Some(first) = self.layers.first() else {
            bail!("an image needs at least one layer");
        };
        let path = first.with_extension("raw");
        loop_file::make_ext4(&path, self.size, &self.layers)?;
        Ok(self.raw.get_or_init(|| path))
    }
}

/// What containers of a driver are used through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A directory.
    Files,
    /// A network block device.
    Nbd,
    /// A directory, of an image that is pulled from a registry each time.
    Pull,
}

/// What a reader should know of a driver.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct About {
    /// For `--drivers`.
    pub id: &'static str,
    /// For tables.
    pub title: &'static str,
    /// One sentence: how it works.
    pub what: &'static str,
    /// What its containers are used through.
    pub kind: Kind,
    /// Given on the command line.
    pub brought: bool,
}

impl About {
    /// The same with that QEMU. One of a root has its version in the name, and stands beside this
    /// host's: `qemu-qcow2` and `qemu10-qcow2`, `qcow2` and `qcow2-qemu10`.
    fn of_qemu(self, qemu: Qemu) -> Self {
        let Some(major) = qemu.major() else {
            return self;
        };
        let id = match self.id.strip_prefix("qemu-") {
            Some(rest) => format!("qemu{major}-{rest}"),
            None => format!("{}-qemu{major}", self.id),
        };
        About {
            id: id.leak(),
            title: format!("{} (QEMU {major})", self.title).leak(),
            brought: true,
            ..self
        }
    }
}

/// A driver.
pub trait Driver {
    /// What it is.
    fn about(&self) -> About;

    /// Why this host cannot have it; none when it can.
    fn absent(&self) -> Option<String>;

    /// Which version of it is measured.
    fn version(&self) -> Option<String>;

    /// Makes an image in an empty directory.
    fn prepare(&self, dir: &Path, base: &Base) -> Result<()>;

    /// Opens an image that was made there, perhaps before a power cut.
    fn open(&self, dir: &Path) -> Result<Box<dyn Image>>;
}

/// How a started container is used.
#[derive(Debug, Clone)]
pub enum Access {
    /// Its root directory.
    Dir(PathBuf),
    /// The address of its block device.
    Nbd(String),
}

impl Access {
    /// Its root directory.
    pub fn dir(&self) -> Result<&Path> {
        match self {
            Access::Dir(dir) => Ok(dir),
            Access::Nbd(uri) => bail!("{uri} is no directory"),
        }
    }

    /// The address of its block device.
    pub fn uri(&self) -> Result<&str> {
        match self {
            Access::Dir(dir) => bail!("{} is no NBD address", dir.display()),
            Access::Nbd(uri) => Ok(uri),
        }
    }
}

/// An image, with its containers. Dropping it ends whatever is started.
pub trait Image {
    /// Makes a container, which may not exist yet.
    fn create(&mut self, name: &str) -> Result<()>;

    /// Mounts or serves a container.
    fn start(&mut self, name: &str) -> Result<Access>;

    /// Makes the container `new` of what a started one is now, durably. That one stays started, and is
    /// removed after its forks.
    fn fork(&mut self, _name: &str, _new: &str) -> Result<()> {
        bail!("containers of this driver are not forked")
    }

    /// Unmounts it or stops its server, after which it can be started again.
    fn stop(&mut self, name: &str) -> Result<()>;

    /// Removes a stopped container and all that it wrote.
    fn remove(&mut self, name: &str) -> Result<()>;

    /// The driver's own processes that serve a started container.
    fn servers(&self, name: &str) -> Vec<u32>;

    /// Bytes on the disk that the image and its containers take.
    fn used(&self) -> Result<u64>;

    /// What only pulls have.
    fn pulling(&mut self) -> Option<&mut dyn Pulling> {
        None
    }

    /// A drawing (SVG) of where a started container's blocks lie, if the driver makes one.
    fn picture(&self, _name: &str, _scratch: &Path) -> Option<String> {
        None
    }
}

/// The reference of each kind: what it costs with no copy-on-write at all.
pub fn reference(kind: Kind) -> &'static str {
    match kind {
        Kind::Files => "raw",
        Kind::Nbd => "nbdkit-file",
        Kind::Pull => "pull-overlayfs",
    }
}

/// This project's driver of each kind.
pub fn own(kind: Kind) -> &'static str {
    match kind {
        Kind::Files => "vellum",
        Kind::Nbd => "vellum-nbd",
        Kind::Pull => "pull-full",
    }
}

/// Whether a driver is this project's.
pub fn is_own(id: &str) -> bool {
    ["vellum", "vellum-nbd", "pull-full", "pull-lazy", "pull-hot"].contains(&id)
}

/// The reference measured once more, which shows how much is noise.
pub fn control(kind: Kind) -> &'static str {
    match kind {
        Kind::Files => "raw-again",
        Kind::Nbd => "nbdkit-file-again",
        Kind::Pull => "pull-overlayfs-again",
    }
}

/// All drivers, in the order of tables. `vellum` is the program of that name, `qemu` are roots whose
/// QEMU is measured beside this host's; `brought` are the user's.
///
/// # Errors
/// For a root without QEMU.
pub fn all(vellum: &Path, qemu: &[PathBuf], brought: &[Brought]) -> Result<Vec<Box<dyn Driver>>> {
    let qemus = qemu.iter().map(|root| Qemu::of_root(root));
    let newer: Vec<Qemu> = qemus.collect::<Result<_>>()?;
    let mut drivers: Vec<Box<dyn Driver>> = vec![
        Box::new(loop_file::LoopFile::Raw),
        Box::new(Again(
            Box::new(loop_file::LoopFile::Raw),
            "raw file (again)",
        )),
        Box::new(vellum::Mounted(vellum.to_owned())),
        Box::new(file_level::FileLevel::Overlay),
        Box::new(volume::Volume::Btrfs),
        Box::new(volume::Volume::Xfs),
        Box::new(file_level::FileLevel::Copy),
        Box::new(loop_file::LoopFile::Qcow2(Qemu::Host)),
        Box::new(file_level::FileLevel::FuseOverlay),
    ];
    for qemu in &newer {
        drivers.push(Box::new(loop_file::LoopFile::Qcow2(*qemu)));
    }
    for driver in brought {
        drivers.push(Box::new(by_command::ByCommand::new(driver.clone())));
    }
    drivers.push(Box::new(nbd::Server::NbdkitFile));
    drivers.push(Box::new(Again(
        Box::new(nbd::Server::NbdkitFile),
        "nbdkit file (again)",
    )));
    drivers.push(Box::new(vellum::Served(vellum.to_owned())));
    for qemu in [Qemu::Host].into_iter().chain(newer) {
        for format in [
            nbd::Format::Raw,
            nbd::Format::Qcow2,
            nbd::Format::Qcow2ExtendedL2,
        ] {
            drivers.push(Box::new(nbd::Server::Qemu(qemu, format)));
        }
    }
    drivers.push(Box::new(nbd::Server::NbdkitCow));
    drivers.push(Box::new(Pull::new(Way::Overlay, vellum)));
    drivers.push(Box::new(Again(
        Box::new(Pull::new(Way::Overlay, vellum)),
        "overlayfs (again)",
    )));
    for way in [Way::Full, Way::Lazy, Way::Hot, Way::Stargz] {
        drivers.push(Box::new(Pull::new(way, vellum)));
    }
    Ok(drivers)
}

/// A driver once more, as its kind's control, under this title.
struct Again(Box<dyn Driver>, &'static str);

impl Driver for Again {
    fn about(&self) -> About {
        let kind = self.0.about().kind;
        About {
            id: control(kind),
            title: self.1,
            what: "The reference once more in each round: what differs is noise.",
            kind,
            brought: false,
        }
    }

    fn absent(&self) -> Option<String> {
        self.0.absent()
    }

    fn version(&self) -> Option<String> {
        self.0.version()
    }

    fn prepare(&self, dir: &Path, base: &Base) -> Result<()> {
        self.0.prepare(dir, base)
    }

    fn open(&self, dir: &Path) -> Result<Box<dyn Image>> {
        self.0.open(dir)
    }
}

/// The kernel that runs, for drivers that are part of it.
fn kernel() -> Option<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    Some(format!("Linux {}", release.trim()))
}

/// The first line of what `PROGRAM --version` says, or the line that names `word`.
fn version_of(program: &str, word: &str) -> Option<String> {
    let done = host::sh("sh", &["-c", "\"$0\" --version 2>&1", program]).ok()?;
    let line = done.stdout.lines().find(|line| line.contains(word))?;
    Some(line.trim().chars().take(70).collect())
}

/// The kernel, with a program beside it.
fn kernel_and(program: &str, word: &str) -> Option<String> {
    let both = [kernel(), version_of(program, word)];
    let both: Vec<String> = both.into_iter().flatten().collect();
    (!both.is_empty()).then(|| both.join(", "))
}

/// The reason when one of the programs is not installed; each with its Debian package.
fn missing(programs: &[(&str, &str)]) -> Option<String> {
    programs
        .iter()
        .find(|(program, _)| find_program(program).is_none())
        .map(|(program, package)| {
            format!("{program} is not installed (Debian: apt-get install {package})")
        })
}

/// The reason when the kernel lacks a file system.
fn not_in_kernel(kind: &str) -> Option<String> {
    (!host::kernel_mounts(kind)).then(|| format!("this kernel has no {kind}"))
}

/// Puts a file that nobody writes at `to`: linked, or copied from another file system.
fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    if fs::hard_link(from, to).is_err() {
        copy_sparse(from, to)?;
    }
    Ok(())
}

/// A full copy that keeps holes, and shares nothing.
fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let (from, to) = (from.to_string_lossy(), to.to_string_lossy());
    host::sh("cp", &["--sparse=always", "--reflink=never", &from, &to])?;
    Ok(())
}
