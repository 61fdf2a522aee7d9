//! Images whose blocks come when they are read: docs/lazy.md.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::{TestStore, kill, wait_until};
use crate::registry_support::{Registry, clean, digests, pushed, store, with_images};
use crate::uring::Offered;

/// A registry that has `web:1`, the store that pushed it, and one that pulled it lazily.
fn pulled() -> (Registry, TestStore, TestStore) {
    let (registry, from, to) = pushed();
    let report = to.json(&["pull", "--lazy", &registry.image("web:1"), "web"]);
    assert_eq!(report["came"], "lazily");
    (registry, from, to)
}

/// The store's fetchers.
pub fn fetchers(store: &TestStore) -> Vec<i32> {
    let processes = store.processes().into_iter();
    let ours = processes.filter(|(_, command)| command.starts_with("@vellum-fetcher"));
    ours.map(|(pid, _)| pid).collect()
}

pub fn end_fetchers(store: &TestStore) {
    fetchers(store).into_iter().for_each(kill);
}

pub fn files(store: &TestStore, image: &str) -> crate::image_support::Snapshot {
    store.look(image, crate::image_support::snapshot)
}

#[test]
fn a_lazy_image_is_used_before_its_blocks_are_here_and_has_the_same_files() {
    let (_registry, from, to) = pulled();
    let before = to.disk_usage();
    assert!(before < from.disk_usage() / 2, "{before}");
    assert_eq!(files(&to, "web"), files(&from, "web"));
    assert!(to.disk_usage() > before);
    to.ok(&["rmi", "web"]);
    end_fetchers(&to);
    // The empty file system that images begin with.
    to.ok(&["prune"]);
    clean(&to);
}

#[test]
fn a_command_runs_in_an_image_that_was_pulled_lazily_for_it() {
    let (registry, _from, to) = pushed();
    let image = registry.image("web:1");
    let said = to.ok(&[
        "run",
        "--lazy",
        "--name",
        "w",
        &image,
        "--",
        "sh",
        "-c",
        "read x </etc/web; echo $x",
    ]);
    assert_eq!(said, "web\n");
    end_fetchers(&to);
}

#[test]
fn a_completed_image_has_the_digests_of_the_one_that_was_pushed_and_needs_no_registry() {
    let (mut registry, from, to) = pulled();
    let said = to.ok(&["complete", "web"]);
    assert!(said.starts_with("completed web: "), "{said}");
    end_fetchers(&to);
    registry.stop();
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    assert_eq!(files(&to, "web"), files(&from, "web"));
    assert_eq!(to.ok(&["complete", "web"]), "all of web is here\n");
    clean(&to);
}

#[test]
fn a_second_image_of_the_same_layers_shares_what_came_of_them() {
    let (registry, _from, to) = pulled();
    let report = to.json(&["pull", "--lazy", &registry.image("web:1"), "again"]);
    let layers = report["layers"].as_array().unwrap();
    assert!(
        layers.iter().all(|layer| layer["existed"] == true),
        "{report}"
    );
    to.ok(&["complete", "again"]);
    assert_eq!(to.ok(&["complete", "web"]), "all of web is here\n");
    end_fetchers(&to);
}

/// Reads a file past the page cache, as whoever comes after a restart does.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads that wait for a registry that is gone are seen, hold up nothing, and are answered when it is back.
fn while_the_registry_is_gone(transport: &'static str) {
    let (mut registry, from, mut to) = pulled();
    to.env.push(("VELLUM_TRANSPORT", transport));
    to.ok(&["create", "web", "--name", "c"]);
    let dir = {
        let _offered = (transport == "ring").then(|| Offered::new("Y"));
        to.mount("c")
    };
    registry.stop();
    let shell = dir.join("bin/sh");
    let reader = std::thread::spawn(move || read(&shell).unwrap());
    wait_until("ps says who waits", || {
        to.ok(&["ps"]).contains("waiting for registry")
    });
    wait_until("and why", || to.ok(&["ps"]).contains("no answer from"));
    let began = Instant::now();
    fs::write(dir.join("new"), vec![7; 3 << 20]).unwrap();
    fs::File::open(dir.join("new")).unwrap().sync_all().unwrap();
    to.ok(&["snapshot", "c", "meanwhile"]);
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
    assert!(!reader.is_finished());
    registry.start_again();
    assert_eq!(reader.join().unwrap(), fs::read("/bin/busybox").unwrap());
    assert!(!to.ok(&["ps"]).contains("waiting"));
    to.ok(&["umount", "c"]);
    end_fetchers(&to);
    drop(from);
}

