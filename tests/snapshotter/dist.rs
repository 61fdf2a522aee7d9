//! What is shipped beside the program: the Kubernetes manifest, the systemd unit, the
//! configuration. And `vellum doctor`, which says whether a host is ready for them.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use vellum_snapshotter::config::{Config, DEFAULT_ADDRESS, DEFAULT_SIZE, LogFormat, MountMode};
use vellum_snapshotter::content::DEFAULT_CONTAINERD;

fn dist(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("dist")
        .join(name)
}

fn run(command: &mut Command, package: &str) -> Output {
    let name = command.get_program().display().to_string();
    command
        .output()
        .unwrap_or_else(|error| panic!("{name}: {error}: apt-get install {package}"))
}

/// Every key and value against Kubernetes' own description of its API, as its Python client
/// carries it: unknown keys, wrong types and missing ones are errors.
const VALIDATE: &str = r#"
import sys, re, yaml
try:
    from kubernetes.client import models
except ImportError:
    sys.exit("apt-get install python3-kubernetes")

def check(value, kind, where):
    if m := re.fullmatch(r"list\[(.*)\]", kind):
        assert isinstance(value, list), f"{where}: a list is wanted"
        for number, item in enumerate(value):
            check(item, m[1], f"{where}[{number}]")
    elif m := re.fullmatch(r"dict\(str, (.*)\)", kind):
        assert isinstance(value, dict), f"{where}: an object is wanted"
        for key, item in value.items():
            assert isinstance(key, str), f"{where}: {key!r} is no string"
            check(item, m[1], f"{where}.{key}")
    elif kind in ("str", "bool", "int", "float"):
        assert type(value).__name__ == kind, f"{where}: {value!r} is no {kind}"
    elif kind == "object":
        # IntOrString and the like
        assert isinstance(value, (str, int)), f"{where}: {value!r}"
    else:
        model = getattr(models, kind)
        assert isinstance(value, dict), f"{where}: an object is wanted"
        names = {name: attribute for attribute, name in model.attribute_map.items()}
        arguments = {}
        for key, item in value.items():
            assert key in names, f"{where}: unknown key {key!r}"
            check(item, model.openapi_types[names[key]], f"{where}.{key}")
            arguments[names[key]] = item
        # Says which required key is missing.
        model(**arguments)

KINDS = {("v1", "Namespace"): "V1Namespace", ("v1", "ConfigMap"): "V1ConfigMap",
         ("apps/v1", "DaemonSet"): "V1DaemonSet"}
documents = list(yaml.safe_load_all(sys.stdin))
for document in documents:
    kind = KINDS[(document["apiVersion"], document["kind"])]
    check(document, kind, kind)
sets = [d for d in documents if d["kind"] == "DaemonSet"]
assert len(sets) == 1
spec = sets[0]["spec"]
labels = spec["template"]["metadata"]["labels"]
for key, value in spec["selector"]["matchLabels"].items():
    assert labels.get(key) == value, "the selector does not choose its own pods"
volumes = {v["name"] for v in spec["template"]["spec"]["volumes"]}
for container in spec["template"]["spec"]["containers"]:
    for mount in container["volumeMounts"]:
        assert mount["name"] in volumes, f"there is no volume {mount['name']}"
for document in documents:
    if document["kind"] == "ConfigMap":
        print(document["data"]["config.toml"])
"#;

fn validate(yaml: &str) -> Output {
    use std::io::Write;
    use std::process::Stdio;
    let mut child = Command::new("/usr/bin/python3")
        .args(["-c", VALIDATE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("python3: {error}: apt-get install python3-kubernetes"));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(yaml.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn the_kubernetes_manifest_fits_the_api_and_its_configuration_is_one() {
    let yaml = fs::read_to_string(dist("kubernetes.yaml")).unwrap();
    let output = validate(&yaml);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), &output.stdout).unwrap();
    let config = Config::load(Some(file.path())).unwrap();
    assert_eq!(config.address.as_deref(), Some(Path::new(DEFAULT_ADDRESS)));
    assert!(config.metrics.address.is_some());

    // The check can fail.
    for (from, to, why) in [
        ("hostPID: true", "hostPid: true", "hostPid"),
        ("hostPID: true", "hostPID: 'yes'", "hostPID"),
        ("maxUnavailable: 1", "maxUnavailable: [1]", "maxUnavailable"),
        ("      containers:", "      initContainers:", "containers"),
    ] {
        assert!(yaml.contains(from));
        let output = validate(&yaml.replacen(from, to, 1));
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && error.contains(why),
            "{why}: {error}"
        );
    }
}

