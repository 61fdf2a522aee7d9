//! Pulled by a containerd of our own: whole for its overlayfs snapshotter, lazily for that of the
//! stargz project.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::super::{Access, Image, missing, not_in_kernel};
use super::{Pulling, Remote};
use crate::host::{self, Finished, Mount, Server, allocated};

/// stargz-snapshotter's daemon in Go. Debian's package has its tool alone; its library is another.
const STARGZ_SOURCE: &str = include_str!("stargzd/main.go");
const GO_SOURCES: &str = "/usr/share/gocode";
const STARGZ_LIBRARY: &str = "/usr/share/gocode/src/github.com/containerd/stargz-snapshotter/fs";
const STARGZ_PACKAGE: &str = "golang-github-containerd-stargz-snapshotter-dev";

/// Why this host has no containerd.
pub(super) fn absent() -> Option<String> {
    missing(&[
        ("containerd", "containerd"),
        ("ctr", "containerd"),
        ("runc", "runc"),
    ])
    .or_else(|| not_in_kernel("overlay"))
}

/// Why this host cannot have stargz-snapshotter.
pub(super) fn stargz_absent() -> Option<String> {
    missing(&[("ctr-remote", "stargz-snapshotter"), ("go", "golang-go")])
        .or_else(|| not_in_kernel("fuse"))
        .or_else(|| {
            (!Path::new(STARGZ_LIBRARY).exists()).then(|| {
                format!("its library is not installed (Debian: apt-get install {STARGZ_PACKAGE})")
            })
        })
}

/// Of the library that its daemon is made of.
pub(super) fn stargz_version() -> Option<String> {
    let show = ["-W", "-f", "stargz-snapshotter ${Version}", STARGZ_PACKAGE];
    Some(host::sh("dpkg-query", &show).ok()?.stdout)
}

/// Builds the daemon in a directory; of Debian's sources, without cgo, modules and network.
pub(super) fn build_stargz(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("go");
    let source = path.join("src/stargzd");
    fs::create_dir_all(&source)?;
    fs::write(source.join("main.go"), STARGZ_SOURCE)?;
    let daemon = dir.join("stargzd");
    host::run(
        Command::new("go")
            .args(["build", "-o"])
            .arg(&daemon)
            .arg("stargzd")
            .env("GO111MODULE", "off")
            .env("CGO_ENABLED", "0")
            .env("GOPATH", format!("{}:{GO_SOURCES}", path.display())),
    )
    .context("building stargz-snapshotter's daemon")?;
    Ok(daemon)
}

/// A containerd with nothing in it but while a container is there.
pub(super) struct Daemon {
    dir: PathBuf,
    remote: Rc<Remote>,
    /// The daemon of stargz-snapshotter.
    stargz: Option<PathBuf>,
    /// The key of the image's uppermost snapshot, which a runtime computes without asking.
    parent: String,
    /// Before those whose files it shows.
    mounted: Option<Mount>,
    started: Option<Servers>,
}

/// containerd before the snapshotter that it asks.
pub(super) struct Servers {
    containerd: Server,
    snapshotter: Option<Server>,
}

impl Servers {
    pub(super) fn start(dir: &Path, remote: &Remote, stargz: Option<&Path>) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let at = dir.display();
        let config = dir.join("containerd.toml");
        let mut text = format!(
            "version = 2\nroot = '{at}/root'\nstate = '{at}/state'\n\
             disabled_plugins = ['io.containerd.grpc.v1.cri']\n[grpc]\naddress = '{at}/c.sock'\n"
        );
        let mut snapshotter = None;
        if let Some(program) = stargz {
            text +=
                &format!("[proxy_plugins.stargz]\ntype = 'snapshot'\naddress = '{at}/s.sock'\n");
            let socket = dir.join("s.sock");
            let mut command = remote.command(program);
            command.arg("-address").arg(&socket);
            command.arg("-root").arg(dir.join("stargz"));
            snapshotter = Some(serving(&mut command, &socket)?);
        }
        fs::write(&config, text)?;
        let mut command = remote.command("containerd");
        command.arg("--config").arg(&config);
        Ok(Servers {
            containerd: serving(&mut command, &dir.join("c.sock"))?,
            snapshotter,
        })
    }

    pub(super) fn stop(self) -> Result<()> {
        self.containerd.stop()?;
        self.snapshotter.map_or(Ok(0.0), Server::stop).map(drop)
    }
}

/// Starts a server and waits for its socket.
fn serving(command: &mut Command, socket: &Path) -> Result<Server> {
    Server::start(command, Signal::SIGTERM, || {
        UnixStream::connect(socket).is_ok()
    })
}

