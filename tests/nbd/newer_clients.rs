//! The NBD server against clients of a newer Debian, which speak extended headers: libnbd 1.22, QEMU 10.

use std::path::{Path, PathBuf};
use std::thread;

use serde_json::Value;
use vellum_base::block::{BlockDevice, Durability, MemoryDevice};
use vellum_export::nbd::{Export, Server, ServerConfig, bind_tcp};

use crate::common::run;

const MIB: u64 = 1 << 20;
/// More than 32 bits hold.
const LARGE: u64 = 6 << 30;

/// A Debian 13 root with NBD clients, and a server that they reach by TCP.
struct Lab {
    dir: tempfile::TempDir,
    server: Server,
    port: u16,
    serving: Option<thread::JoinHandle<vellum_base::Result<()>>>,
}

impl Lab {
    fn new(exports: Vec<Export>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        make_root(&dir.path().join("root"));
        let server = Server::new(ServerConfig::default()).unwrap();
        for export in exports {
            server.add_export(export).unwrap();
        }
        let listener = bind_tcp("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let own = server.clone();
        Lab {
            dir,
            server,
            port,
            serving: Some(thread::spawn(move || own.serve_tcp(listener))),
        }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd://127.0.0.1:{}/{export}", self.port)
    }

    /// Runs a program of the root; it must succeed.
    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let root = self.root();
        let all = [&[root.to_str().unwrap(), program], arguments].concat();
        run("chroot", &all)
    }

    fn json(&self, program: &str, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.run(program, arguments)).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let stopped = self.server.shutdown();
        let served = self.serving.take().map(thread::JoinHandle::join);
        if !thread::panicking() {
            stopped.unwrap();
            served.unwrap().unwrap().unwrap();
        }
    }
}

fn make_root(root: &Path) {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools");
    let script = ". \"$1/packages\"; . \"$1/debian-root\"; \
                  need_packages mmdebstrap debian-archive-keyring; \
                  make_debian_root \"$2\" trixie 1 libnbd-bin qemu-utils";
    let (tools, root) = (tools.to_str().unwrap(), root.to_str().unwrap());
    run("bash", &["-euc", script, "bash", tools, root]);
}

/// 1 MiB of data within zeros, at a place that 32 bits do not hold.
fn sparse() -> MemoryDevice {
    let device = MemoryDevice::new(LARGE);
    let data = vec![0x5a; MIB as usize];
    device
        .write_at(&data, LARGE - 2 * MIB, Durability::Buffered)
        .unwrap();
    device
}

#[test]
fn libnbd_1_22_and_qemu_10_agree_on_extended_headers_and_read_map_and_write() {
    let lab = Lab::new(vec![
        Export::new("large", std::sync::Arc::new(sparse())),
        Export::new("copy", std::sync::Arc::new(MemoryDevice::new(LARGE))),
    ]);
    let (large, copy) = (lab.uri("large"), lab.uri("copy"));

    let info = lab.json("nbdinfo", &["--json", &large]);
    assert_eq!(info["structured"], true, "{info}");
    assert_eq!(info["extended"], true, "{info}");

    // One descriptor says what compact headers need two for.
    let map = lab.json("nbdinfo", &["--map", "--json", &large]);
    let found: Vec<(u64, u64, u64)> = map.as_array().unwrap().iter().map(extent).collect();
    let data = LARGE - 2 * MIB;
    assert_eq!(
        found,
        [(0, data, 3), (data, MIB, 0), (data + MIB, MIB, 3)],
        "{map}"
    );

    lab.run("nbdcopy", &["--destination-is-zero", &large, &copy]);
    lab.run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &large, &copy],
    );

    // Zeros of more than 4 GiB, then a copy back by QEMU.
    lab.run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            &format!("write -z -u -n 0 {LARGE}"),
            &copy,
        ],
    );
    let map = lab.json("nbdinfo", &["--map", "--json", &copy]);
    assert_eq!(extent(&map[0]), (0, LARGE, 3), "{map}");
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw", &large, &copy];
    lab.run("qemu-img", &convert);
    lab.run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &large, &copy],
    );
}

/// (offset, length, status) of an element of a map.
fn extent(element: &Value) -> (u64, u64, u64) {
    let field = |name: &str| element[name].as_u64().unwrap();
    (field("offset"), field("length"), field("type"))
}
