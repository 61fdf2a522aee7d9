//! Rival NBD servers.

use std::collections::HashMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::qemu::Qemu;
use super::{About, Access, Base, Driver, Image, Kind, copy_sparse, link_or_copy, missing};
use crate::host::{self, allocated};

/// The drivers of this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Server {
    NbdkitFile,
    NbdkitCow,
    Qemu(Qemu, Format),
}

/// What qemu-nbd serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Raw,
    Qcow2,
    Qcow2ExtendedL2,
}

impl Driver for Server {
    fn about(&self) -> About {
        let (id, title, what) = match self {
            Server::NbdkitFile => (
                "nbdkit-file",
                "nbdkit file",
                "The reference: a full copy of the image as a raw file, served by nbdkit. No \
                 copy-on-write at all.",
            ),
            Server::NbdkitCow => (
                "nbdkit-cow",
                "nbdkit cow",
                "nbdkit's filter “cow” on the image; what is written goes when the server ends, \
                 by design.",
            ),
            Server::Qemu(_, Format::Raw) => (
                "qemu-raw",
                "qemu-nbd raw",
                "A full copy of the image as a raw file, served by qemu-nbd.",
            ),
            Server::Qemu(_, Format::Qcow2) => (
                "qemu-qcow2",
                "qemu-nbd qcow2",
                "A qcow2 overlay on the image (clusters of 64 KiB), served by qemu-nbd.",
            ),
            Server::Qemu(_, Format::Qcow2ExtendedL2) => (
                "qemu-qcow2-l2",
                "qemu-nbd qcow2, extended L2",
                "The same with subclusters of 4 KiB (128 KiB clusters, extended_l2=on).",
            ),
        };
        let about = About {
            id,
            title,
            what,
            kind: Kind::Nbd,
            brought: false,
        };
        match self {
            Server::Qemu(qemu, _) => about.of_qemu(*qemu),
            _ => about,
        }
    }

    fn absent(&self) -> Option<String> {
        match self {
            Server::NbdkitFile | Server::NbdkitCow => missing(&[("nbdkit", "nbdkit")]),
            Server::Qemu(qemu, _) => {
                qemu.missing(&[("qemu-nbd", "qemu-utils"), ("qemu-img", "qemu-utils")])
            }
        }
    }

    fn version(&self) -> Option<String> {
        match self {
            Server::NbdkitFile | Server::NbdkitCow => super::version_of("nbdkit", "nbdkit"),
            Server::Qemu(qemu, _) => qemu.version("qemu-nbd"),
        }
    }

    fn prepare(&self, dir: &Path, base: &Base) -> Result<()> {
        link_or_copy(base.raw()?, &dir.join("base.raw"))
    }

    fn open(&self, dir: &Path) -> Result<Box<dyn Image>> {
        Ok(Box::new(Containers {
            driver: *self,
            dir: dir.to_owned(),
            started: HashMap::new(),
            sockets: tempfile::Builder::new().prefix("vcs").tempdir()?,
        }))
    }
}

struct Containers {
    driver: Server,
    dir: PathBuf,
    started: HashMap<String, host::Server>,
    /// Their paths must be short.
    sockets: TempDir,
}

impl Containers {
    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.img"))
    }
}

impl Image for Containers {
    fn create(&mut self, name: &str) -> Result<()> {
        let file = self.file(name);
        let (qemu, options): (Qemu, &[&str]) = match self.driver {
            Server::NbdkitFile | Server::Qemu(_, Format::Raw) => {
                return copy_sparse(&self.dir.join("base.raw"), &file);
            }
            Server::NbdkitCow => return Ok(()),
            Server::Qemu(qemu, Format::Qcow2) => (qemu, &[]),
            Server::Qemu(qemu, Format::Qcow2ExtendedL2) => {
                (qemu, &["-o", "extended_l2=on,cluster_size=128k"])
            }
        };
        host::run(
            qemu.command("qemu-img")
                .current_dir(&self.dir)
                .args(["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw"])
                .args(options)
                .arg(&file),
        )?;
        Ok(())
    }

    fn start(&mut self, name: &str) -> Result<Access> {
        let socket = self.sockets.path().join("s");
        drop(fs::remove_file(&socket));
        let file = self.file(name);
        let mut command = match self.driver {
            Server::NbdkitFile => {
                let mut command = Command::new("nbdkit");
                command
                    .arg("-f")
                    .arg("-U")
                    .arg(&socket)
                    .arg("file")
                    .arg(&file);
                command
            }
            Server::NbdkitCow => {
                let mut command = Command::new("nbdkit");
                command
                    .arg("-f")
                    .arg("-U")
                    .arg(&socket)
                    .args(["--filter=cow", "file"])
                    .arg(self.dir.join("base.raw"))
                    // Where it puts what is written.
                    .env("TMPDIR", &self.dir);
                command
            }
            Server::Qemu(qemu, format) => {
                let format = match format {
                    Format::Raw => "raw",
                    Format::Qcow2 | Format::Qcow2ExtendedL2 => "qcow2",
                };
                let mut command = qemu.command("qemu-nbd");
                command
                    .args(["-t", "-e", "8", "-f", format, "--discard=unmap", "-k"])
                    .arg(&socket)
                    .arg(&file);
                command
            }
        };
        let server = host::Server::start(&mut command, Signal::SIGTERM, || {
            // It is there before anybody listens.
            UnixStream::connect(&socket).is_ok()
        })?;
        self.started.insert(name.to_owned(), server);
        Ok(Access::Nbd(format!(
            "nbd+unix:///?socket={}",
            socket.display()
        )))
    }

    fn stop(&mut self, name: &str) -> Result<()> {
        if let Some(server) = self.started.remove(name) {
            server.stop()?;
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<()> {
        let file = self.file(name);
        if file.exists() {
            fs::remove_file(file)?;
        }
        Ok(())
    }

    fn servers(&self, name: &str) -> Vec<u32> {
        self.started
            .get(name)
            .and_then(host::Server::pid)
            .into_iter()
            .collect()
    }

    fn used(&self) -> Result<u64> {
        host::sync_fs(&self.dir)?;
        let in_tree = allocated(&self.dir);
        // nbdkit's filter keeps its file open and unlinked.
        let unlinked = self.started.values().filter_map(host::Server::pid);
        Ok(in_tree + unlinked.map(unlinked_files).sum::<u64>())
    }
}

/// Bytes on the disk of the files that a process has open and nobody else can.
fn unlinked_files(pid: u32) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::metadata(entry.path()).ok())
        .filter(|metadata| metadata.is_file() && metadata.nlink() == 0)
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}
