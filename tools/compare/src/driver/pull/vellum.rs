//! Pulled by Vellum.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::super::vellum::servers_of;
use super::super::{Access, Image};
use super::{Pulling, Remote, Way};
use crate::host::{self, allocated};

/// The image's name in the store.
const IMAGE: &str = "image";

/// A store, empty but while a container is there.
pub(super) struct Store {
    way: Way,
    program: PathBuf,
    dir: PathBuf,
    remote: Rc<Remote>,
    mounted: Option<String>,
}

impl Store {
    pub(super) fn new(way: Way, program: &Path, dir: &Path, remote: Rc<Remote>) -> Self {
        Store {
            way,
            program: program.to_owned(),
            dir: dir.to_owned(),
            remote,
            mounted: None,
        }
    }

    fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        // Whoever needs blocks starts the fetcher, which has to be at this end of the link.
        self.remote.vellum(&self.program, &self.store(), arguments)
    }

    fn vellum(&self, arguments: &[&str]) -> Result<()> {
        host::run(&mut self.command(arguments)).map(drop)
    }

    /// Ends the fetcher, and removes everything.
    fn empty(&self) -> Result<()> {
        let fetchers = || servers_of("@vellum-fetcher", &self.store());
        for pid in fetchers() {
            let _ = kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL);
        }
        if !host::poll_uninterrupted(Duration::from_secs(10), || fetchers().is_empty()) {
            bail!("the fetcher of {} does not end", self.store().display());
        }
        match fs::remove_dir_all(self.store()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| self.store().display().to_string())
            }
            _ => Ok(()),
        }
    }
}

impl Image for Store {
    fn create(&mut self, name: &str) -> Result<()> {
        let form = if self.way == Way::Hot {
            "hot"
        } else {
            "blocks"
        };
        let reference = self.remote.reference(form);
        let mut pull = vec!["pull", "--plain-http"];
        if self.way != Way::Full {
            pull.push("--lazy");
        }
        pull.extend([&reference, IMAGE]);
        self.vellum(&pull)?;
        self.vellum(&["create", IMAGE, "--name", name])
    }

    fn start(&mut self, name: &str) -> Result<Access> {
        let dir = self.dir.join("mnt");
        fs::create_dir_all(&dir)?;
        self.vellum(&["mount", name, &dir.to_string_lossy()])?;
        self.mounted = Some(name.to_owned());
        Ok(Access::Dir(dir))
    }

    fn stop(&mut self, name: &str) -> Result<()> {
        if self.mounted.is_some() {
            self.vellum(&["umount", name])?;
            self.mounted = None;
        }
        Ok(())
    }

    fn remove(&mut self, _name: &str) -> Result<()> {
        self.empty()
    }

    fn servers(&self, _name: &str) -> Vec<u32> {
        let kinds = ["@vellum-device", "@vellum-fetcher"];
        let servers = kinds.map(|kind| servers_of(kind, &self.store()));
        servers.concat()
    }

    fn used(&self) -> Result<u64> {
        host::sync_fs(&self.dir)?;
        Ok(allocated(&self.store()))
    }

    fn pulling(&mut self) -> Option<&mut dyn Pulling> {
        Some(self)
    }
}

impl Pulling for Store {
    fn completes_by_reading(&self) -> bool {
        false
    }

    fn warm(&self) -> Result<()> {
        self.remote.warm(&[&self.program])
    }

    fn complete(&mut self) -> Result<()> {
        match self.way {
            Way::Full => Ok(()),
            _ => self.vellum(&["complete", IMAGE]),
        }
    }

    fn remote(&self) -> &Remote {
        &self.remote
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(name) = self.mounted.take() {
            let mut umount = self.command(&["umount", "--force", &name]);
            host::report(
                host::clean_up(&mut umount)
                    .with_context(|| format!("vellum umount --force {name}")),
            );
        }
        host::report(self.empty());
    }
}
