//! How much blocks of lazy layers take is bounded: docs/lazy.md, "A bounded cache".

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::common::{TestStore, kill, wait_until};
use crate::lazy::{end_fetchers, fetchers, lazy_layers};
use crate::registry_support::{Registry, clean, digests, store};

const BOUND: u64 = 8 << 20;
/// Of the image: much more than the bound.
const SIZE: usize = 28 << 20;
/// What requests bring while room is made, and what the host's file system takes beside blocks.
const IN_FLIGHT: u64 = 5 << 20;

/// Bytes that do not compress, the same each time.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = (0..SIZE / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

/// A registry that has `big:1`, the store that pushed it, and one with a bound that pulled it lazily.
fn pulled() -> (Registry, TestStore, TestStore) {
    let (registry, from, to) = (Registry::new(), store(), store());
    let root = from.path("root");
    fs::create_dir_all(&root).unwrap();
    fs::write(root.join("noise"), noise()).unwrap();
    let root = root.display().to_string();
    from.ok(&["import", "big", &root, "--size", "64M"]);
    let image = registry.image("big:1");
    from.ok(&["push", "big", &image, "--format", "blocks"]);
    to.ok(&["space", "--cache", "8M"]);
    to.ok(&["pull", "--lazy", &image, "big"]);
    (registry, from, to)
}

/// What the data of lazy layers takes on the disk.
fn taken(store: &TestStore) -> u64 {
    let dirs = store.layers().into_iter();
    dirs.map(|layer| store.root.join("layers").join(layer))
        .filter(|dir| dir.join("have").exists())
        .filter_map(|dir| fs::metadata(dir.join("data")).ok())
        .map(|data| data.blocks() * 512)
        .sum()
}

/// Looks what is taken until it is dropped.
struct Most {
    stop: Arc<AtomicBool>,
    most: Arc<AtomicU64>,
    looker: Option<std::thread::JoinHandle<()>>,
}

impl Most {
    fn of(store: &Arc<TestStore>) -> Most {
        let (stop, most) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (store, told, found) = (Arc::clone(store), Arc::clone(&stop), Arc::clone(&most));
        let look = move || {
            while !told.load(Ordering::SeqCst) {
                found.fetch_max(taken(&store), Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        let looker = Some(std::thread::spawn(look));
        Most { stop, most, looker }
    }

    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.looker.take().unwrap().join().unwrap();
        self.most.load(Ordering::SeqCst)
    }
}

#[test]
fn all_of_an_image_is_read_twice_within_the_bound_and_every_byte_is_right() {
    let (_registry, _from, to) = pulled();
    let to = Arc::new(to);
    let most = Most::of(&to);
    to.ok(&["create", "big", "--name", "c"]);
    for _ in 0..2 {
        let dir = to.mount("c");
        assert!(fs::read(dir.join("noise")).unwrap() == noise());
        to.ok(&["umount", "c"]);
    }
    let most = most.end();
    assert!(most > BOUND / 2, "{most}");
    assert!(most <= BOUND + IN_FLIGHT, "{most}");
    let said = to.ok(&["space"]);
    assert!(said.contains("of lazy layers, at most 8.39MB"), "{said}");
    let space = to.json(&["space"]);
    assert_eq!(space["cache"]["layers"], 1, "{space}");
    assert!(space["cache"]["bytes"].as_u64().unwrap() <= BOUND + IN_FLIGHT);
    end_fetchers(&to);
    to.ok(&["check", "--scrub"]);
    clean(&to);
}

#[test]
fn readers_in_other_processes_see_right_bytes_while_the_fetcher_evicts_and_dies() {
    let (_registry, from, to) = pulled();
    from.ok(&["export", "big", &from.arg("big.raw"), "--format", "raw"]);
    let right = fs::read(from.path("big.raw")).unwrap();
    let to = Arc::new(to);
    let stop = Arc::new(AtomicBool::new(false));
    let (own, told) = (Arc::clone(&to), Arc::clone(&stop));
    let killer = std::thread::spawn(move || {
        let mut count = 0;
        while !told.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(700));
            for pid in fetchers(&own) {
                kill(pid);
                count += 1;
            }
        }
        count
    });
    std::thread::scope(|scope| {
        for reader in 0..3 {
            let (to, right) = (&to, &right);
            scope.spawn(move || {
                let name = format!("{reader}.raw");
                to.ok(&["export", "big", &to.arg(&name), "--format", "raw"]);
                assert!(fs::read(to.path(&name)).unwrap() == *right, "{reader}");
            });
        }
    });
    stop.store(true, Ordering::SeqCst);
    assert!(killer.join().unwrap() > 0, "nobody was killed");
    end_fetchers(&to);
    to.ok(&["check", "--scrub"]);
}

#[test]
fn what_somebody_wants_all_of_is_completed_and_not_evicted() {
    let (mut registry, from, to) = pulled();
    to.ok(&["complete", "big"]);
    assert_eq!(digests(&to, "big"), digests(&from, "big"));
    end_fetchers(&to);
    registry.stop();
    to.ok(&["export", "big", &to.arg("big.raw"), "--format", "raw"]);
    assert_eq!(to.json(&["space"])["cache"]["layers"], 0);
}

#[test]
fn in_the_background_an_image_is_completed_whatever_the_bound() {
    let (registry, from, to) = pulled();
    to.ok(&[
        "pull",
        "--lazy",
        "--background",
        &registry.image("big:1"),
        "again",
    ]);
    assert_eq!(to.json(&["space"])["cache"]["layers"], 0);
    wait_until("all is here", || lazy_layers(&to) == 0);
    assert_eq!(digests(&to, "big"), digests(&from, "big"));
    end_fetchers(&to);
}

#[test]
fn a_bound_that_is_set_later_counts_for_what_is_here_and_one_that_is_too_small_is_refused() {
    let (_registry, from, to) = pulled();
    to.ok(&["space", "--cache", "off"]);
    to.ok(&["create", "big", "--name", "c"]);
    let dir = to.mount("c");
    let mut half = vec![0; SIZE / 2];
    std::io::Read::read_exact(&mut fs::File::open(dir.join("noise")).unwrap(), &mut half).unwrap();
    assert!(taken(&to) > BOUND + IN_FLIGHT);
    let said = to.fails(&["space", "--cache", "1M"]);
    assert!(said.contains("less than 8.39MB"), "{said}");
    to.ok(&["space", "--cache", "8M"]);
    wait_until("what is too much is gone", || {
        taken(&to) <= BOUND + (1 << 20)
    });
    assert!(fs::read(dir.join("noise")).unwrap() == noise());
    to.ok(&["umount", "c"]);
    end_fetchers(&to);
    drop(from);
}

#[test]
fn a_bound_that_is_damaged_holds_up_no_read_is_found_by_check_and_set_anew() {
    let (_registry, _from, to) = pulled();
    end_fetchers(&to);
    fs::write(to.root.join("cache.json"), "{").unwrap();
    to.ok(&["create", "big", "--name", "c"]);
    let dir = to.mount("c");
    assert!(fs::read(dir.join("noise")).unwrap() == noise());
    to.ok(&["umount", "c"]);
    end_fetchers(&to);
    let output = to.output(&["check"]);
    assert_eq!(output.status.code(), Some(1));
    let said =
        String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("set it anew: `vellum space --cache SIZE`"),
        "{said}"
    );
    to.ok(&["space", "--cache", "off"]);
    end_fetchers(&to);
    to.ok(&["check"]);
}
