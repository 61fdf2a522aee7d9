//! Images of private registries, for pods that bring their pull secrets: docs/containerd.md, "Pull secrets".

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::TestStore;
use crate::cri::{Auth, PodConfig};
use crate::image::{Image, lazy_bytes, lazy_layers};
use crate::kubernetes::{LOAD, Node, pushed_to};
use crate::registry_support::{Registry, Setup, store};
use crate::snapshotter_support::client::{Failure, UNAVAILABLE, UNIMPLEMENTED};
use crate::snapshotter_support::wait_for;

/// A word that stands nowhere else.
const PASSWORD: &str = "Zq7-geheim-9xK";
/// `user:` and that, in base64.
const BASIC: &str = "dXNlcjpacTctZ2VoZWltLTl4Sw==";
const LIMIT: Duration = Duration::from_secs(60);

/// A registry that wants to know who asks, with `web:1` as blocks.
fn private() -> (Registry, TestStore, Image) {
    private_with(&[])
}

/// The same with options of `vellum push`.
fn private_with(options: &[&str]) -> (Registry, TestStore, Image) {
    let registry = Registry::with(&Setup {
        auth: true,
        password: Some(PASSWORD),
        ..Setup::default()
    });
    let from = store();
    let config = format!(
        "{{\"auths\": {{\"{}\": {{\"auth\": \"{BASIC}\"}}}}}}",
        registry.host()
    );
    fs::write(from.path("docker/config.json"), config).unwrap();
    pushed_to(registry, from, options)
}

fn secret(password: &str) -> Auth {
    Auth {
        username: "user".into(),
        password: password.into(),
        ..Auth::default()
    }
}

/// The fetchers of a node's store.
fn fetchers(node: &Node) -> Vec<Pid> {
    let mut found = node.area.processes();
    found.retain(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.starts_with(b"@vellum-fetcher")
    });
    found
}

fn kill_fetcher(node: &Node) {
    let running = fetchers(node);
    assert_eq!(running.len(), 1, "a fetcher runs");
    kill(running[0], Signal::SIGKILL).unwrap();
    wait_for("the fetcher is gone", LIMIT, || fetchers(node).is_empty());
}

fn holds_secret(bytes: &[u8]) -> bool {
    [PASSWORD, BASIC].iter().any(|secret| {
        bytes
            .windows(secret.len())
            .any(|part| part == secret.as_bytes())
    })
}

/// Files of a store that have the secret in them. What is mounted is looked for once, as layers; to read a device would
/// bring all of an image here.
fn leaks(root: &Path) -> Vec<String> {
    let found = Command::new("grep")
        .args([
            "-rlaF",
            "--devices=skip",
            "--exclude-dir=mnt",
            "--exclude=dev",
        ])
        .args(["-e", PASSWORD, "-e", BASIC])
        .arg(root)
        .output()
        .unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    found.lines().map(str::to_owned).collect()
}

#[track_caller]
fn assert_nothing_leaked(node: &Node) {
    let probe = node.area.path().join("root/probe");
    fs::write(&probe, format!("x{PASSWORD}")).unwrap();
    let root = node.area.path().join("root");
    assert_eq!(leaks(&root), [probe.display().to_string()]);
    fs::remove_file(&probe).unwrap();
    assert!(!holds_secret(node.log().as_bytes()), "in the log");
    let processes = node.area.processes();
    assert!(!fetchers(node).is_empty() && processes.len() > 3);
    for pid in processes {
        for file in ["cmdline", "environ"] {
            let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            assert!(!holds_secret(&bytes), "{file} of {pid}");
        }
    }
}

/// Both sockets answer the same, to the byte.
#[track_caller]
fn same_answer(node: &Node, method: &str, image: Option<&str>) -> Result<Vec<u8>, Failure> {
    let (direct, service) = (&node.cri, node.service());
    let mut answer = Ok(Vec::new());
    // What containerd counts in the background may change in between.
    wait_for(method, LIMIT, || {
        answer = service.bytes(method, image);
        answer == direct.bytes(method, image)
    });
    answer
}

#[test]
fn a_pods_secret_brings_a_private_image_lazily_also_to_a_fetcher_that_was_killed_and_nowhere_else()
{
    let (registry, _from, image) = private();
    let node = Node::with(&registry, true);
    let service = node.service();
    let wrong = service.pull_with(&image.name, secret("wrong")).unwrap_err();
    let direct = node.cri.pull_with(&image.name, secret("wrong"));
    assert_eq!(Err(wrong.clone()), direct);
    assert!(format!("{wrong:?}").contains("401"), "{wrong:?}");

    service.pull_with(&image.name, secret(PASSWORD)).unwrap();
    assert_eq!(
        node.fetched(&image),
        0,
        "tars that nobody needs\n{}",
        node.log()
    );
    assert!(lazy_layers(&node.area.path().join("root")).len() >= 2);
    let listed = same_answer(&node, "runtime.v1.ImageService/ListImages", None).unwrap();
    assert!(listed.len() > 5);
    let name = Some(image.name.as_str());
    let status = same_answer(&node, "runtime.v1.ImageService/ImageStatus", name).unwrap();
    assert!(status.len() > 5);
    same_answer(&node, "runtime.v1.ImageService/ImageFsInfo", None).unwrap();
    // What is not known here is containerd's business.
    same_answer(&node, "runtime.v1.RuntimeService/Version", None).unwrap();
    let unheard = same_answer(&node, "runtime.v1.ImageService/Unheard", None).unwrap_err();
    assert_eq!(unheard.code(), Some(UNIMPLEMENTED));

    let pod = PodConfig::new("one", &node.area.at(""), &node.area.name());
    let one = node.cri.run_pod(&pod);
    assert_eq!(node.says(&one, &pod, &image, "first"), "web said");
    let (here, all) = lazy_bytes(&node.area.path().join("root"));
    assert!(here * 4 < all, "{here} of {all}");
    assert_nothing_leaked(&node);

    kill_fetcher(&node);
    read_load(&node, &one, &pod, &image, "second");
    assert_eq!(node.said("second"), format!("{LOAD} read"));
    assert_nothing_leaked(&node);
    node.cri.remove_pod(&one);
    service.remove_image(&image.name).unwrap();
}

