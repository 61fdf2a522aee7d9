//! Snapshots that become larger than what they stand on, also where they are.

use std::fs;
use std::path::Path;

use crate::snapshotter_support::client::INVALID_ARGUMENT;
use crate::snapshotter_support::mounted::Mounted;
use crate::snapshotter_support::rig::Rig;
use crate::snapshotter_support::{SIZE, room};

#[test]
fn a_larger_size_grows_the_file_system() {
    let rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    let same = rig.client.prepare("same", "base", &[]).unwrap().source;
    for (key, label) in [
        ("ours", SIZE),
        ("theirs", "containerd.io/snapshot/max-size"),
    ] {
        let larger = [(label, "201326592")];
        let source = rig.client.prepare(key, "base", &larger).unwrap().source;
        let (large, small) = (room(&source), room(&same));
        assert!(large > 170 << 20 && small < 64 << 20, "{large} {small}");
        // The new room can be used, and what was there is.
        if key == "ours" {
            fs::write(Path::new(&source).join("big"), vec![1; 70 << 20]).unwrap();
        }
        assert_eq!(
            fs::read_to_string(Path::new(&source).join("file")).unwrap(),
            "base"
        );
    }
    let smaller = rig
        .client
        .prepare("small", "base", &[(SIZE, "32M")])
        .unwrap_err();
    assert_eq!(smaller.code(), Some(INVALID_ARGUMENT));
}

#[test]
fn an_update_makes_a_snapshot_larger_where_it_is_and_refuses_to_make_it_smaller() {
    let mut rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    let source = rig.client.prepare("key", "base", &[]).unwrap().source;
    fs::write(Path::new(&source).join("own"), "own").unwrap();
    assert!(room(&source) < 64 << 20);
    for (label, size) in [(SIZE, "192M"), ("containerd.io/snapshot/max-size", "1G")] {
        let info = rig
            .client
            .update("key", &[(label, size), ("a", "b")])
            .unwrap();
        assert_eq!(info.labels[label], size);
        assert_eq!(rig.client.mounts("key").unwrap().source, source);
    }
    assert!(room(&source) > 950 << 20, "{}", room(&source));
    fs::write(Path::new(&source).join("big"), vec![1; 100 << 20]).unwrap();
    assert_eq!(
        fs::read_to_string(Path::new(&source).join("own")).unwrap(),
        "own"
    );
    // The same again is no change; less is refused, and says why.
    rig.client.update("key", &[(SIZE, "1G")]).unwrap();
    let smaller = rig.client.update("key", &[(SIZE, "192M")]).unwrap_err();
    assert_eq!(smaller.code(), Some(INVALID_ARGUMENT), "{smaller:?}");
    assert!(
        format!("{smaller:?}").contains("can only grow"),
        "{smaller:?}"
    );
    let huge = rig.client.update("key", &[(SIZE, "100T")]).unwrap_err();
    assert_eq!(huge.code(), Some(INVALID_ARGUMENT), "{huge:?}");
    assert_eq!(rig.client.stat("key").unwrap().labels[SIZE], "1G");
    rig.client.update("key", &[]).unwrap();
    // Its server knows, also the next one, and so does a reboot.
    fs::File::open(Path::new(&source).join("big"))
        .unwrap()
        .sync_all()
        .unwrap();
    rig.end(nix::sys::signal::Signal::SIGKILL);
    rig.area.end_devices();
    rig.start();
    let source = rig.client.mounts("key").unwrap().source;
    assert!(room(&source) > 950 << 20);
    // What it becomes is as large, and so is what is made of that.
    rig.client.commit("image", "key", &[]).unwrap();
    let view = rig.client.view("view", "image", &[]).unwrap().source;
    assert!(room(&view) > 950 << 20);
    assert_eq!(
        fs::metadata(Path::new(&view).join("big")).unwrap().len(),
        100 << 20
    );
    let child = rig.client.prepare("child", "image", &[]).unwrap().source;
    assert!(room(&child) > 950 << 20);
    let committed = rig.client.update("image", &[(SIZE, "64M")]);
    committed.expect("of a committed one it is a word like others");
    rig.assert_whole("grown");
    rig.assert_checks();
}

/// The loop device grows under those who write to it, whatever this host's root may do to a mounted
/// ext4: that is tested in a virtual machine.
#[test]
fn a_device_grows_under_a_program_that_writes_to_it_and_through_kills_of_its_server() {
    use std::os::unix::fs::FileExt;
    let rig = Rig::new("mounts = 'device'\n");
    let source = rig
        .client
        .prepare("key", "", &[(SIZE, "64M")])
        .unwrap()
        .source;
    let device = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&source)
        .unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let size = |source: &str| {
        let mut file = fs::File::open(source).unwrap();
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).unwrap()
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let at = (16 << 20) + round % 512 * 65536;
                device.write_all_at(&[round as u8; 65536], at).unwrap();
                device.sync_data().unwrap();
                let mut back = [0; 65536];
                device.read_exact_at(&mut back, at).unwrap();
                assert!(back.iter().all(|byte| *byte == round as u8));
                round += 1;
            }
        });
        for (megabytes, kill) in [(128u64, false), (256, true), (1024, true)] {
            let label = format!("{megabytes}M");
            rig.client.update("key", &[(SIZE, &label)]).unwrap();
            assert_eq!(size(&source), megabytes << 20);
            let end = (megabytes << 20) - 4096;
            device.write_all_at(&[5; 4096], end).unwrap();
            device.sync_data().unwrap();
            if kill {
                let workers = rig.area.workers();
                assert!(!workers.is_empty());
                for pid in workers {
                    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
                }
            }
            let mut back = [0; 4096];
            device.read_exact_at(&mut back, end).unwrap();
            assert_eq!(back, [5; 4096]);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    // The program that has it open would have to grow the file system itself.
    drop(device);
    let mounted = Mounted::new(&rig, "mounted", &rig.client.mounts("key").unwrap());
    assert!(room(&mounted.0) > 950 << 20);
    drop(mounted);
    rig.client.remove("key").unwrap();
    rig.assert_whole("grown");
}
