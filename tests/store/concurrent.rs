//! Several `vellum` processes on one store at once, and some that are killed.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{SIZE, TestStore};
use vellum_base::storage::{FaultStorage, FileStorage, OpKind};
use vellum_store::{DiskInfo, ImageRecord, LayerInfo, NewContainer, Store};

fn start(store: &TestStore, arguments: &[&str]) -> Child {
    store
        .command()
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for all; returns how many succeeded and what the others said.
fn outcomes(children: Vec<Child>) -> (usize, Vec<String>) {
    let mut good = 0;
    let mut errors = Vec::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            good += 1;
        } else {
            errors.push(String::from_utf8_lossy(&output.stderr).into_owned());
        }
    }
    (good, errors)
}

#[test]
fn of_several_that_want_a_name_exactly_one_gets_it() {
    let store = TestStore::new();
    store.small_image("base");
    let root = store.arg("small-root");
    let create: Vec<Child> = (0..6)
        .map(|_| start(&store, &["create", "base", "--name", "same"]))
        .collect();
    let import: Vec<Child> = (0..3)
        .map(|_| start(&store, &["import", "same", &root, "--size", SIZE]))
        .collect();
    for (what, children) in [("container same", create), ("image same", import)] {
        let (good, errors) = outcomes(children);
        assert_eq!(good, 1, "{errors:?}");
        for error in errors {
            assert!(
                error.contains(&format!(
                    "there is a{} {what} already",
                    if what.starts_with('i') { "n" } else { "" }
                )),
                "{error}"
            );
        }
    }
    // Without a name each gets another.
    let create: Vec<Child> = (0..6).map(|_| start(&store, &["create", "base"])).collect();
    assert_eq!(outcomes(create).0, 6);
    assert_eq!(store.names("ps").len(), 7);
    store.ok(&["prune"]);
    store.ok(&["check"]);
}

#[test]
fn imports_creates_removals_and_prunes_at_once_do_not_disturb_each_other() {
    let store = TestStore::new();
    store.small_image("base");
    let root = store.arg("small-root");
    std::thread::scope(|scope| {
        let import = scope.spawn(|| {
            for round in 0..4 {
                let name = format!("i{round}");
                store.ok(&["import", &name, &root, "--size", SIZE]);
                store.ok(&["create", &name, "--name", &name]);
                if round % 2 == 0 {
                    store.ok(&["rm", &name]);
                    store.ok(&["rmi", &name]);
                }
            }
        });
        let create = scope.spawn(|| {
            for round in 0..20 {
                let name = format!("c{round}");
                store.ok(&["create", "base", "--name", &name]);
                if round % 2 == 0 {
                    store.ok(&["rm", &name]);
                }
            }
        });
        while !import.is_finished() || !create.is_finished() {
            store.ok(&["prune"]);
            // A removal that found the store busy leaves its layer to prune; nothing else shows.
            let output = store.output(&["--json", "check"]);
            let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            for finding in report["findings"].as_array().unwrap() {
                let fine = finding["severity"] == "note" || finding["what"] == "leftover";
                assert!(fine, "{finding:#}");
            }
        }
    });
    assert_eq!(store.names("images"), ["base", "i1", "i3"]);
    assert_eq!(store.names("ps").len(), 12);
    store.ok(&["prune"]);
    store.ok(&["check", "--scrub"]);
    for name in ["i1", "c19"] {
        let dir = store.mount(name);
        assert_eq!(fs::read(dir.join("file")).unwrap(), vec![7; 100_000]);
        store.ok(&["umount", name]);
    }
}

