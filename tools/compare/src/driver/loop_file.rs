//! ext4 on a loop device on a file: raw (the reference), and qcow2 through QEMU's FUSE export.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Result;
use nix::sys::signal::Signal;

use super::qemu::Qemu;
use super::{About, Access, Base, Driver, Image, Kind, copy_sparse, link_or_copy, missing};
use crate::host::{self, Loop, Mount, Server, allocated, copy_tree, is_mounted, sh};

/// The options of every ext4 here; those that Vellum mounts with.
const MOUNT_OPTIONS: &str = "discard,noinit_itable";

/// Makes an ext4 with the shape of Vellum's own (journal of 16 MiB, no reserved blocks, inode
/// tables that nobody zeroes later) that holds the layers.
pub(super) fn make_ext4(path: &Path, size: u64, layers: &[PathBuf]) -> Result<()> {
    File::create(path)?.set_len(size)?;
    let file = path.to_string_lossy();
    sh(
        "mke2fs",
        &[
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-I",
            "256",
            "-i",
            "16384",
            "-m",
            "0",
            "-J",
            "size=16",
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1",
            &file,
        ],
    )?;
    let device = Loop::new(path)?;
    let dir = tempfile::Builder::new()
        .prefix("base")
        .tempdir_in(path.parent().unwrap_or(Path::new("/")))?;
    let mount = mount_ext4(&device, dir.path())?;
    for layer in layers {
        copy_tree(layer, mount.dir(), &[])?;
    }
    mount.unmount()
}

fn mount_ext4(device: &Loop, dir: &Path) -> Result<Mount> {
    let arguments = ["-t", "ext4", "-o", MOUNT_OPTIONS, device.device()];
    Mount::new(dir, Path::new("/"), &arguments)
}

/// The drivers of this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LoopFile {
    Raw,
    Qcow2(Qemu),
}

impl Driver for LoopFile {
    fn about(&self) -> About {
        match self {
            LoopFile::Raw => About {
                id: "raw",
                title: "raw file",
                what: "The reference: a full copy of the image as a raw file, ext4 on a loop \
                       device on it. No copy-on-write at all.",
                kind: Kind::Files,
                brought: false,
            },
            LoopFile::Qcow2(qemu) => About {
                id: "qcow2",
                title: "qcow2",
                what: "A qcow2 overlay on the image, as a file through qemu-storage-daemon's FUSE \
                       export; ext4 on a loop device on it (through the page cache: with direct \
                       I/O, QEMU 7.2's export damages data).",
                kind: Kind::Files,
                brought: false,
            }
            .of_qemu(*qemu),
        }
    }

    fn absent(&self) -> Option<String> {
        let ext4 = missing(&[("mke2fs", "e2fsprogs"), ("losetup", "mount")]);
        match self {
            LoopFile::Raw => ext4,
            LoopFile::Qcow2(qemu) => ext4
                .or_else(|| {
                    qemu.missing(&[
                        ("qemu-storage-daemon", "qemu-system-common or qemu-utils"),
                        ("qemu-img", "qemu-utils"),
                    ])
                })
                .or_else(|| super::not_in_kernel("fuse"))
                .or_else(|| without_fuse_export(*qemu)),
        }
    }

    fn version(&self) -> Option<String> {
        match self {
            LoopFile::Raw => super::kernel(),
            LoopFile::Qcow2(qemu) => qemu.version("qemu-storage-daemon"),
        }
    }

    fn prepare(&self, dir: &Path, base: &Base) -> Result<()> {
        match self {
            LoopFile::Raw => link_or_copy(base.raw()?, &dir.join("base.raw")),
            // A chain as deep as the image: one overlay for each layer.
            LoopFile::Qcow2(_) if base.layers.len() > 1 => {
                let first = base.layers.get(..1).unwrap_or_default();
                make_ext4(&dir.join("base.raw"), base.size, first)?;
                let mut image = Containers::open(*self, dir);
                for (number, layer) in base.layers.iter().enumerate().skip(1) {
                    let name = format!("layer-{number}");
                    image.create(&name)?;
                    copy_tree(layer, image.start(&name)?.dir()?, &[])?;
                    image.stop(&name)?;
                    fs::rename(image.file(&name), dir.join(format!("{number}.base")))?;
                }
                Ok(())
            }
            LoopFile::Qcow2(_) => link_or_copy(base.raw()?, &dir.join("base.raw")),
        }
    }

    fn open(&self, dir: &Path) -> Result<Box<dyn Image>> {
        Ok(Box::new(Containers::open(*self, dir)))
    }
}

/// The reason when the storage daemon was built without FUSE.
fn without_fuse_export(qemu: Qemu) -> Option<String> {
    let help = host::run(qemu.command("qemu-storage-daemon").arg("--help"));
    let help = help.ok()?.stdout;
    (!help.contains("fuse,id="))
        .then(|| "this qemu-storage-daemon was built without the FUSE export".to_owned())
}

/// In the order in which they have to go.
struct Started {
    mount: Mount,
    device: Loop,
    server: Option<(Mount, Server)>,
}

