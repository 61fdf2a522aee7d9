//! containerd as the kubelet drives it, by its container runtime interface.

use std::fs;
use std::process::{Command, Output};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::TestStore;
use crate::cri::{Cri, PodConfig};
use crate::image::{Image, lazy_bytes};
use crate::registry_support::{Registry, knowing_only, store};
use crate::snapshotter_support::oci::{archive_of, tar_of};
use crate::snapshotter_support::{Area, Daemon, PACKAGES, wait_for};

/// Bytes in the image that nothing reads.
pub const LOAD: usize = 24 << 20;

/// A registry that has `web:1`, which sleeps where nobody says what else.
fn pushed(format: &str) -> (Registry, TestStore, Image) {
    pushed_to(Registry::new(), store(), &["--format", format])
}

/// As [`pushed`], with options of `vellum push`, by a store that knows what the registry wants to know.
pub fn pushed_to(
    registry: Registry,
    from: TestStore,
    options: &[&str],
) -> (Registry, TestStore, Image) {
    let busybox = fs::read("/bin/busybox")
        .unwrap_or_else(|error| panic!("/bin/busybox: {error}: {PACKAGES}"));
    let mut state = 1_u64;
    let load: Vec<u8> = (0..LOAD)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    let first = tar_of(&[("bin/busybox", &busybox, 0o755), ("load", &load, 0o644)]);
    let second = tar_of(&[("etc/web", b"web\n", 0o644)]);
    let command = ["/bin/busybox", "sleep", "600"];
    let archive = archive_of("localhost/web:1", &[first, second], &command);
    fs::write(from.path("image.tar"), archive).unwrap();
    from.ok(&["import", "web", &from.arg("image.tar"), "--size", "256M"]);
    let name = registry.image("web:1");
    let pushed = from.json(&[&["push", "web", &name], options].concat());
    let image = Image::new(&registry, "web:1", pushed["digest"].as_str().unwrap());
    (registry, from, image)
}

/// containerd with its CRI plugin, and the snapshotter, which takes blocks from a registry.
pub struct Node {
    pub snapshotter: Option<Daemon>,
    containerd: Option<Daemon>,
    pub area: Area,
    pub cri: Cri,
}

impl Node {
    fn start(registry: &Registry) -> Node {
        Node::with(registry, false)
    }

    /// With the snapshotter's image service at [`Node::service`], or without.
    pub fn with(registry: &Registry, serves_images: bool) -> Node {
        let area = Area::new();
        let host = registry.host();
        let config = format!(
            "version = 2\nroot = '{0}/containerd'\nstate = '{0}/state'\n\
             [grpc]\naddress = '{0}/containerd.sock'\n\
             [proxy_plugins.vellum]\ntype = 'snapshot'\naddress = '{0}/vellum.sock'\n\
             [plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = '{host}/web:1'\n\
             disable_apparmor = true\nrestrict_oom_score_adj = true\n\
             stream_server_address = '127.0.0.1'\nstream_server_port = '0'\n\
             [plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '{0}/cni'\nconf_dir = '{0}/cni'\n\
             [plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'vellum'\n\
             disable_snapshot_annotations = false\n\
             [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\n\
             runtime_type = 'io.containerd.runc.v2'\n\
             [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]\n\
             Root = '{0}/runc'\n",
            area.path().display()
        );
        fs::write(area.at("containerd.toml"), config).unwrap();
        let mut config = format!(
            "version = 1\ndefault_size = '256M'\n[remote]\nfrom = ['{host}']\nbackground = 'off'\n"
        );
        if serves_images {
            config += &format!(
                "[cri]\nimage_service = '{}'\nupstream = '{}'\n",
                area.at("images.sock"),
                area.at("containerd.sock")
            );
        }
        fs::write(area.at("vellum.toml"), config).unwrap();
        let cri = Cri::new(area.at("containerd.sock"));
        let mut node = Node {
            snapshotter: None,
            containerd: None,
            area,
            cri,
        };
        node.start_again();
        node
    }

    /// The image service of the snapshotter.
    pub fn service(&self) -> Cri {
        Cri::new(self.area.at("images.sock"))
    }

    pub fn start_again(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vellum"));
        command
            .args(["--root", &self.area.at("root"), "snapshotter"])
            .args(["--config", &self.area.at("vellum.toml")])
            .args(["--address", &self.area.at("vellum.sock")])
            // The host's own credentials are nobody's business here.
            .envs(knowing_only(&self.area.at("docker")));
        self.snapshotter = Some(Daemon::start(&mut command, &self.area.path().join("log")));
        let limit = Duration::from_secs(30);
        wait_for("the snapshotter listens", limit, || {
            std::os::unix::net::UnixStream::connect(self.area.at("vellum.sock")).is_ok()
        });
        self.start_containerd();
    }