#[test]
fn a_prune_takes_nothing_from_an_import_that_reads_slowly() {
    let store = TestStore::new();
    store.small_image("base");
    let mut child = store
        .command()
        .args(["import", "slow", "-", "--from", "base"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut tar = tar::Builder::new(child.stdin.take().unwrap());
    for number in 0..10 {
        let mut header = tar::Header::new_gnu();
        header.set_size(10_000);
        header.set_mode(0o644);
        let body = vec![number as u8; 10_000];
        tar.append_data(&mut header, format!("slow-{number}"), &body[..])
            .unwrap();
        let report = store.json(&["prune"]);
        assert_eq!(report["layers"], serde_json::json!([]));
        assert_eq!(report["leftovers"], serde_json::json!([]));
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(tar.into_inner().unwrap());
    assert!(child.wait().unwrap().success());
    store.ok(&["create", "slow", "--name", "c"]);
    let dir = store.mount("c");
    for number in 0..10 {
        let body = fs::read(dir.join(format!("slow-{number}"))).unwrap();
        assert_eq!(body, vec![number; 10_000]);
    }
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
}

/// What must hold after a command was killed at any moment.
fn check_after_kill(store: &TestStore, when: &str) {
    store.ok(&["prune"]);
    let report = store.output(&["check"]);
    assert!(
        report.status.success(),
        "{when}: {}{}",
        String::from_utf8_lossy(&report.stdout),
        String::from_utf8_lossy(&report.stderr)
    );
    let staging = fs::read_dir(store.root.join("staging")).unwrap().count();
    let trash = fs::read_dir(store.root.join("trash")).unwrap().count();
    assert_eq!((staging, trash), (0, 0), "{when}");
}

/// Starts a command `rounds` times, each time killed somewhat later, until it ends by itself.
fn kill_at_many_moments(
    store: &TestStore,
    rounds: u32,
    mut arguments: impl FnMut(u32) -> Vec<String>,
    mut check: impl FnMut(u32, bool),
) {
    let begin = Instant::now();
    let all = arguments(0);
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    store.ok(&all);
    let whole = begin.elapsed();
    check(0, true);
    for round in 1..=rounds {
        let all = arguments(round);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let mut child = store
            .command()
            .args(&all)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // All over the time that the whole takes; the last ones may come too late.
        std::thread::sleep(whole * round / rounds);
        let _ = child.kill();
        let ended = child.wait().unwrap().success();
        check(round, ended);
    }
}

#[test]
fn an_import_killed_at_any_moment_shows_whole_or_not_at_all() {
    let store = TestStore::new();
    store.small_image("base");
    let more = store.path("more");
    fs::create_dir(&more).unwrap();
    fs::write(more.join("app"), vec![9; 500_000]).unwrap();
    store.ok(&["prune"]);
    let disk = store.disk_usage();
    let source = store.arg("more");
    kill_at_many_moments(
        &store,
        16,
        |round| {
            let name = format!("i{round}");
            ["import", &name, &source, "--from", "base"]
                .map(str::to_owned)
                .to_vec()
        },
        |round, ended| {
            let name = format!("i{round}");
            let listed = store.names("images").contains(&name);
            assert!(listed || !ended, "round {round}");
            check_after_kill(&store, &name);
            store.assert_nothing_runs();
            if listed {
                store.ok(&["create", &name, "--name", "look"]);
                let dir = store.mount("look");
                assert_eq!(fs::read(dir.join("app")).unwrap(), vec![9; 500_000]);
                store.ok(&["umount", "look"]);
                store.ok(&["rm", "look"]);
                store.ok(&["rmi", &name]);
            }
        },
    );
    store.ok(&["prune"]);
    assert_eq!(store.names("images"), ["base"]);
    let grown = store.disk_usage().saturating_sub(disk);
    assert!(
        grown <= 64 << 10,
        "{grown} bytes are left of what was killed"
    );
}

#[test]
fn a_create_and_a_removal_killed_at_any_moment_leave_a_whole_container_or_none() {
    let store = TestStore::new();
    store.small_image("base");
    let mut made = Vec::new();
    kill_at_many_moments(
        &store,
        24,
        |round| {
            let name = format!("c{round}");
            ["create", "base", "--name", &name]
                .map(str::to_owned)
                .to_vec()
        },
        |round, ended| {
            let name = format!("c{round}");
            let listed = store.names("ps").contains(&name);
            assert!(listed || !ended, "round {round}");
            check_after_kill(&store, &name);
            made.extend(listed.then_some(name));
        },
    );
    assert!(!made.is_empty());
    // Enough to remove one each round.
    let rounds = 24;
    for round in 0..=rounds {
        store.ok(&["create", "base", "--name", &format!("r{round}")]);
    }
    kill_at_many_moments(
        &store,
        rounds,
        |round| ["rm", &format!("r{round}")].map(str::to_owned).to_vec(),
        |round, ended| {
            let name = format!("r{round}");
            let listed = store.names("ps").contains(&name);
            assert!(!listed || !ended, "round {round}");
            check_after_kill(&store, &name);
        },
    );
    let left = store.names("ps");
    // Any that is listed works.
    for name in left.iter().take(2) {
        let dir = store.mount(name);
        assert_eq!(fs::read(dir.join("file")).unwrap().len(), 100_000);
        store.ok(&["umount", name]);
    }
    let mut arguments = vec!["rm"];
    arguments.extend(left.iter().map(String::as_str));
    store.ok(&arguments);
    store.ok(&["rmi", "base"]);
    store.ok(&["prune"]);
    assert_eq!(store.layers(), Vec::<String>::new());
    store.assert_nothing_runs();
}

#[test]
fn a_commit_killed_at_any_moment_costs_the_container_nothing() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    kill_at_many_moments(
        &store,
        16,
        |round| {
            fs::write(dir.join("round"), round.to_string()).unwrap();
            ["commit", "c", &format!("i{round}")]
                .map(str::to_owned)
                .to_vec()
        },
        |round, ended| {
            let name = format!("i{round}");
            // Still mounted, and written again: the freeze of a killed commit ends by itself.
            let begin = Instant::now();
            fs::write(dir.join("alive"), round.to_string()).unwrap();
            assert!(begin.elapsed() < Duration::from_secs(15), "round {round}");
            let listed = store.names("images").contains(&name);
            assert!(listed || !ended, "round {round}");
            check_after_kill(&store, &name);
            if listed {
                store.ok(&["create", &name, "--name", "look"]);
                let look = store.mount("look");
                let content = fs::read_to_string(look.join("round")).unwrap();
                assert_eq!(content, round.to_string());
                store.ok(&["umount", "look"]);
                store.ok(&["rm", "look"]);
                store.ok(&["rmi", &name]);
            }
        },
    );
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
    let dir = store.mount("c");
    assert_eq!(fs::read_to_string(dir.join("alive")).unwrap(), "16");
    assert_eq!(fs::read(dir.join("file")).unwrap(), vec![7; 100_000]);
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}

#[test]
fn a_layer_that_prune_and_its_owner_remove_at_once_is_removed_without_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path()).unwrap();
    for _ in 0..20 {
        let layers: Vec<_> = {
            let pin = store.pin_layers().unwrap();
            (0..8)
                .map(|_| {
                    let staged = store.stage_layer(None, 1 << 20).unwrap();
                    staged.publish(&LayerInfo::default(), &pin).unwrap()
                })
                .collect()
        };
        thread::scope(|scope| {
            let prune = scope.spawn(|| store.prune().map(drop));
            for layer in layers {
                store.discard_layer(layer).unwrap();
            }
            prune.join().unwrap().unwrap();
        });
        assert!(store.layers().unwrap().is_empty());
    }
}

