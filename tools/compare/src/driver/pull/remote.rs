//! The registry that images are pulled from, at the other end of a link.

use std::cell::{Cell, OnceCell};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde::Serialize;
use serde_json::json;

use super::containerd::{Servers, build_stargz, ctr};
use crate::host::{self, End, SERVER, Server};

/// What the image's containers do: the program and its arguments. With `once` behind them it answers one
/// request of its own, and ends.
pub const SERVICE: [&str; 2] = ["/usr/bin/python3", "/srv/service.py"];

/// The image's name in the registry.
const IMAGE: &str = "image";
/// Where the registry listens.
const PORT: u16 = 5000;
/// Where it is reached with the link's delay.
const DELAYED: u16 = 5001;

/// What the link is like.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Link {
    /// As tc(8) has it.
    pub rate: String,
    /// Milliseconds that a request and its answer take besides.
    pub round_trip: u32,
    /// Compression level of the eStargz image, where it is not to be the tool's own.
    #[serde(skip)]
    pub estargz_level: Option<u32>,
}

/// A registry with the image in each form, and the way to it.
pub struct Remote {
    /// Asks the registry, later.
    _relay: Option<Server>,
    _registry: Server,
    link: host::Link,
    limited: Cell<bool>,
    dir: PathBuf,
    delayed: bool,
    tree: PathBuf,
    /// The image as tar layers is there.
    plain: OnceCell<()>,
    /// The eStargz image is there; the daemon for it.
    estargz: OnceCell<PathBuf>,
    estargz_level: Option<u32>,
}

impl Remote {
    /// Starts the registry in an empty directory, and pushes the image of this tree in the forms that
    /// `vellum push` makes.
    ///
    /// # Errors
    /// Without the programs, root, or the kernel's network namespaces.
    pub fn new(
        vellum: &Path,
        dir: &Path,
        (tree, size): (&Path, u64),
        options: &Link,
    ) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let link = host::Link::new(&options.rate)?;
        let registry = registry(&link, &dir.join("registry"))?;
        let delayed = options.round_trip > 0;
        let relay = delayed
            .then(|| relay(&link, Duration::from_millis(options.round_trip.into()) / 2))
            .transpose()?;
        let remote = Remote {
            _relay: relay,
            _registry: registry,
            link,
            limited: Cell::new(false),
            dir: dir.to_owned(),
            delayed,
            tree: tree.to_owned(),
            plain: OnceCell::new(),
            estargz: OnceCell::new(),
            estargz_level: options.estargz_level,
        };
        remote.push_blocks(vellum, size)?;
        Ok(remote)
    }

    fn push_blocks(&self, vellum: &Path, size: u64) -> Result<()> {
        let store = self.dir.join("from");
        let run = |arguments: &[&str]| {
            let mut command = self.command(vellum);
            command.arg("-q").arg("--root").arg(&store).args(arguments);
            host::run(&mut command).map(drop)
        };
        let (tree, size) = (self.tree.to_string_lossy(), size.to_string());
        let [program, script] = SERVICE;
        let start = format!("{program} {script} once");
        run(&["import", IMAGE, &tree, "--size", &size])?;
        let push = ["push", "--format", "blocks", "--plain-http", IMAGE];
        let (blocks, hot) = (self.reference("blocks"), self.reference("hot"));
        run(&[&push[..], &[&blocks, "--no-hot"]].concat())?;
        run(&[&push[..], &[&hot, "--trace", &start]].concat())?;
        fs::remove_dir_all(&store).with_context(|| store.display().to_string())
    }

    /// Pushes the image as a gzip layer, once. By containerd, of GNU tar's archive without sparse files: nothing of it was
    /// made by the driver that it stands beside.
    pub fn plain(&self) -> Result<()> {
        if self.plain.get().is_some() {
            return Ok(());
        }
        let dir = self.dir.join("push");
        let servers = Servers::start(&dir, self, None)?;
        let name = self.reference("plain");
        let archive = archive(&self.tree, &dir, &name)?.display().to_string();
        let ctr = |arguments: &[&str]| ctr(self, &dir, "ctr", arguments).map(drop);
        let import = ["images", "import", "--no-unpack", "--compress-blobs"];
        ctr(&[&import[..], &[&archive]].concat())?;
        ctr(&["images", "push", "--plain-http", &name])?;
        servers.stop()?;
        fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
        self.plain.get_or_init(|| ());
        Ok(())
    }

    /// Makes the eStargz image, once, as that project does it: the start is run, what it reads comes first.
    /// Returns the daemon.
    pub fn estargz(&self) -> Result<PathBuf> {
        if let Some(daemon) = self.estargz.get() {
            return Ok(daemon.clone());
        }
        self.plain()?;
        let daemon = build_stargz(&self.dir)?;
        let dir = self.dir.join("convert");
        let converter = Servers::start(&dir, self, None)?;
        let (from, to) = (self.reference("plain"), self.reference("estargz"));
        let ctr = |program, arguments: &[&str]| ctr(self, &dir, program, arguments).map(drop);
        ctr("ctr", &["images", "pull", "--plain-http", &from])?;
        let [program, script] = SERVICE;
        let entry = serde_json::to_string(&[program])?;
        let arguments = serde_json::to_string(&[script, "once"])?;
        let mut optimize = vec!["images", "optimize", "--oci"];
        let level = self.estargz_level.map(|level| level.to_string());
        if let Some(level) = &level {
            optimize.extend(["--estargz-compression-level", level]);
        }
        optimize.extend(["--entrypoint", &entry, "--args", &arguments, &from, &to]);
        ctr("ctr-remote", &optimize)?;
        ctr("ctr", &["images", "push", "--plain-http", &to])?;
        converter.stop()?;
        fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(self.estargz.get_or_init(|| daemon).clone())
    }

    /// A command of the registry's client.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.link.command(End::Client, program)
    }

    /// The image in one of its forms, as it is reached now.
    pub fn reference(&self, form: &str) -> String {
        let port = match self.delayed && self.limited.get() {
            true => DELAYED,
            false => PORT,
        };
        format!("{SERVER}:{port}/{IMAGE}:{form}")
    }

    /// Sets or lifts the link's limit and delay.
    pub fn limit(&self, limited: bool) -> Result<()> {
        self.limited.set(limited);
        self.link.limit(limited)
    }

    /// Bytes that have come over the link so far.
    pub fn received(&self) -> Result<u64> {
        self.link.received()
    }
}