#[test]
fn while_the_registry_is_gone_reads_wait_visibly_and_writes_go_on_and_all_is_well_when_it_is_back()
{
    while_the_registry_is_gone("classic");
}

/// Whose threads wait for the disk themselves while nobody else wants them.
#[test]
fn by_a_ring_too_reads_that_wait_for_a_registry_hold_up_nothing() {
    while_the_registry_is_gone("ring");
}

#[test]
fn a_mount_whose_first_block_is_not_here_waits_for_the_registry_as_long_as_a_read_does() {
    let (mut registry, from, to) = pulled();
    to.ok(&["create", "web", "--name", "c"]);
    registry.stop();
    let to = std::sync::Arc::new(to);
    let own = to.clone();
    let mount = std::thread::spawn(move || own.mount("c"));
    // Longer than a device may take that waits for nothing.
    std::thread::sleep(Duration::from_secs(33));
    assert!(!mount.is_finished(), "{:?}", mount.join());
    assert!(to.ok(&["ps"]).contains("waiting for registry"));
    registry.start_again();
    let dir = mount.join().unwrap();
    assert_eq!(read(&dir.join("etc/web")).unwrap(), b"web\n");
    to.ok(&["umount", "c"]);
    end_fetchers(&to);
    drop(from);
}

#[test]
fn a_mount_that_the_registry_does_not_answer_in_time_says_what_that_said() {
    let (mut registry, _from, mut to) = pulled();
    to.env.push(("VELLUM_STALL", "fail"));
    to.ok(&["create", "web", "--name", "c"]);
    registry.stop();
    let said = to.fails(&["mount", "c"]);
    assert!(said.contains("no answer from"), "{said}");
    end_fetchers(&to);
}

#[test]
fn what_does_not_come_in_time_is_an_error_that_says_what_the_registry_said_and_the_next_read_has_it()
 {
    let (mut registry, _from, mut to) = pulled();
    to.env.push(("VELLUM_STALL", "1"));
    registry.stop();
    let said = to.fails(&["export", "web", &to.arg("web.raw"), "--format", "raw"]);
    assert!(said.contains("no answer from"), "{said}");
    registry.start_again();
    end_fetchers(&to);
    to.ok(&["export", "web", &to.arg("web.raw"), "--format", "raw"]);
    end_fetchers(&to);
}

#[test]
fn a_registry_that_is_not_there_or_without_the_data_is_told_at_the_pull() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    let pushed = from.json(&[
        "push",
        "web",
        &registry.image("web:1"),
        "--format",
        "blocks",
    ]);
    for digest in registry.data_blobs(pushed["digest"].as_str().unwrap()) {
        fs::remove_file(registry.blob_file(&digest)).unwrap();
    }
    let said = to.fails(&["pull", "--lazy", &registry.image("web:1"), "web"]);
    assert!(said.contains("404"), "{said}");
    assert!(to.names("images").is_empty());
    to.ok(&["prune"]);
    clean(&to);
}

/// All bytes of the data blobs, changed or put back.
fn with_data_blobs(registry: &Registry, change: impl Fn(&mut Vec<u8>)) {
    for (path, len) in registry.blobs() {
        let mut bytes = fs::read(&path).unwrap();
        // A frame of zstd begins so, and tars are gzip.
        if len > 4 && bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            change(&mut bytes);
            fs::write(&path, bytes).unwrap();
        }
    }
}