struct Containers {
    driver: LoopFile,
    dir: PathBuf,
    started: HashMap<String, Started>,
}

impl Containers {
    fn open(driver: LoopFile, dir: &Path) -> Self {
        Containers {
            driver,
            dir: dir.to_owned(),
            started: HashMap::new(),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.img"))
    }

    /// The name and format of what a new overlay stands on.
    fn top(&self) -> (String, &'static str) {
        let deepest = (1..)
            .take_while(|number| self.dir.join(format!("{number}.base")).exists())
            .last();
        match deepest {
            Some(number) => (format!("{number}.base"), "qcow2"),
            None => ("base.raw".to_owned(), "raw"),
        }
    }

    /// Makes an overlay on what lies below in the directory.
    fn overlay(&self, qemu: Qemu, file: &Path, below: &str, format: &str) -> Result<()> {
        host::run(
            qemu.command("qemu-img")
                .current_dir(&self.dir)
                .args(["create", "-q", "-f", "qcow2", "-b", below, "-F", format])
                .arg(file),
        )?;
        Ok(())
    }

    /// The overlay as a raw file, through FUSE.
    fn serve(&self, qemu: Qemu, file: &Path, name: &str) -> Result<(PathBuf, Mount, Server)> {
        let export = self.dir.join(format!("{name}.fuse"));
        File::create(&export)?;
        let server = Server::start(
            qemu.command("qemu-storage-daemon")
                .arg("--blockdev")
                .arg(format!(
                    "driver=file,node-name=file,discard=unmap,filename={}",
                    file.display()
                ))
                .args([
                    "--blockdev",
                    "driver=qcow2,node-name=disk,file=file,discard=unmap",
                ])
                .arg("--export")
                .arg(format!(
                    "type=fuse,id=export,node-name=disk,writable=on,mountpoint={}",
                    export.display()
                )),
            Signal::SIGTERM,
            || is_mounted(&export),
        )?;
        Ok((export.clone(), Mount::existing(&export), server))
    }
}

impl Image for Containers {
    fn create(&mut self, name: &str) -> Result<()> {
        let file = self.file(name);
        match self.driver {
            LoopFile::Raw => copy_sparse(&self.dir.join("base.raw"), &file),
            LoopFile::Qcow2(qemu) => {
                let (top, format) = self.top();
                self.overlay(qemu, &file, &top, format)
            }
        }
    }

    fn start(&mut self, name: &str) -> Result<Access> {
        let file = self.file(name);
        let (file, server) = match self.driver {
            LoopFile::Raw => (file, None),
            LoopFile::Qcow2(qemu) => {
                let (export, mount, server) = self.serve(qemu, &file, name)?;
                (export, Some((mount, server)))
            }
        };
        let device = match self.driver {
            LoopFile::Raw => Loop::new(&file)?,
            // QEMU 7.2's FUSE export mixes up the data of requests that are under way at once,
            // as those of direct I/O are: ext4 on it finds damaged blocks within seconds.
            LoopFile::Qcow2(_) => Loop::buffered(&file)?,
        };
        let dir = self.dir.join(format!("{name}.mnt"));
        let mount = mount_ext4(&device, &dir)?;
        let started = Started {
            mount,
            device,
            server,
        };
        self.started.insert(name.to_owned(), started);
        Ok(Access::Dir(dir))
    }

    /// Only of a file system that is unmounted is all in its file.
    fn fork(&mut self, name: &str, new: &str) -> Result<()> {
        self.stop(name)?;
        match self.driver {
            LoopFile::Raw => copy_sparse(&self.file(name), &self.file(new))?,
            LoopFile::Qcow2(qemu) => {
                let below = format!("{name}.below");
                fs::rename(self.file(name), self.dir.join(&below))?;
                for above in [name, new] {
                    self.overlay(qemu, &self.file(above), &below, "qcow2")?;
                }
            }
        }
        host::sync_fs(&self.dir)?;
        self.start(name).map(drop)
    }

    fn stop(&mut self, name: &str) -> Result<()> {
        let Some(started) = self.started.remove(name) else {
            return Ok(());
        };
        started.mount.unmount()?;
        drop(started.device);
        if let Some((mount, server)) = started.server {
            mount.unmount()?;
            server.stop()?;
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<()> {
        fs::remove_file(self.file(name))?;
        // What it was before it was forked; its forks are gone.
        drop(fs::remove_file(self.dir.join(format!("{name}.below"))));
        drop(fs::remove_file(self.dir.join(format!("{name}.fuse"))));
        drop(fs::remove_dir(self.dir.join(format!("{name}.mnt"))));
        Ok(())
    }

    fn servers(&self, name: &str) -> Vec<u32> {
        let started = self.started.get(name);
        let server = started.and_then(|started| started.server.as_ref());
        server
            .and_then(|(_, server)| server.pid())
            .into_iter()
            .collect()
    }

    fn used(&self) -> Result<u64> {
        host::sync_fs(&self.dir)?;
        Ok(allocated(&self.dir))
    }
}
