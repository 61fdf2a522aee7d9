use super::super::FileStorage;
use super::*;
use std::collections::BTreeSet;
use std::path::PathBuf;

const DIR: &str = "/layer";

fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

fn disk() -> SimStorage {
    let disk = SimStorage::new();
    disk.create_dir(Path::new(DIR)).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk
}

fn names(disk: &SimStorage) -> Vec<String> {
    let entries = disk.list(Path::new(DIR)).unwrap();
    entries.into_iter().map(|entry| entry.name).collect()
}

fn outcomes<T: Ord>(disk: &SimStorage, each: impl Fn(&SimStorage) -> T) -> BTreeSet<T> {
    (0..300).map(|seed| each(&disk.cut(seed))).collect()
}

#[test]
fn names_of_an_unsynced_directory_survive_in_any_subset() {
    let disk = disk();
    disk.open(&path("a"), OpenMode::CreateNew).unwrap();
    disk.open(&path("b"), OpenMode::CreateNew).unwrap();
    assert_eq!(outcomes(&disk, names).len(), 4);
    disk.sync_dir(Path::new(DIR)).unwrap();
    assert_eq!(
        outcomes(&disk, names),
        [vec!["a".into(), "b".into()]].into()
    );
}

#[test]
fn an_atomic_replacement_leaves_the_old_or_the_new_content_whole_after_any_cut() {
    let disk = disk();
    disk.write_atomic(&path("f"), &[1; 3000]).unwrap();
    let cuts = disk.changes();
    for n in 1.. {
        let again = disk.fork();
        again.arm(n);
        let result = again.write_atomic(&path("f"), &[2; 5000]);
        for seed in 0..50 {
            let bytes = again.cut(seed).read_all(&path("f"), 9000).unwrap();
            let new = bytes == [2; 5000];
            assert!(
                new || (bytes == [1; 3000] && result.is_err()),
                "cut {n}, seed {seed}"
            );
        }
        if result.is_ok() {
            assert!(n > 5 && cuts > 5);
            break;
        }
        assert!(again.is_off());
    }
}

#[test]
fn after_the_cut_everything_fails_and_says_why() {
    let disk = disk();
    let file = disk.open(&path("f"), OpenMode::Create).unwrap();
    disk.arm(2);
    file.write_at(&[1; 512], 0).unwrap();
    assert!(is_power_cut(&file.sync_data().unwrap_err()));
    assert!(is_power_cut(&file.read_at(&mut [0], 0).unwrap_err()));
    assert!(is_power_cut(&disk.list(Path::new(DIR)).unwrap_err()));
}

#[test]
fn a_seed_gives_the_same_disk_every_time() {
    let disk = disk();
    let file = disk.open(&path("f"), OpenMode::Create).unwrap();
    disk.sync_dir(Path::new(DIR)).unwrap();
    file.write_at(&[7; 40960], 0).unwrap();
    let read = |seed| disk.cut(seed).read_all(&path("f"), 50000).unwrap();
    for seed in 0..20 {
        assert_eq!(read(seed), read(seed));
    }
}

/// A store's `staging` may hold a file where a layer's directory is expected.
#[test]
fn below_a_file_nothing_is_there_on_either_storage() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SimStorage::new();
    let storages: [(&dyn Storage, &Path); 2] =
        [(&FileStorage, dir.path()), (&disk, Path::new("/"))];
    for (storage, top) in storages {
        let file = top.join("file");
        storage.open(&file, OpenMode::CreateNew).unwrap();
        assert!(storage.exists(&file).unwrap());
        assert!(!storage.exists(&file.join("lease")).unwrap());
        assert!(!storage.exists(&top.join("other/lease")).unwrap());
    }
}