/// A store without a device, with the image `base` and the containers `one` and `two` of it.
fn two_containers(root: &Path, storage: FaultStorage) -> Store {
    let store = Store::with_storage(root, Arc::new(storage)).unwrap();
    {
        let pin = store.pin_layers().unwrap();
        let staged = store.stage_layer(None, 1 << 20).unwrap();
        let layer = staged.publish(&LayerInfo::default(), &pin).unwrap();
        let image = ImageRecord {
            name: "base".into(),
            id: layer,
            layers: vec![layer],
            disk: DiskInfo {
                virtual_size: 1 << 20,
                device_size: None,
                fs: None,
                holds: None,
            },
            config: Default::default(),
            created: String::new(),
        };
        store.put_image(&image, &pin).unwrap();
    }
    for name in ["one", "two"] {
        create(&store, name);
    }
    store
}

fn create(store: &Store, name: &str) {
    let new = NewContainer {
        image: "base",
        name: Some(name),
        ..NewContainer::default()
    };
    store.create_container(&new).unwrap();
}

#[test]
fn nobody_waits_for_files_to_be_unlinked() {
    let dir = tempfile::tempdir().unwrap();
    let storage = FaultStorage::new(Arc::new(FileStorage));
    let store = two_containers(dir.path(), storage.clone());
    fs::create_dir(dir.path().join("staging/half-made")).unwrap();
    type Removal = fn(&Store);
    let removals: [(&str, Removal); 3] = [
        ("rm", |store| drop(store.remove_container("one").unwrap())),
        ("prune", |store| drop(store.prune().unwrap())),
        ("rmi", |store| drop(store.remove_image("base").unwrap())),
    ];
    for (what, removal) in removals {
        if what == "rmi" {
            for container in store.containers().unwrap() {
                store.remove_container(&container.name).unwrap();
            }
        }
        let (unlinking, begun) = mpsc::channel();
        let (go_on, told) = mpsc::channel::<()>();
        let told = Mutex::new(told);
        let in_trash = |path: &Path| path.parent().is_some_and(|dir| dir.ends_with("trash"));
        storage.set_hook(Some(Arc::new(move |kind, path| {
            if kind == OpKind::Remove && in_trash(path) {
                unlinking.send(()).unwrap();
                // As long as the test lasts; it is over when the other end is gone.
                let _ = told.lock().unwrap().recv();
            }
        })));
        thread::scope(|scope| {
            let remover = scope.spawn(|| removal(&store));
            let limit = Duration::from_secs(120);
            begun.recv_timeout(limit).expect(what);
            // Both locks are free: layers can be made, named and collected.
            assert!(store.try_collection_lock().unwrap().is_some(), "{what}");
            if what != "rmi" {
                create(&store, what);
            }
            drop(store.lock().unwrap());
            assert!(!remover.is_finished(), "{what}");
            drop(go_on);
        });
        storage.set_hook(None);
        assert_eq!(fs::read_dir(dir.path().join("trash")).unwrap().count(), 0);
    }
    assert!(store.layers().unwrap().is_empty());
}

