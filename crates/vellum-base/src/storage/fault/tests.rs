use super::*;
use crate::storage::SimStorage;

fn storage() -> (FaultStorage, Arc<dyn StorageFile>) {
    let storage = FaultStorage::new(Arc::new(SimStorage::new()));
    let file = storage.open(Path::new("/f"), OpenMode::Create).unwrap();
    file.write_at(&[1; 8192], 0).unwrap();
    file.sync().unwrap();
    (storage, file)
}

fn plan(kind: OpKind, nth: u64, fault: Fault) -> FaultPlan {
    FaultPlan {
        kinds: vec![kind],
        nth,
        fault,
        lasting: false,
    }
}

fn read(file: &Arc<dyn StorageFile>) -> [u8; 8192] {
    let mut bytes = [0; 8192];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn the_nth_operation_of_its_kind_fails_and_no_other() {
    let (storage, file) = storage();
    storage.fail(plan(OpKind::Write, 2, Fault::Errno(libc::ENOSPC)));
    file.write_at(&[2; 10], 0).unwrap();
    file.sync().unwrap();
    let error = file.write_at(&[3; 10], 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(read(&file)[0], 2);
    file.write_at(&[4; 10], 0).unwrap();
    assert_eq!(
        (storage.fired(), storage.counts().of(OpKind::Write)),
        (1, 4)
    );
}

#[test]
fn a_short_write_leaves_whole_sectors_of_its_first_half() {
    let (storage, file) = storage();
    storage.fail(plan(OpKind::Write, 1, Fault::Short(libc::EIO)));
    file.write_at(&[2; 3000], 100).unwrap_err();
    assert_eq!((read(&file)[1535], read(&file)[1536]), (2, 1));
}

#[test]
fn what_a_sync_lost_is_gone_once_the_file_is_closed_but_for_later_writes() {
    let (storage, file) = storage();
    file.write_at(&[2; 8192], 0).unwrap();
    file.punch_hole(0, 4096).unwrap();
    file.write_durable(&[3; 4096], 4096).unwrap();
    storage.fail(plan(OpKind::SyncData, 1, Fault::LostSync(libc::EIO)));
    file.sync_data().unwrap_err();
    assert_eq!(read(&file)[..4096], [0; 4096]);
    // The kernel reports it once.
    file.write_at(&[4; 512], 512).unwrap();
    file.sync_data().unwrap();
    drop(file);
    let file = storage.open(Path::new("/f"), OpenMode::Read).unwrap();
    let bytes = read(&file);
    assert_eq!(bytes[..512], [1; 512]);
    assert_eq!(bytes[512..1024], [4; 512]);
    assert_eq!(bytes[1024..4096], [1; 3072]);
    assert_eq!(bytes[4096..], [3; 4096]);
}

#[test]
fn a_lasting_fault_lasts_until_it_is_healed() {
    let (storage, file) = storage();
    let fault = plan(OpKind::Write, 2, Fault::Errno(libc::EDQUOT));
    storage.fail(FaultPlan {
        lasting: true,
        ..fault
    });
    file.write_at(&[2], 0).unwrap();
    for _ in 0..3 {
        file.write_at(&[2], 0).unwrap_err();
    }
    storage.heal();
    file.write_at(&[2], 0).unwrap();
}
