//! A disk that cannot take what was written to memory.

use vellum_base::storage::{FileStorage, OpenMode, Storage, StorageFile};

use crate::small_disk::{Mounted, SmallDisk};

const PIECE: u64 = 1 << 20;

fn write(file: &dyn StorageFile) {
    for piece in 0..64 {
        file.write_at(&[7; PIECE as usize], piece * PIECE).unwrap();
    }
}

/// The kernel tells a descriptor once. A flush that asks while a sync of another thread is told of the
/// failure would go on to acknowledge what memory may have let go of.
#[test]
fn a_failed_write_back_is_told_to_the_sync_and_to_whoever_asks_beside_it() {
    let below = tempfile::tempdir().unwrap();
    // A disk of 256 MiB with room for 24.
    let _memory = Mounted::new(&["-t", "tmpfs", "-o", "size=24m", "memory"], below.path());
    let make = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal"];
    let disk = SmallDisk::below(below.path(), &make, "256M");
    let path = disk.mount_point.join("file");

    let file = FileStorage.open(&path, OpenMode::CreateNew).unwrap();
    file.set_len(64 * PIECE).unwrap();
    file.check_written_back().unwrap();
    write(&*file);
    file.sync_data().unwrap_err();
    file.check_written_back().unwrap_err();

    // Asked first, the sync is told all the same.
    write(&*file);
    let failed = (0..500).any(|_| {
        file.start_writing_back();
        std::thread::sleep(std::time::Duration::from_millis(10));
        file.check_written_back().is_err()
    });
    assert!(failed, "nobody told of the failure");
    file.sync_data().unwrap_err();
}