#[test]
fn wrong_bytes_of_the_registry_are_never_shown() {
    let (registry, from, mut to) = pulled();
    to.env.push(("VELLUM_STALL", "1"));
    // Every chunk has some, and the frames stay frames.
    let flip = |bytes: &mut Vec<u8>| {
        bytes
            .iter_mut()
            .skip(40)
            .step_by(50)
            .for_each(|byte| *byte ^= 1)
    };
    with_data_blobs(&registry, flip);
    let raw = to.arg("web.raw");
    let said = to.fails(&["export", "web", &raw, "--format", "raw"]);
    assert!(said.contains("does not match its SHA-256"), "{said}");
    with_data_blobs(&registry, flip);
    to.ok(&["export", "web", &raw, "--format", "raw"]);
    from.ok(&["export", "web", &from.arg("web.raw"), "--format", "raw"]);
    assert!(fs::read(to.path("web.raw")).unwrap() == fs::read(from.path("web.raw")).unwrap());
    end_fetchers(&to);
}

#[test]
fn a_fetcher_that_is_killed_again_and_again_costs_time_and_no_byte() {
    let (_registry, from, to) = pulled();
    let to = std::sync::Arc::new(to);
    let (killed, stop) = (
        to.clone(),
        std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)),
    );
    let told = stop.clone();
    let killer = std::thread::spawn(move || {
        let mut count = 0;
        while !told.load(std::sync::atomic::Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(350));
            for pid in fetchers(&killed) {
                kill(pid);
                count += 1;
            }
        }
        count
    });
    to.ok(&["create", "web", "--name", "c"]);
    let dir = to.mount("c");
    assert_eq!(
        read(&dir.join("bin/sh")).unwrap(),
        fs::read("/bin/busybox").unwrap()
    );
    assert_eq!(read(&dir.join("etc/web")).unwrap(), b"web\n");
    to.ok(&["umount", "c"]);
    to.ok(&["complete", "web"]);
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    let count = killer.join().unwrap();
    assert!(count > 0, "nobody was killed");
    end_fetchers(&to);
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    to.ok(&["check", "--scrub"]);
}

/// Layers that have no seal yet. Of one whose completion was killed behind that, `have` may be left.
pub fn lazy_layers(store: &TestStore) -> usize {
    let dirs = store.layers().into_iter();
    dirs.map(|layer| store.root.join("layers").join(layer))
        .filter(|dir| dir.join("have").exists() && !dir.join("seal").exists())
        .count()
}

#[test]
fn what_nobody_reads_comes_in_the_background_also_after_the_fetcher_was_killed() {
    let (mut registry, from, to) = pushed();
    let image = registry.image("web:1");
    let pull = ["pull", "--lazy", "--background=300K", &image, "web"];
    to.ok(&pull);
    assert!(lazy_layers(&to) > 0);
    // At this rate it takes seconds.
    wait_until("one fetches", || !fetchers(&to).is_empty());
    end_fetchers(&to);
    assert!(lazy_layers(&to) > 0);
    // A mount starts another one, which goes on with all of it, whether or not anything is read that is not here.
    assert_eq!(
        to.look("web", |dir| read(&dir.join("etc/web")).unwrap()),
        b"web\n"
    );
    wait_until("all is here", || lazy_layers(&to) == 0);
    end_fetchers(&to);
    registry.stop();
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    assert_eq!(files(&to, "web"), files(&from, "web"));
    end_fetchers(&to);
    clean(&to);
}

#[test]
fn the_background_keeps_its_rate_and_wants_a_lazy_pull() {
    let (registry, _from, to) = pushed();
    let image = registry.image("web:1");
    for (arguments, why) in [
        (&["pull", "--background", &image, "web"][..], "--lazy"),
        (
            &["pull", "--lazy", "--background=0", &image, "web"][..],
            "out of range",
        ),
    ] {
        let output = to.output(arguments);
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(why), "{said}");
    }
    let stored: u64 = registry.blobs().iter().map(|(_, len)| len).sum();
    let began = Instant::now();
    to.ok(&["pull", "--lazy", "--background=200K", &image, "web"]);
    wait_until("all is here", || lazy_layers(&to) == 0);
    let took = began.elapsed().as_secs_f64();
    end_fetchers(&to);
    // The plain image's blobs are beside those of the blocks, and about as long.
    let least = stored as f64 / 200e3 / 4.0;
    assert!(took > least, "{took} s for {stored} bytes");
}