#[test]
fn systemd_takes_the_unit() {
    let dir = tempfile::tempdir().unwrap();
    let unit = dir.path().join("vellum-snapshotter.service");
    let text = fs::read_to_string(dist("vellum-snapshotter.service")).unwrap();
    // Where it is installed is not looked at; that it is a program is.
    let text = text.replace("=vellum ", "=/bin/true ");
    fs::write(&unit, &text).unwrap();
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]).arg(&unit);
    let output = run(&mut verify, "systemd");
    let said = String::from_utf8_lossy(&output.stderr);
    let about_it: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("vellum-snapshotter"))
        .collect();
    assert_eq!(about_it, Vec::<&str>::new());
    // The check can fail.
    fs::write(&unit, text.replace("KillMode=process", "KilMode=process")).unwrap();
    let output = run(&mut verify, "systemd");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("KilMode"), "{said}");
    for line in [
        "Type=notify",
        "Before=containerd.service",
        "KillMode=process",
        // Whatever ends it, and however often.
        "Restart=always",
        "StartLimitIntervalSec=0",
        "OOMScoreAdjust=-999",
    ] {
        assert!(text.lines().any(|there| there == line), "{line}");
    }
}

#[test]
fn the_timer_that_takes_snapshots_is_one_for_systemd_and_says_the_commands_that_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let mut service = String::new();
    for kind in ["service", "timer"] {
        let text = fs::read_to_string(dist(&format!("vellum-snapshot@.{kind}"))).unwrap();
        let installed = text.replace("=vellum ", "=/bin/true ");
        fs::write(
            dir.path().join(format!("vellum-snapshot@db.{kind}")),
            installed,
        )
        .unwrap();
        if kind == "service" {
            service = text;
        }
    }
    let mut verify = Command::new("systemd-analyze");
    verify
        .args(["verify", "--man=no"])
        .arg(dir.path().join("vellum-snapshot@db.timer"));
    let output = run(&mut verify, "systemd");
    let said = String::from_utf8_lossy(&output.stderr);
    let about_it = said
        .lines()
        .filter(|line| line.contains("vellum-snapshot@"));
    assert_eq!(about_it.collect::<Vec<_>>(), Vec::<&str>::new());
    let root = dir.path().join("store");
    let mut make = Command::new(env!("CARGO_BIN_EXE_vellum"));
    make.arg("--root").arg(&root);
    run(make.args(["volume", "create", "any"]), "vellum");
    for line in service
        .lines()
        .filter_map(|line| line.strip_prefix("ExecStart="))
    {
        let mut words = line.split(' ').skip(1).collect::<Vec<_>>();
        // The command line is understood: it fails over the container, not over its words.
        words.splice(0..0, ["--root", root.to_str().unwrap()]);
        let output = Command::new(env!("CARGO_BIN_EXE_vellum"))
            .args(&words)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{line}: {said}");
        let words = ["container", "%i"];
        assert!(
            words.iter().all(|word| said.contains(word)),
            "{line}: {said}"
        );
    }
}

#[test]
fn the_configuration_that_is_shipped_says_the_defaults() {
    let config = Config::load(Some(&dist("config.toml"))).unwrap();
    assert_eq!(config.root.as_deref(), Some(Path::new("/var/lib/vellum")));
    assert_eq!(config.address.as_deref(), Some(Path::new(DEFAULT_ADDRESS)));
    assert_eq!(config.size().unwrap(), DEFAULT_SIZE);
    assert_eq!(config.mounts, MountMode::Bind);
    assert_eq!(config.metrics.address, None);
    let containerd = config.diff.containerd.as_deref();
    assert_eq!(containerd, Some(Path::new(DEFAULT_CONTAINERD)));
    assert_eq!(config.log.format, LogFormat::Text);
}

fn doctor(arguments: &[&str]) -> (Option<i32>, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_vellum"))
        .args(["--json", "doctor"])
        .args(arguments)
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code(), report["findings"].clone())
}

