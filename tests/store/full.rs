//! A store whose disk is full.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{Running, TestStore, run};
use crate::small_disk::{SmallDisk, row, write_synced};

/// Writes and syncs 256 KiB files until one fails; returns how many there are and the failure.
fn fill(dir: &Path) -> (u32, std::io::Error) {
    let mut number = 0u32;
    loop {
        let write = || {
            let mut file = fs::File::create(dir.join(format!("fill-{number}")))?;
            file.write_all(&vec![number as u8 | 1; 256 << 10])?;
            file.sync_all()
        };
        match write() {
            Ok(()) => number += 1,
            Err(error) => return (number, error),
        }
    }
}

#[test]
fn a_full_disk_is_no_space_and_harms_nothing_that_was_synced() {
    let disk = SmallDisk::new("96M");
    let mut store = TestStore::under(&disk.mount_point);
    store.env.push(("VELLUM_FULL_WAIT", "0.5"));
    let root = store.path("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), "base\n").unwrap();
    store.ok(&["import", "base", root.to_str().unwrap(), "--size", "1G"]);
    for name in ["hog", "other"] {
        store.ok(&["create", "base", "--name", name]);
    }
    let other = store.mount("other");
    fs::write(other.join("mine"), "mine\n").unwrap();
    fs::File::open(other.join("mine"))
        .unwrap()
        .sync_all()
        .unwrap();

    let hog = store.mount("hog");
    let (written, error) = fill(&hog);
    println!("after {written} files of 256 KiB: {error}");
    assert!(written > 20, "{written}");
    // ext4 reports what its device could not take as ENOSPC or, for its own metadata, as EIO or a
    // file system turned read-only.
    assert!(
        matches!(
            error.raw_os_error(),
            Some(libc::ENOSPC | libc::EIO | libc::EROFS)
        ),
        "{error}"
    );

    // The neighbour reads, and keeps what it has.
    assert_eq!(fs::read_to_string(other.join("file")).unwrap(), "base\n");
    assert_eq!(fs::read_to_string(other.join("mine")).unwrap(), "mine\n");
    // A command that needs room says that there is none.
    let error = store.fails(&["create", "base", "--name", "late"]);
    assert!(error.contains("No space left"), "{error}");
    assert_eq!(store.names("ps"), ["hog", "other"]);

    // The hog goes, and there is room again.
    store.ok(&["umount", "--force", "hog"]);
    store.ok(&["check"]);
    store.ok(&["rm", "hog"]);
    fs::write(other.join("after"), vec![5; 1 << 20]).unwrap();
    fs::File::open(other.join("after"))
        .unwrap()
        .sync_all()
        .unwrap();
    store.ok(&["umount", "other"]);
    let other = store.mount("other");
    assert_eq!(fs::read_to_string(other.join("mine")).unwrap(), "mine\n");
    assert_eq!(fs::read(other.join("after")).unwrap(), vec![5; 1 << 20]);
    store.ok(&["umount", "other"]);
    store.ok(&["prune"]);
    store.ok(&["check", "--scrub"]);
    store.assert_nothing_runs();
}

#[test]
fn a_container_that_met_a_full_disk_keeps_what_it_synced_and_writes_once_there_is_room() {
    let disk = SmallDisk::new("64M");
    let mut store = TestStore::under(&disk.mount_point);
    store.env.push(("VELLUM_FULL_WAIT", "0.5"));
    let root = store.path("root");
    fs::create_dir(&root).unwrap();
    store.ok(&["import", "base", root.to_str().unwrap(), "--size", "1G"]);
    store.ok(&["create", "base", "--name", "c"]);
    let ballast = store.path("ballast");
    run("fallocate", &["-l", "16M", ballast.to_str().unwrap()]);
    let dir = store.mount("c");
    let (written, error) = fill(&dir);
    println!("after {written} files of 256 KiB: {error}");
    fs::remove_file(&ballast).unwrap();
    // Where ext4 turned read-only it has to be mounted anew; otherwise it goes on as it is.
    let goes_on = fs::write(dir.join("goes-on"), "x").is_ok();
    println!("goes on without a new mount: {goes_on}");
    store.ok(&["umount", "--force", "c"]);
    let dir = store.mount("c");
    for number in 0..written {
        let body = fs::read(dir.join(format!("fill-{number}"))).unwrap();
        assert_eq!(body, vec![number as u8 | 1; 256 << 10], "file {number}");
    }
    let mut file = fs::File::create(dir.join("new")).unwrap();
    file.write_all(&vec![6; 4 << 20]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
}

/// Fills the store's disk by one container, beside one that writes little.
fn a_full_store(make: &[&str], size: &str) {
    let disk = SmallDisk::of(make, size);
    let mut store = TestStore::under(&disk.mount_point);
    store.env.push(("VELLUM_FULL_WAIT", "0.5"));
    let root = store.path("root");
    fs::create_dir(&root).unwrap();
    store.ok(&["import", "base", root.to_str().unwrap(), "--size", "1G"]);
    for name in ["hog", "light"] {
        store.ok(&["create", "base", "--name", name]);
    }
    let light = store.mount("light");
    write_synced(&light.join("mine"), b"mine").unwrap();
    let hog = store.mount("hog");
    let reserved = row(&store, "light")["space"]["reserved_bytes"].clone();
    assert!(reserved.as_u64().unwrap() >= 4 << 20, "{reserved}");
    let mut written = 0;
    while write_synced(&hog.join(format!("fill-{written}")), &vec![7; 4 << 20]).is_ok() {
        written += 1;
    }
    assert!(written > 2, "{written}");

    // The neighbour does not notice.
    for number in 0..40 {
        write_synced(&light.join(format!("file-{number}")), &[number; 4096]).unwrap();
    }
    let status = row(&store, "hog")["status"].as_str().unwrap().to_owned();
    assert!(status.starts_with("host full since"), "{status}");
    assert!(row(&store, "light")["space"]["full_since"].is_null());
    store.ok(&["check"]);

    // What met the full disk can be unmounted, mounted, and have something deleted.
    store.ok(&["umount", "hog"]);
    let hog = store.mount("hog");
    for number in 1..written {
        fs::remove_file(hog.join(format!("fill-{number}"))).unwrap();
    }
    run("sync", &["-f", hog.to_str().unwrap()]);
    assert_eq!(fs::read(hog.join("fill-0")).unwrap(), vec![7; 4 << 20]);
    write_synced(&hog.join("again"), &vec![8; 4 << 20]).unwrap();
    for name in ["hog", "light"] {
        store.ok(&["umount", name]);
    }
    let light = store.mount("light");
    assert_eq!(fs::read(light.join("file-39")).unwrap(), [39; 4096]);
    store.ok(&["umount", "light"]);
    store.ok(&["check", "--scrub"]);
    // Closed with room again, nobody keeps any.
    let layers = fs::read_dir(store.root.join("layers")).unwrap().flatten();
    let kept: Vec<_> = layers
        .map(|layer| layer.path().join("reserve"))
        .filter(|path| path.exists())
        .collect();
    assert!(kept.is_empty(), "{kept:?}");
    store.assert_nothing_runs();
}

#[test]
fn on_a_full_ext4_a_light_neighbour_goes_on_and_the_hog_can_be_mounted_to_delete() {
    a_full_store(&["mke2fs", "-q", "-t", "ext4", "-m", "0"], "160M");
}

#[test]
fn on_a_full_xfs_a_light_neighbour_goes_on_and_the_hog_can_be_mounted_to_delete() {
    a_full_store(&["mkfs.xfs", "-q"], "300M");
}

/// btrfs writes everything to a new place, so that space kept back is worth little there: containers may
/// stop to write, or their servers to serve, until there is room.
#[test]
fn on_a_full_btrfs_nothing_synced_is_lost_and_containers_go_on_once_there_is_room() {
    // Data and metadata in one: small file systems are made so.
    let disk = SmallDisk::of(&["mkfs.btrfs", "-q", "--mixed"], "300M");
    let mut store = TestStore::under(&disk.mount_point);
    store.env.push(("VELLUM_FULL_WAIT", "0.5"));
    let root = store.path("root");
    fs::create_dir(&root).unwrap();
    store.ok(&["import", "base", root.to_str().unwrap(), "--size", "1G"]);
    for name in ["hog", "light"] {
        store.ok(&["create", "base", "--name", name]);
    }
    let (hog, light) = (store.mount("hog"), store.mount("light"));
    let ballast = disk.mount_point.join("ballast");
    run("fallocate", &["-l", "100M", ballast.to_str().unwrap()]);
    let mut written = 0;
    while write_synced(&hog.join(format!("fill-{written}")), &vec![7; 4 << 20]).is_ok() {
        written += 1;
    }
    assert!(written > 2, "{written}");
    let file = |number: u8| format!("file-{number}");
    let write = |number: &u8| write_synced(&light.join(file(*number)), &[*number; 4096]).is_ok();
    let kept: Vec<u8> = (0..40).filter(write).collect();
    println!(
        "{written} files of 4 MiB, and {} small ones beside",
        kept.len()
    );

    fs::remove_file(ballast).unwrap();
    run("sync", &["-f", disk.mount_point.to_str().unwrap()]);
    for name in ["hog", "light"] {
        store.ok(&["umount", name]);
    }
    let (hog, light) = (store.mount("hog"), store.mount("light"));
    for number in 0..written {
        let found = fs::read(hog.join(format!("fill-{number}"))).unwrap();
        assert!(found == vec![7; 4 << 20], "file {number}");
    }
    for number in kept {
        assert_eq!(fs::read(light.join(file(number))).unwrap(), [number; 4096]);
    }
    for (name, dir) in [("hog", hog), ("light", light)] {
        write_synced(&dir.join("again"), &vec![8; 1 << 20]).unwrap();
        store.ok(&["umount", name]);
    }
    store.ok(&["check", "--scrub"]);
    store.assert_nothing_runs();
}

#[test]
fn a_container_whose_file_system_gave_up_is_shown_and_comes_back_with_one_command() {
    let store = TestStore::new();
    let root = store.path("root");
    fs::create_dir(&root).unwrap();
    store.ok(&["import", "base", root.to_str().unwrap(), "--size", "64M"]);
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    write_synced(&dir.join("mine"), b"mine").unwrap();
    let device = row(&store, "c")["mounted"]["device"]
        .as_str()
        .unwrap()
        .to_owned();
    let name = device.rsplit('/').next().unwrap();
    fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "a test").unwrap();
    assert!(fs::write(dir.join("refused"), "x").is_err());

    let status = row(&store, "c")["status"].as_str().unwrap().to_owned();
    assert!(status.starts_with("read-only: "), "{status}");
    let check = store.output(&["check"]);
    assert_eq!(check.status.code(), Some(1));
    let told = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(told.contains("`vellum mount c`"), "{told}");
    // Not under one who would go on with what gave up.
    let user = fs::File::open(dir.join("mine")).unwrap();
    let error = store.fails(&["mount", "c"]);
    assert!(error.contains("a program still uses it"), "{error}");
    drop(user);
    assert_eq!(store.mount("c"), dir);
    assert_eq!(fs::read(dir.join("mine")).unwrap(), b"mine");
    write_synced(&dir.join("after"), b"after").unwrap();
    assert!(
        row(&store, "c")["status"]
            .as_str()
            .unwrap()
            .starts_with("mounted at")
    );
    store.ok(&["umount", "c"]);
    store.ok(&["check"]);
}

/// A process in a mount namespace of its own, which has a copy of every mount as long as it lives.
fn in_a_namespace(script: &str) -> Running {
    let mut process = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    std::io::Read::read_exact(process.stdout.as_mut().unwrap(), &mut ready).unwrap();
    Running(process)
}

#[test]
fn what_gave_up_is_mounted_anew_when_the_last_copy_of_its_mount_is_gone_and_not_before() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let give_up = || {
        let device = row(&store, "c")["mounted"]["device"].clone();
        let name = device
            .as_str()
            .unwrap()
            .rsplit('/')
            .next()
            .unwrap()
            .to_owned();
        fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "a test").unwrap();
        assert!(fs::write(dir.join("refused"), "x").is_err());
    };
    // As the servers of another container are started.
    let brief = in_a_namespace("echo ready; sleep 1");
    give_up();
    assert_eq!(store.mount("c"), dir);
    write_synced(&dir.join("after"), b"after").unwrap();
    drop(brief);

    let lasting = in_a_namespace("echo ready; read line");
    give_up();
    let error = store.fails(&["mount", "c"]);
    let whose = format!("mount namespace of process {}", lasting.0.id());
    assert!(error.contains(&whose), "{error}");
    drop(lasting);
    assert_eq!(store.mount("c"), dir);
    assert_eq!(fs::read(dir.join("after")).unwrap(), b"after");
    write_synced(&dir.join("again"), b"again").unwrap();
    store.ok(&["umount", "c"]);
    store.assert_nothing_runs();
}

#[test]
fn an_export_that_does_not_fit_says_so_and_leaves_nothing() {
    let disk = SmallDisk::new("1M");
    let store = TestStore::new();
    let root = store.path("root");
    fs::create_dir_all(root.join("etc")).unwrap();
    let mut noise = vec![0; 4 << 20];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut noise))
        .unwrap();
    fs::write(root.join("etc/noise"), noise).unwrap();
    store.ok(&["import", "base", root.to_str().unwrap(), "--size", "64M"]);
    let target = disk.mount_point.join("out");
    let shown = target.to_str().unwrap();
    for format in ["raw", "qcow2", "tar", "oci", "docker"] {
        let said = store.fails(&["export", "base", shown, "--format", format]);
        assert!(
            said.contains("No space left") && said.contains(shown),
            "{said}"
        );
        let left = fs::read_dir(&disk.mount_point).unwrap().count();
        assert_eq!(left, 1, "lost+found alone, after {said}");
    }
    store.fails(&["export", "base", shown, "--format", "qcow2", "--layers"]);
    assert_eq!(fs::read_dir(&disk.mount_point).unwrap().count(), 1);
    store.assert_nothing_runs();
}