/// A docker archive (Docker Image Specification 1.2) of one layer, which `docker load` and others take.
fn archive(tree: &Path, dir: &Path, name: &str) -> Result<PathBuf> {
    let layer = dir.join("layer.tar");
    host::run(
        Command::new("tar")
            .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
            .arg("-C")
            .arg(tree)
            .arg("-cf")
            .arg(&layer)
            .arg("."),
    )?;
    let sum = host::run(Command::new("sha256sum").arg(&layer))?.stdout;
    let sum = sum.split_whitespace().next().context("no checksum")?;
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Env": ["PATH=/usr/bin"], "Cmd": SERVICE },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{sum}")] },
    });
    let manifest = json!([{
        "Config": "config.json",
        "RepoTags": [name],
        "Layers": ["layer.tar"],
    }]);
    fs::write(dir.join("config.json"), config.to_string())?;
    fs::write(dir.join("manifest.json"), manifest.to_string())?;
    let archive = dir.join("archive.tar");
    host::run(
        Command::new("tar")
            .arg("-C")
            .arg(dir)
            .arg("-cf")
            .arg(&archive)
            .args(["manifest.json", "config.json", "layer.tar"]),
    )?;
    Ok(archive)
}

/// Debian's registry at the far end of the link.
fn registry(link: &host::Link, dir: &Path) -> Result<Server> {
    fs::create_dir_all(dir)?;
    let file = dir.join("registry.yml");
    fs::write(
        &file,
        format!(
            "version: 0.1\nlog: {{level: error}}\n\
             storage: {{filesystem: {{rootdirectory: '{}'}}, cache: {{}}}}\n\
             http: {{addr: ':{PORT}', relativeurls: true}}\n",
            dir.display()
        ),
    )?;
    let mut command = link.command(End::Server, "docker-registry");
    // A bundle that it cannot read would stop it.
    command.arg("serve").arg(&file).env_remove("AWS_CA_BUNDLE");
    Server::start(&mut command, Signal::SIGTERM, || listens(link, PORT))
}

fn relay(link: &host::Link, delay: Duration) -> Result<Server> {
    let mut command = link.command(End::Server, std::env::current_exe()?);
    command
        .arg("relay")
        .args(["--listen", &format!("{SERVER}:{DELAYED}")])
        .args(["--to", &format!("127.0.0.1:{PORT}")])
        .args(["--micros", &delay.as_micros().to_string()]);
    Server::start(&mut command, Signal::SIGTERM, || listens(link, DELAYED))
}

/// Whether somebody listens on a port at the far end.
fn listens(link: &host::Link, port: u16) -> bool {
    let mut command = link.command(End::Server, "cat");
    command.args(["/proc/net/tcp", "/proc/net/tcp6"]);
    let Ok(table) = host::run(&mut command) else {
        return false;
    };
    // Addresses are hexadecimal, 0A is LISTEN (Documentation/networking/proc_net_tcp.rst of Linux).
    let port = format!(":{port:04X}");
    table.stdout.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next().is_some_and(|local| local.ends_with(&port));
        local && fields.nth(1) == Some("0A")
    })
}
