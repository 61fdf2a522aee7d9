//! Containers whose file systems grow while they are used, as a root does it that has
//! CAP_SYS_RESOURCE, which that of many build machines lacks: in a virtual machine, where this same
//! program runs its ignored tests.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crate::snapshotter_support::rig::Rig;
use crate::snapshotter_support::{room, wait_for};
use nix::mount::{MntFlags, MsFlags};
use nix::sys::signal::{Signal, kill};

const SIZE: &str = "containerd.io/snapshot/vellum.size";

#[test]
fn file_systems_in_use_grow_in_a_machine_whose_root_may_do_that() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/vmtest");
    let output = Command::new(script)
        .args(["--vellum", env!("CARGO_BIN_EXE_vellum"), "--grow"])
        .arg(std::env::current_exe().unwrap())
        .stdin(Stdio::null())
        .output()
        .expect("tools/vmtest: apt-get install python3");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}{errors}", output.status);
    assert!(said.contains("grow: done"), "{said}");
}

/// A container: it has the snapshot mounted in a place of its own, and writes, syncs and reads back
/// all the time.
struct Container {
    dir: PathBuf,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    writer: Option<JoinHandle<()>>,
}

impl Container {
    fn start(rig: &Rig, source: &str, name: &str) -> Container {
        let dir = rig.area.path().join(name);
        fs::create_dir(&dir).unwrap();
        let none = None::<&str>;
        nix::mount::mount(Some(source), &dir, none, MsFlags::MS_BIND, none).unwrap();
        let (stop, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let mut file = fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(dir.join("busy"))
            .unwrap();
        let (told, count) = (stop.clone(), rounds.clone());
        let writer = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                let round = count.load(Ordering::Relaxed);
                let at = SeekFrom::Start(round % 32 * 70_000);
                let bytes = vec![round as u8; 70_000];
                file.seek(at).unwrap();
                file.write_all(&bytes).unwrap();
                file.sync_data().unwrap();
                let mut back = vec![0; bytes.len()];
                file.seek(at).unwrap();
                file.read_exact(&mut back).unwrap();
                assert!(back == bytes, "round {round}");
                count.store(round + 1, Ordering::Relaxed);
            }
        });
        Container {
            dir,
            stop,
            rounds,
            writer: Some(writer),
        }
    }

    /// It has gone on since.
    fn goes_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        wait_for(
            "the container writes on",
            std::time::Duration::from_secs(120),
            || self.rounds.load(Ordering::Relaxed) > before + 2,
        );
    }

    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.writer.take().unwrap().join().unwrap();
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        let _ = nix::mount::umount2(&self.dir, MntFlags::MNT_DETACH);
    }
}

fn fill(dir: &Path, name: &str, megabytes: usize) {
    let mut file = fs::File::create(dir.join(name)).unwrap();
    for _ in 0..megabytes {
        file.write_all(&[7; 1 << 20]).unwrap();
    }
    file.sync_all().unwrap();
}

#[test]
#[ignore = "run in the virtual machine by the test above"]
fn while_it_writes_a_container_grows_and_goes_on_through_a_kill_a_commit_and_a_reboot() {
    let mut rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    let source = rig.client.prepare("key", "base", &[]).unwrap().source;
    let container = Container::start(&rig, &source, "container");
    container.goes_on();
    assert!(room(&container.dir) < 64 << 20);
    for megabytes in [96u64, 256, 1024] {
        let label = format!("{megabytes}M");
        rig.client.update("key", &[(SIZE, &label)]).unwrap();
        let room = room(&container.dir);
        assert!(room > (megabytes << 20) * 4 / 5, "{megabytes}: {room}");
        container.goes_on();
    }
    fill(&container.dir, "big", 100);
    for pid in rig.area.workers() {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    container.goes_on();
    rig.client.update("key", &[(SIZE, "2G")]).unwrap();
    assert!(room(&container.dir) > 1700 << 20);
    let smaller = rig.client.update("key", &[(SIZE, "1G")]).unwrap_err();
    assert!(
        format!("{smaller:?}").contains("can only grow"),
        "{smaller:?}"
    );
    // Committed under it: the image is as large, and the container goes on.
    rig.client.commit("image", "key", &[]).unwrap();
    container.goes_on();
    container.end();
    let view = PathBuf::from(rig.client.view("view", "image", &[]).unwrap().source);
    assert!(room(&view) > 1700 << 20);
    assert_eq!(fs::metadata(view.join("big")).unwrap().len(), 100 << 20);
    assert_eq!(fs::read_to_string(view.join("file")).unwrap(), "base");
    let source = rig.client.prepare("child", "image", &[]).unwrap().source;
    let child = Container::start(&rig, &source, "child");
    rig.client.update("child", &[(SIZE, "3G")]).unwrap();
    fill(&child.dir, "more", 20);
    child.end();
    rig.end(Signal::SIGKILL);
    // What the kernel says of devices that are gone is no news.
    fs::write("/dev/kmsg", "vmtest: errors are expected from here on").unwrap();
    rig.area.end_devices();
    rig.start();
    let source = PathBuf::from(rig.client.mounts("child").unwrap().source);
    assert!(room(&source) > 2600 << 20);
    assert_eq!(fs::metadata(source.join("more")).unwrap().len(), 20 << 20);
    assert_eq!(fs::metadata(source.join("big")).unwrap().len(), 100 << 20);
    rig.client.remove("child").unwrap();
    rig.assert_checks();
}

#[test]
#[ignore = "run in the virtual machine by the test above"]
fn a_growth_in_use_that_is_killed_at_any_step_is_finished_by_the_next_mounts() {
    let mut rig = Rig::new("");
    rig.committed("base", "", "file", "base");
    for (number, place) in [
        "update: record in place",
        "grow: layer grown",
        "grow: device grown",
        "mount: grown",
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("key {number}");
        let source = rig.client.prepare(&key, "base", &[]).unwrap().source;
        let container = Container::start(&rig, &source, &format!("container {number}"));
        container.goes_on();
        let died = rig.dies_at(place, |client| client.update(&key, &[(SIZE, "256M")]));
        assert!(died, "it does not come by {place:?}\n{}", rig.log());
        container.goes_on();
        assert_eq!(rig.client.mounts(&key).unwrap().source, source);
        let room = room(&container.dir);
        assert!(room > 200 << 20, "{place}: {room}\n{}", rig.log());
        fill(&container.dir, "big", 80);
        container.goes_on();
        container.end();
        rig.client.remove(&key).unwrap();
    }
    rig.assert_checks();
}