/// Has a container read what nobody has read, and say how much that is.
fn read_load(node: &Node, pod: &str, config: &PodConfig, image: &Image, name: &str) {
    let script = "n=$(busybox wc -c < /load); echo read $n";
    let command = ["/bin/busybox", "sh", "-c", script];
    node.cri.run(pod, config, &image.name, name, &command);
}

#[test]
fn who_reads_after_a_restart_waits_visibly_for_the_next_pull_which_brings_the_secret_again() {
    let (registry, _from, image) = private();
    let mut node = Node::with(&registry, true);
    let service = node.service();
    service.pull_with(&image.name, secret(PASSWORD)).unwrap();
    let pod = PodConfig::new("one", &node.area.at(""), &node.area.name());
    let one = node.cri.run_pod(&pod);
    assert_eq!(node.says(&one, &pod, &image, "first"), "web said");
    node.cri.remove_pod(&one);

    // A fetcher notes what came every five seconds: of that, the mount needs no secret, and only who reads more waits.
    std::thread::sleep(Duration::from_secs(12));
    node.stop();
    kill_fetcher(&node);
    node.start_again();
    let pod = PodConfig::new("two", &node.area.at(""), &node.area.name());
    let two = node.cri.run_pod(&pod);
    read_load(&node, &two, &pod, &image, "second");
    let ps = || {
        let output = Command::new(env!("CARGO_BIN_EXE_vellum"))
            .args(["--root", &node.area.at("root"), "ps"])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    wait_for("it is seen that it waits, and why", LIMIT, || {
        let said = ps();
        said.contains("wants a name and a password") && said.contains("crictl pull --creds")
    });
    // As other versions of the kubelet send it.
    let basic = Auth {
        auth: BASIC.into(),
        ..Auth::default()
    };
    service.pull_with(&image.name, basic).unwrap();
    assert_eq!(node.said("second"), format!("{LOAD} read"));
    assert_nothing_leaked(&node);
    node.cri.remove_pod(&two);
}

#[test]
fn a_pod_whose_mount_needs_the_secret_waits_for_the_next_pull_longer_than_a_device_may_take_to_open()
 {
    // With a hot pack more may be here by then than the mount needs.
    let (registry, _from, image) = private_with(&["--no-hot"]);
    let mut node = Node::with(&registry, true);
    let service = node.service();
    service.pull_with(&image.name, secret(PASSWORD)).unwrap();
    assert!(fetchers(&node).is_empty(), "a secret would be known");
    node.stop();
    node.start_again();
    let pod = PodConfig::new("one", &node.area.at(""), &node.area.name());
    let one = std::thread::scope(|scope| {
        let run = scope.spawn(|| node.cri.run_pod(&pod));
        std::thread::sleep(Duration::from_secs(36));
        let waits = !run.is_finished();
        let pulled = service.pull_with(&image.name, secret(PASSWORD));
        let one = run.join().unwrap();
        assert!(waits, "the mount needed nothing\n{}", node.log());
        pulled.unwrap();
        one
    });
    assert_eq!(node.says(&one, &pod, &image, "first"), "web said");
    assert!(!node.log().contains("ERROR"), "{}", node.log());
    node.cri.remove_pod(&one);
}

#[test]
fn without_the_image_service_a_private_image_is_unpacked_as_ever() {
    let (registry, _from, image) = private();
    let node = Node::with(&registry, false);
    node.cri.pull_with(&image.name, secret(PASSWORD)).unwrap();
    assert_eq!(node.fetched(&image), image.layers.len());
    assert!(node.log().contains("cannot be had"), "{}", node.log());
}

#[test]
fn an_image_service_without_containerd_says_so_and_goes_on_when_it_is_back() {
    let (registry, _from, image) = private();
    let mut node = Node::with(&registry, true);
    let service = node.service();
    let list = "runtime.v1.ImageService/ListImages";
    service.bytes(list, None).unwrap();
    node.restart_containerd(|| {
        let Err(Failure::Status(code, said)) = service.bytes(list, None) else {
            panic!("nobody is there");
        };
        assert_eq!(code, UNAVAILABLE);
        assert!(said.contains("[cri]"), "{said}");
    });
    service.bytes(list, None).unwrap();
    service.pull_with(&image.name, secret(PASSWORD)).unwrap();
    assert_eq!(node.fetched(&image), 0, "{}", node.log());
}
