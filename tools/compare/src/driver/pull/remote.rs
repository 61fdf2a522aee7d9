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

/// The image for stargz-snapshotter.
#[derive(Clone)]
pub struct Estargz {
    pub daemon: PathBuf,
    /// The key of its uppermost snapshot.
    pub parent: String,
}

/// A registry with the image in each form that was asked for, and the way to it.
pub struct Remote {
    /// Asks the registry, later.
    relay: Option<Server>,
    _registry: Server,
    link: host::Link,
    limited: Cell<bool>,
    dir: PathBuf,
    tree: PathBuf,
    /// Bytes of a block device for the tree.
    size: u64,
    /// A store that has it.
    from: OnceCell<PathBuf>,
    /// It is there as block layers, without and with a hot pack.
    blocks: OnceCell<()>,
    hot: OnceCell<()>,
    /// It is there as tar layers: the key of containerd's uppermost snapshot of it.
    plain: OnceCell<String>,
    estargz: OnceCell<Estargz>,
    estargz_level: Option<u32>,
}

impl Remote {
    /// Starts the registry for the image of this tree in an empty directory.
    ///
    /// # Errors
    /// Without the programs, root, or the kernel's network namespaces.
    pub fn new(dir: &Path, (tree, size): (&Path, u64), options: &Link) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let link = host::Link::new(&options.rate)?;
        let registry = registry(&link, &dir.join("registry"))?;
        let relay = (options.round_trip > 0)
            .then(|| relay(&link, Duration::from_millis(options.round_trip.into()) / 2))
            .transpose()?;
        Ok(Remote {
            relay,
            _registry: registry,
            link,
            limited: Cell::new(false),
            dir: dir.to_owned(),
            tree: tree.to_owned(),
            size,
            from: OnceCell::new(),
            blocks: OnceCell::new(),
            hot: OnceCell::new(),
            plain: OnceCell::new(),
            estargz: OnceCell::new(),
            estargz_level: options.estargz_level,
        })
    }

    /// Vellum on a store, at the client's end of the link.
    pub fn vellum(&self, vellum: &Path, store: &Path, arguments: &[&str]) -> Command {
        let mut command = self.command(vellum);
        command.arg("-q").arg("--root").arg(store).args(arguments);
        command
    }

    /// Pushes the image as block layers by this program; `options` are `vellum push`'s.
    fn push(&self, vellum: &Path, form: &str, options: &[&str]) -> Result<()> {
        let store = if let Some(store) = self.from.get() {
            store
        } else {
            let store = self.dir.join("from");
            let (tree, size) = (self.tree.to_string_lossy(), self.size.to_string());
            let import = ["import", IMAGE, &tree, "--size", &size];
            host::run(&mut self.vellum(vellum, &store, &import))?;
            self.from.get_or_init(|| store)
        };
        let reference = self.reference(form);
        let push = ["push", "--format", "blocks", "--plain-http", IMAGE];
        let push = [&push[..], &[&reference], options].concat();
        host::run(&mut self.vellum(vellum, store, &push)).map(drop)
    }

    /// Pushes the image as block layers, once, as `vellum push` does where it is told nothing.
    pub fn blocks(&self, vellum: &Path) -> Result<()> {
        if self.blocks.get().is_none() {
            self.push(vellum, "blocks", &[])?;
            self.blocks.get_or_init(|| ());
        }
        Ok(())
    }

    /// Pushes the image as block layers with a hot pack of its start, once.
    pub fn hot(&self, vellum: &Path) -> Result<()> {
        if self.hot.get().is_none() {
            let [program, script] = SERVICE;
            let start = format!("{program} {script} once");
            self.push(vellum, "hot", &["--trace", &start])?;
            self.hot.get_or_init(|| ());
        }
        Ok(())
    }

    /// Pushes the image as a gzip layer, once. By containerd, of GNU tar's archive without sparse files: nothing of it was
    /// made by the driver that it stands beside. Returns the key of its uppermost snapshot.
    pub fn plain(&self) -> Result<String> {
        if let Some(parent) = self.plain.get() {
            return Ok(parent.clone());
        }
        let dir = self.dir.join("push");
        let servers = Servers::start(&dir, self, None)?;
        let name = self.reference("plain");
        let (archive, sum) = archive(&self.tree, &dir, &name)?;
        let archive = archive.display().to_string();
        let ctr = |arguments: &[&str]| ctr(self, &dir, "ctr", arguments).map(drop);
        let import = ["images", "import", "--no-unpack", "--compress-blobs"];
        ctr(&[&import[..], &[&archive]].concat())?;
        ctr(&["images", "push", "--plain-http", &name])?;
        servers.stop()?;
        fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
        // The chain ID of one layer is its diff ID (OCI Image Specification 1.1, config.md).
        Ok(self.plain.get_or_init(|| format!("sha256:{sum}")).clone())
    }

    /// Makes the eStargz image, once, as that project does it: the start is run, what it reads comes first.
    pub fn estargz(&self) -> Result<Estargz> {
        if let Some(estargz) = self.estargz.get() {
            return Ok(estargz.clone());
        }
        self.plain()?;
        let daemon = build_stargz(&self.dir)?;
        let dir = self.dir.join("convert");
        let converter = Servers::start(&dir, self, None)?;
        let (from, to) = (self.reference("plain"), self.reference("estargz"));
        let ctr = |program, arguments: &[&str]| ctr(self, &dir, program, arguments);
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
        // What is called by this key is the same through every snapshotter.
        let pull = ["images", "pull", "--plain-http", "--print-chainid", &to];
        let said = ctr("ctr", &pull)?.stdout;
        let parent = chain_id(&said).with_context(|| format!("no chain ID: {said}"))?;
        converter.stop()?;
        fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let parent = parent.to_owned();
        Ok(self
            .estargz
            .get_or_init(|| Estargz { daemon, parent })
            .clone())
    }

    /// Has the registry's blobs and these programs in memory, as they are where somebody pulls a second image:
    /// whoever emptied the caches before decides nothing.
    ///
    /// # Errors
    /// Where a program or a blob cannot be read.
    pub fn warm(&self, programs: &[&Path]) -> Result<()> {
        host::read_all(&self.dir.join("registry"))?;
        let common = ["chroot", "mount"].map(Path::new);
        for program in common.iter().chain(programs) {
            // With its libraries and what enters the namespace.
            host::run(self.command(program).arg("--version"))?;
            let file = host::find_program(&program.to_string_lossy());
            let file = file.with_context(|| program.display().to_string())?;
            // And what its work will need of it.
            fs::read(&file).with_context(|| file.display().to_string())?;
        }
        Ok(())
    }

    /// A command of the registry's client.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.link.command(End::Client, program)
    }

    /// The image in one of its forms, as it is reached now.
    pub fn reference(&self, form: &str) -> String {
        let port = match self.relay.is_some() && self.limited.get() {
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

/// What `ctr images pull --print-chainid` says: `image chain ID: sha256:...`.
fn chain_id(said: &str) -> Option<&str> {
    let mut lines = said.lines();
    lines.find_map(|line| Some(line.split_once("image chain ID:")?.1.trim()))
}

/// A docker archive (Docker Image Specification 1.2) of one layer, which `docker load` and others take, and
/// the layer's SHA-256.
fn archive(tree: &Path, dir: &Path, name: &str) -> Result<(PathBuf, String)> {
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
    Ok((archive, sum.to_owned()))
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
    Server::start(&mut command, Signal::SIGTERM, || link.listens(PORT))
}

fn relay(link: &host::Link, delay: Duration) -> Result<Server> {
    let mut command = link.command(End::Server, std::env::current_exe()?);
    command
        .arg("relay")
        .args(["--listen", &format!("{SERVER}:{DELAYED}")])
        .args(["--to", &format!("127.0.0.1:{PORT}")])
        .args(["--micros", &delay.as_micros().to_string()]);
    Server::start(&mut command, Signal::SIGTERM, || link.listens(DELAYED))
}