    fn start_containerd(&mut self) {
        self.containerd = Some(Daemon::start(
            Command::new("containerd").args(["--config", &self.area.at("containerd.toml")]),
            &self.area.path().join("containerd.log"),
        ));
        let limit = Duration::from_secs(30);
        wait_for("containerd answers", limit, || self.cri.is_ready());
    }

    /// Stops containerd, and starts it again after `meanwhile`.
    pub fn restart_containerd(&mut self, meanwhile: impl FnOnce()) {
        self.containerd.take().unwrap().signal(Signal::SIGTERM);
        meanwhile();
        self.start_containerd();
    }

    pub fn stop(&mut self) {
        for daemon in [&mut self.containerd, &mut self.snapshotter] {
            daemon.take().unwrap().signal(Signal::SIGTERM);
        }
    }

    fn ctr(&self, arguments: &[&str]) -> Output {
        Command::new("ctr")
            .args(["--address", &self.area.at("containerd.sock")])
            .args(["--namespace", "k8s.io"])
            .args(arguments)
            .output()
            .unwrap_or_else(|error| panic!("ctr: {error}: {PACKAGES}"))
    }

    /// What containerd has of the image's layers as tars.
    pub fn fetched(&self, image: &Image) -> usize {
        let content = self.ctr(&["content", "ls", "-q"]);
        let there = String::from_utf8(content.stdout).unwrap();
        let layers = image.layers.iter();
        layers.filter(|layer| there.contains(*layer)).count()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.area.at("log")).unwrap()
    }

    /// Runs a container whose output is one line, and waits for that.
    pub fn says(&self, pod: &str, config: &PodConfig, image: &Image, name: &str) -> String {
        let script = "read line < /etc/web; echo said $line";
        let command = ["/bin/busybox", "sh", "-c", script];
        self.cri.run(pod, config, &image.name, name, &command);
        self.said(name)
    }

    /// The last two words of what a container says, the last one first, once it has.
    pub fn said(&self, name: &str) -> String {
        let log = self.area.at(&format!("{name}.log"));
        let mut said = String::new();
        wait_for(
            "the container says something",
            Duration::from_secs(60),
            || {
                said = fs::read_to_string(&log).unwrap_or_default();
                said.ends_with('\n')
            },
        );
        said.trim_end()
            .rsplit(' ')
            .take(2)
            .collect::<Vec<_>>()
            .join(" ")
    }

    fn layers(&self) -> usize {
        fs::read_dir(self.area.path().join("root/layers"))
            .unwrap()
            .count()
    }
}

#[test]
fn a_pod_runs_while_most_of_its_image_is_not_here_also_after_a_restart_without_a_network() {
    let (mut registry, _from, image) = pushed("both");
    let mut node = Node::start(&registry);
    node.cri.pull(&image.name).unwrap();
    assert_eq!(
        node.fetched(&image),
        0,
        "tars that nobody needs\n{}",
        node.log()
    );
    let pod = PodConfig::new("one", &node.area.at(""), &node.area.name());
    let one = node.cri.run_pod(&pod);
    assert_eq!(node.says(&one, &pod, &image, "first"), "web said");
    let (here, all) = lazy_bytes(&node.area.path().join("root"));
    assert!(all > LOAD as u64, "{all}");
    assert!(here * 4 < all, "{here} of {all}");

    node.stop();
    registry.stop();
    node.start_again();
    let again = PodConfig::new("two", &node.area.at(""), &node.area.name());
    let two = node.cri.run_pod(&again);
    assert_eq!(node.says(&two, &again, &image, "second"), "web said");
    for pod in [&one, &two] {
        node.cri.remove_pod(pod);
    }
    node.cri.remove_image(&image.name).unwrap();
    // The empty file system is this host's own.
    wait_for("all space is free", Duration::from_secs(60), || {
        node.layers() == 1
    });
}

#[test]
fn a_pod_of_an_image_without_block_layers_runs_as_ever() {
    let (registry, _from, image) = pushed("oci");
    let node = Node::start(&registry);
    node.cri.pull(&image.name).unwrap();
    assert_eq!(node.fetched(&image), image.layers.len());
    assert!(node.log().contains("has no block layers"), "{}", node.log());
    let pod = PodConfig::new("one", &node.area.at(""), &node.area.name());
    let one = node.cri.run_pod(&pod);
    assert_eq!(node.says(&one, &pod, &image, "first"), "web said");
    node.cri.remove_pod(&one);
}