impl Daemon {
    /// Starts it in a directory of its own.
    pub(super) fn start(
        dir: &Path,
        remote: Rc<Remote>,
        stargz: Option<PathBuf>,
        parent: String,
    ) -> Result<Self> {
        let mut daemon = Daemon {
            dir: dir.to_owned(),
            remote,
            stargz,
            parent,
            mounted: None,
            started: None,
        };
        daemon.begin()?;
        Ok(daemon)
    }

    fn home(&self) -> PathBuf {
        self.dir.join("c")
    }

    fn begin(&mut self) -> Result<()> {
        let servers = Servers::start(&self.home(), &self.remote, self.stargz.as_deref())?;
        self.started = Some(servers);
        Ok(())
    }

    fn snapshotter(&self) -> &'static str {
        match self.stargz {
            Some(_) => "stargz",
            None => "overlayfs",
        }
    }

    fn ctr(&self, program: &str, arguments: &[&str]) -> Result<Finished> {
        ctr(&self.remote, &self.home(), program, arguments)
    }

    fn snapshots(&self, arguments: &[&str]) -> Result<String> {
        let snapshots = ["snapshots", "--snapshotter", self.snapshotter()];
        let arguments = [&snapshots[..], arguments].concat();
        Ok(self.ctr("ctr", &arguments)?.stdout)
    }

    /// Stops everything and removes what it had.
    fn end(&mut self) -> Result<()> {
        let unmounted = self.mounted.take().map_or(Ok(()), Mount::unmount);
        let stopped = self.started.take().map_or(Ok(()), Servers::stop);
        // Of a snapshotter that did not end well.
        host::detach_below(&self.dir);
        if self.home().exists() {
            fs::remove_dir_all(self.home()).with_context(|| self.home().display().to_string())?;
        }
        unmounted.and(stopped)
    }
}

/// A client of the containerd in a directory.
pub(super) fn ctr(
    remote: &Remote,
    home: &Path,
    program: &str,
    arguments: &[&str],
) -> Result<Finished> {
    host::run(
        remote
            .command(program)
            .arg("--address")
            .arg(home.join("c.sock"))
            .args(["--namespace", "compare"])
            .args(arguments),
    )
}

impl Image for Daemon {
    fn create(&mut self, name: &str) -> Result<()> {
        let form = self.stargz.as_ref().map_or("plain", |_| "estargz");
        let reference = self.remote.reference(form);
        match self.stargz {
            Some(_) => self.ctr(
                "ctr-remote",
                &["images", "rpull", "--plain-http", &reference],
            )?,
            None => self.ctr("ctr", &["images", "pull", "--plain-http", &reference])?,
        };
        self.snapshots(&["prepare", name, &self.parent]).map(drop)
    }

    fn start(&mut self, name: &str) -> Result<Access> {
        let dir = self.dir.join("mnt");
        let line = self.snapshots(&["mounts", &dir.to_string_lossy(), name])?;
        // mount -t overlay overlay DIR -o OPTIONS
        let words: Vec<&str> = line.split_whitespace().collect();
        let options = words.iter().skip_while(|word| **word != "-o").nth(1);
        let options = options.with_context(|| format!("a mount without options: {line}"))?;
        ensure!(words.get(2) == Some(&"overlay"), "no overlay: {line}");
        let arguments = ["-t", "overlay", "overlay", "-o", options];
        self.mounted = Some(Mount::new(&dir, Path::new("/"), &arguments)?);
        Ok(Access::Dir(dir))
    }

    fn stop(&mut self, _name: &str) -> Result<()> {
        self.mounted.take().map_or(Ok(()), Mount::unmount)
    }

    fn remove(&mut self, _name: &str) -> Result<()> {
        self.end()?;
        self.begin()
    }

    fn servers(&self, _name: &str) -> Vec<u32> {
        let servers = self.started.iter();
        servers
            .flat_map(|servers| [Some(&servers.containerd), servers.snapshotter.as_ref()])
            .filter_map(|server| server?.pid())
            .collect()
    }

    fn used(&self) -> Result<u64> {
        host::sync_fs(&self.dir)?;
        Ok(allocated(&self.home()))
    }

    fn pulling(&mut self) -> Option<&mut dyn Pulling> {
        Some(self)
    }
}

impl Pulling for Daemon {
    fn completes_by_reading(&self) -> bool {
        self.stargz.is_some()
    }

    fn warm(&self) -> Result<()> {
        let programs = match self.stargz {
            Some(_) => &["ctr", "ctr-remote"].map(Path::new)[..],
            None => &[Path::new("ctr")],
        };
        self.remote.warm(programs)
    }

    fn complete(&mut self) -> Result<()> {
        // What was read once is in its cache.
        match &self.mounted {
            Some(mounted) if self.completes_by_reading() => host::read_files(mounted.dir()),
            _ => Ok(()),
        }
    }

    fn remote(&self) -> &Remote {
        &self.remote
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        host::report(self.end());
    }
}
