//! A registry on this host, for one test: docker-registry, with what a test wants of it.
#![allow(dead_code, missing_docs)]

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::common::{Running, TestStore, run, wait_until};
use crate::ports::free_port;

/// How a registry is set up.
#[derive(Default)]
pub struct Setup {
    /// It wants the name `user` with the password `secret`, or this one.
    pub auth: bool,
    pub password: Option<&'static str>,
    /// More of the configuration's `http`.
    pub http: String,
    /// Another driver than files.
    pub storage: Option<String>,
}

/// A registry that ends with this.
pub struct Registry {
    dir: tempfile::TempDir,
    port: u16,
    server: Running,
}

impl Registry {
    pub fn new() -> Self {
        Self::with(&Setup::default())
    }

    pub fn with(setup: &Setup) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("vellum-registry-")
            .tempdir()
            .unwrap();
        let port = free_port();
        let server = Self::start(dir.path(), port, setup);
        Registry { dir, port, server }
    }

    fn start(dir: &Path, port: u16, setup: &Setup) -> Running {
        let root = dir.join("data");
        let files = || format!("filesystem: {{rootdirectory: {}}}", root.display());
        let storage = setup.storage.clone().unwrap_or_else(files);
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{{storage}, delete: {{enabled: true}}, cache: {{}}}}\n\
             http: {{addr: '127.0.0.1:{port}'{}}}\n",
            setup.http
        );
        if setup.auth {
            let users = dir.join("htpasswd");
            let line = run(
                "htpasswd",
                &["-Bbn", "user", setup.password.unwrap_or("secret")],
            );
            fs::write(&users, line).unwrap();
            config += &format!(
                "auth: {{htpasswd: {{realm: here, path: {}}}}}\n",
                users.display()
            );
        }
        let file = dir.join("config.yml");
        fs::write(&file, config).unwrap();
        let log = fs::File::create(dir.join("log")).unwrap();
        let child = Command::new("docker-registry")
            .args(["serve", &file.display().to_string()])
            // Its S3 driver reads it even where it is not used, and ends without the file.
            .env_remove("AWS_CA_BUNDLE")
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("apt-get install docker-registry");
        wait_until("the registry listens", || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        Running(child)
    }

    /// Starts it again, with what it had, after it was stopped.
    pub fn start_again(&mut self) {
        self.server = Self::start(self.dir.path(), self.port, &Setup::default());
    }

    /// Ends it; its name stays.
    pub fn stop(&mut self) {
        let _ = self.server.0.kill();
        let _ = self.server.0.wait();
    }

    /// As docker calls it.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The name of an image in it.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.host())
    }

    /// The same for skopeo.
    pub fn skopeo(&self, name: &str) -> String {
        format!("docker://{}", self.image(name))
    }

    /// Where it keeps the bytes of a blob.
    pub fn blob_file(&self, digest: &str) -> PathBuf {
        let digits = digest.strip_prefix("sha256:").unwrap();
        let blobs = self.dir.path().join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&digits[..2]).join(digits).join("data")
    }

    /// A document as it lies there.
    pub fn document(&self, digest: &str) -> Value {
        serde_json::from_slice(&fs::read(self.blob_file(digest)).unwrap()).unwrap()
    }

    /// The digests of the data blobs of an artifact, from the bottom up.
    pub fn data_blobs(&self, manifest: &str) -> Vec<String> {
        let manifest = self.document(manifest);
        let layers = manifest["layers"].as_array().unwrap().iter();
        let data = layers.filter(|layer| layer["mediaType"].as_str().unwrap().contains("data"));
        data.map(|layer| layer["digest"].as_str().unwrap().to_owned())
            .collect()
    }

    /// All files of blobs, with their lengths: what changes when something is sent.
    pub fn blobs(&self) -> Vec<(PathBuf, u64)> {
        let root = self.dir.path().join("data/docker/registry/v2/blobs");
        let list = run(
            "find",
            &[
                &root.display().to_string(),
                "-name",
                "data",
                "-printf",
                "%p %s\n",
            ],
        );
        let mut blobs: Vec<_> = list
            .lines()
            .map(|line| {
                let (path, size) = line.rsplit_once(' ').unwrap();
                (PathBuf::from(path), size.parse().unwrap())
            })
            .collect();
        blobs.sort();
        blobs
    }
}

/// The environment of a command that knows no credentials but those in the directory `config`.
pub fn knowing_only(config: &str) -> [(&'static str, &str); 3] {
    [
        ("DOCKER_CONFIG", config),
        ("XDG_RUNTIME_DIR", config),
        ("REGISTRY_AUTH_FILE", "/nonexistent"),
    ]
}

/// A store whose commands know no credentials but those that the test gives.
pub fn store() -> TestStore {
    let mut store = TestStore::new();
    let config = store.path("docker");
    fs::create_dir_all(&config).unwrap();
    // For the time of a test program, whose tests are processes of their own.
    let config: &'static str = config.display().to_string().leak();
    store.env = knowing_only(config).to_vec();
    store
}

/// Images `base` and `web` on it, which has a shell.
pub fn with_images() -> TestStore {
    let store = store();
    let root = store.path("root");
    for dir in ["bin", "etc"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/sh")).expect("apt-get install busybox-static");
    fs::write(root.join("etc/hostname"), "base\n").unwrap();
    let noise: Vec<u8> = (0..1_500_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    fs::write(root.join("noise"), noise).unwrap();
    store.ok(&[
        "import",
        "base",
        &root.display().to_string(),
        "--size",
        "64M",
    ]);
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    fs::write(dir.join("etc/web"), "web\n").unwrap();
    fs::remove_file(dir.join("noise")).unwrap();
    store.ok(&["umount", "c"]);
    store.ok(&["commit", "c", "web"]);
    store.ok(&["rm", "c"]);
    store
}

/// A registry that has `web:1`, without a hot pack, the store that pushed it, and one that has nothing yet.
pub fn pushed() -> (Registry, TestStore, TestStore) {
    let (registry, from) = (Registry::new(), with_images());
    from.ok(&["push", "web", &registry.image("web:1"), "--no-hot"]);
    (registry, from, store())
}

/// The digests of an image's layers, from the bottom up.
pub fn digests(store: &TestStore, image: &str) -> Vec<String> {
    let inspected = store.json(&["inspect", image]);
    let layers = inspected[0]["layers"].as_array().unwrap().iter();
    layers
        .map(|layer| layer["digest"].as_str().unwrap().to_owned())
        .collect()
}

/// Pushes the image `web` twice, the second time without sending anything, and pulls it. Returns the report of the first
/// push.
#[track_caller]
pub fn goes_once_and_comes_as_blocks(from: &TestStore, to: &TestStore, image: &str) -> Value {
    let pushed = from.json(&["push", "web", image]);
    assert!(pushed["sent"].as_u64().unwrap() > 6, "{pushed}");
    let again = from.json(&["push", "web", image]);
    assert_eq!(
        (&again["sent"], &again["existed"]),
        (&0.into(), &pushed["sent"])
    );
    let pulled = to.json(&["pull", image]);
    assert_eq!(pulled["came"], "blocks", "{pulled}");
    pushed
}

/// Nothing half made, nothing that no record names, nothing damaged.
#[track_caller]
pub fn clean(store: &TestStore) {
    let pruned = store.json(&["prune"]);
    assert_eq!(pruned["layers"], serde_json::json!([]), "{pruned}");
    assert_eq!(pruned["leftovers"], serde_json::json!([]), "{pruned}");
    store.ok(&["check", "--scrub"]);
    store.assert_nothing_runs();
}