fn finding<'a>(findings: &'a Value, check: &str) -> &'a Value {
    let all = findings.as_array().unwrap();
    let found = all.iter().find(|finding| finding["check"] == check);
    found.unwrap_or_else(|| panic!("{check}: {findings:#}"))
}

#[test]
fn doctor_finds_what_this_host_has_and_makes_no_store() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("not/there/yet");
    let none = dir.path().join("none.toml").display().to_string();
    let root_text = root.display().to_string();
    let arguments = ["--root", &root_text, "--containerd-config", &none];
    let (status, findings) = doctor(&arguments);
    assert_eq!(status, Some(0), "{findings:#}");
    for check in [
        "privileges",
        "kernel",
        "FUSE",
        "mke2fs",
        "resize2fs",
        "store",
    ] {
        assert_eq!(finding(&findings, check)["state"], "ok", "{findings:#}");
    }
    assert_eq!(finding(&findings, "containerd")["state"], "note");
    assert!(!dir.path().join("not").exists());
    let output = Command::new(env!("CARGO_BIN_EXE_vellum"))
        .arg("doctor")
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.lines().any(|line| line == "ok       FUSE: /dev/fuse"),
        "{text}"
    );
}

/// A file system that keeps no holes.
struct Ramfs(tempfile::TempDir);

impl Drop for Ramfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn doctor_fails_where_the_store_would_keep_no_holes_and_says_what_to_do() {
    let place = Ramfs(tempfile::tempdir().unwrap());
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(
        Some("none"),
        place.0.path(),
        Some("ramfs"),
        flags,
        None::<&str>,
    )
    .unwrap();
    let root = place.0.path().join("store").display().to_string();
    let (status, findings) = doctor(&["--root", &root]);
    assert_eq!(status, Some(1));
    let store = finding(&findings, "store");
    assert_eq!(store["state"], "missing");
    assert!(
        store["advice"].as_str().unwrap().contains("--root"),
        "{store}"
    );
}

#[test]
fn doctor_compares_containerds_configuration_with_ours() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (config, containerd) = (at("config.toml"), at("containerd.toml"));
    fs::write(
        &config,
        format!("root = '{}'\naddress = '{}'\n", at("root"), at("sock")),
    )
    .unwrap();
    let look = || {
        let arguments = ["--config", &config, "--containerd-config", &containerd];
        let (status, findings) = doctor(&arguments);
        assert_eq!(status, Some(0), "warnings are no failure: {findings:#}");
        findings
    };
    fs::write(&containerd, "version = 2\n").unwrap();
    let findings = look();
    let entry = finding(&findings, "containerd");
    assert_eq!(entry["state"], "warning");
    let advice = entry["advice"].as_str().unwrap().to_owned();
    // What it advises is what it wants, to the letter.
    let (_, add) = advice.split_once('\n').unwrap();
    fs::write(&containerd, add).unwrap();
    let findings = look();
    assert_eq!(
        finding(&findings, "containerd")["state"],
        "ok",
        "{findings:#}"
    );
    assert_eq!(finding(&findings, "exports.root")["state"], "ok");
    assert_eq!(
        finding(&findings, "snapshotter")["state"],
        "warning",
        "nobody answers"
    );
    fs::write(&containerd, add.replace(&at("root"), "/elsewhere")).unwrap();
    let findings = look();
    let exports = finding(&findings, "exports.root");
    assert_eq!(exports["state"], "warning");
    assert!(
        exports["advice"].as_str().unwrap().contains(&at("root")),
        "{exports}"
    );
    fs::write(&containerd, "version = \n").unwrap();
    assert_eq!(finding(&look(), "containerd")["state"], "warning");

    // Of annotations only where the snapshotter wants any.
    let has_annotations = |findings: &Value| findings.to_string().contains("\"annotations\"");
    let cri = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"vellum\"\n";
    fs::write(&containerd, format!("version = 2\n{add}\n{cri}")).unwrap();
    assert!(!has_annotations(&look()));
    let own = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        format!("{own}[remote]\nfrom = ['registry.example']\n"),
    )
    .unwrap();
    let findings = look();
    let found = finding(&findings, "annotations");
    assert_eq!(found["state"], "warning");
    let advice = found["advice"].as_str().unwrap();
    assert!(
        advice.contains("disable_snapshot_annotations = false"),
        "{advice}"
    );
}
