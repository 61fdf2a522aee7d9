//! Vellum, through its command line.

use std::collections::HashMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::{About, Access, Base, Driver, Image, Kind, missing, not_in_kernel};
use crate::host::{self, Finished, Server, allocated, report};

/// The image's name in the store.
const IMAGE: &str = "base";

/// A container mounted as ext4, through FUSE and a loop device.
pub(super) struct Mounted(pub PathBuf);

/// A container served over NBD.
pub(super) struct Served(pub PathBuf);

impl Driver for Mounted {
    fn about(&self) -> About {
        About {
            id: "vellum",
            title: "vellum",
            what: "This project: block-level copy-on-write with a journal; ext4 on a loop device \
                   on a file that its FUSE server serves.",
            kind: Kind::Files,
            brought: false,
        }
    }

    fn absent(&self) -> Option<String> {
        missing(&[("mke2fs", "e2fsprogs")]).or_else(|| not_in_kernel("fuse"))
    }

    fn version(&self) -> Option<String> {
        super::version_of(&self.0.to_string_lossy(), "vellum")
    }

    fn prepare(&self, dir: &Path, base: &Base) -> Result<()> {
        let mut below: Option<String> = None;
        let size = base.size.to_string();
        for (number, layer) in base.layers.iter().enumerate() {
            let name = if number + 1 == base.layers.len() {
                IMAGE.to_owned()
            } else {
                format!("layer-{number}")
            };
            let layer = layer.to_string_lossy();
            let mut arguments = vec!["import", &name, &layer];
            match &below {
                Some(below) => arguments.extend(["--from", below]),
                None => arguments.extend(["--size", &size]),
            }
            vellum(&self.0, dir, &arguments)?;
            below = Some(name);
        }
        Ok(())
    }

    fn open(&self, dir: &Path) -> Result<Box<dyn Image>> {
        Ok(Box::new(Containers::open(&self.0, dir, Kind::Files)?))
    }
}

impl Driver for Served {
    fn about(&self) -> About {
        About {
            id: "vellum-nbd",
            title: "vellum",
            what: "This project: block-level copy-on-write with a journal, through its NBD server.",
            kind: Kind::Nbd,
            brought: false,
        }
    }

    fn absent(&self) -> Option<String> {
        None
    }

    fn version(&self) -> Option<String> {
        super::version_of(&self.0.to_string_lossy(), "vellum")
    }

    fn prepare(&self, dir: &Path, base: &Base) -> Result<()> {
        let raw = base.raw()?.to_string_lossy();
        vellum(&self.0, dir, &["import", IMAGE, &raw, "--format", "raw"])?;
        Ok(())
    }

    fn open(&self, dir: &Path) -> Result<Box<dyn Image>> {
        Ok(Box::new(Containers::open(&self.0, dir, Kind::Nbd)?))
    }
}

/// Runs a command on the store in `dir`.
fn vellum(program: &Path, dir: &Path, arguments: &[&str]) -> Result<Finished> {
    host::run(
        Command::new(program)
            .arg("-q")
            .arg("--root")
            .arg(dir.join("store"))
            .args(arguments),
    )
}

struct Containers {
    program: PathBuf,
    dir: PathBuf,
    kind: Kind,
    mounted: Vec<String>,
    served: HashMap<String, Server>,
    /// For sockets, whose paths must be short.
    sockets: TempDir,
}

impl Containers {
    fn open(program: &Path, dir: &Path, kind: Kind) -> Result<Self> {
        Ok(Containers {
            program: program.to_owned(),
            dir: dir.to_owned(),
            kind,
            mounted: Vec::new(),
            served: HashMap::new(),
            sockets: tempfile::Builder::new().prefix("vcs").tempdir()?,
        })
    }

    fn vellum(&self, arguments: &[&str]) -> Result<Finished> {
        vellum(&self.program, &self.dir, arguments)
    }
}

impl Image for Containers {
    fn create(&mut self, name: &str) -> Result<()> {
        self.vellum(&["create", IMAGE, "--name", name]).map(drop)
    }

    fn start(&mut self, name: &str) -> Result<Access> {
        match self.kind {
            Kind::Files | Kind::Pull => {
                let dir = self.dir.join(format!("{name}.mnt"));
                fs::create_dir_all(&dir)?;
                self.vellum(&["mount", name, &dir.to_string_lossy()])?;
                self.mounted.push(name.to_owned());
                Ok(Access::Dir(dir))
            }
            Kind::Nbd => {
                let socket = self.sockets.path().join("s");
                let server = Server::start(
                    Command::new(&self.program)
                        .arg("-q")
                        .arg("--root")
                        .arg(self.dir.join("store"))
                        .args(["nbd", name, "--socket"])
                        .arg(&socket),
                    Signal::SIGTERM,
                    // It is there before anybody listens.
                    || UnixStream::connect(&socket).is_ok(),
                )?;
                self.served.insert(name.to_owned(), server);
                Ok(Access::Nbd(format!(
                    "nbd+unix:///{name}?socket={}",
                    socket.display()
                )))
            }
        }
    }

    fn fork(&mut self, name: &str, new: &str) -> Result<()> {
        self.vellum(&["fork", name, new]).map(drop)
    }

    fn stop(&mut self, name: &str) -> Result<()> {
        if let Some(server) = self.served.remove(name) {
            server.stop()?;
        }
        if self.mounted.iter().any(|mounted| mounted == name) {
            self.vellum(&["umount", name])?;
            self.mounted.retain(|mounted| mounted != name);
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<()> {
        self.vellum(&["rm", name])?;
        drop(fs::remove_dir(self.dir.join(format!("{name}.mnt"))));
        Ok(())
    }

    fn servers(&self, name: &str) -> Vec<u32> {
        if let Some(server) = self.served.get(name) {
            return server.pid().into_iter().collect();
        }
        servers_of("@vellum-device", &self.dir)
    }

    fn used(&self) -> Result<u64> {
        host::sync_fs(&self.dir)?;
        Ok(allocated(&self.dir.join("store")))
    }

    fn picture(&self, name: &str, scratch: &Path) -> Option<String> {
        let file = scratch.join("map.svg");
        self.vellum(&["map", name, "--svg", &file.to_string_lossy()])
            .ok()?;
        fs::read_to_string(file).ok()
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        self.served.clear();
        for name in std::mem::take(&mut self.mounted) {
            let mut umount = Command::new(&self.program);
            umount
                .arg("-q")
                .arg("--root")
                .arg(self.dir.join("store"))
                .args(["umount", "--force", &name]);
            report(
                host::clean_up(&mut umount)
                    .with_context(|| format!("vellum umount --force {name}")),
            );
        }
    }
}

/// The processes of this kind whose store lies in a directory.
pub(super) fn servers_of(kind: &str, dir: &Path) -> Vec<u32> {
    let dir = dir.to_string_lossy();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            line.starts_with(kind) && line.contains(&*dir)
        })
        .collect()
}