#[test]
fn a_removal_beside_others_that_make_layers_frees_the_containers_own_and_says_what_it_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let store = two_containers(dir.path(), FaultStorage::new(Arc::new(FileStorage)));
    let layer = |name: &str| store.layer_dir(store.container(name).unwrap().top);
    let one = layer("one");
    let data = vec![7; 1 << 20];
    fs::write(one.join("more"), &data).unwrap();
    // As an import or a diff holds it for as long as it takes.
    let pin = store.pin_layers().unwrap();
    let report = store.remove_container("one").unwrap();
    assert!(!one.exists());
    assert!(!report.busy, "all that was its own is gone");
    assert!(report.bytes >= 1 << 20, "{report:?}");
    store.remove_container("two").unwrap();
    let report = store.remove_image("base").unwrap();
    assert!(report.busy, "its layer is still there: {report:?}");
    // What a crash leaves in the trash is nobody's, whoever makes layers.
    let trash = dir
        .path()
        .join("trash/00000000-0000-0000-0000-000000000001");
    fs::create_dir(&trash).unwrap();
    fs::write(trash.join("data"), &data).unwrap();
    let report = store.prune().unwrap();
    assert!(report.busy && !trash.exists(), "{report:?}");
    assert!(report.bytes >= 1 << 20, "{report:?}");
    drop(pin);
    let report = store.prune().unwrap();
    assert_eq!((report.layers.len(), report.busy), (1, false));
    assert!(report.bytes > 0, "{report:?}");
}
