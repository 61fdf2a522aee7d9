//! What must hold of a layer whatever its files are.

use std::path::Path;

use vellum_base::block::{BLOCK_SIZE, BlockDevice, Durability, MAX_VIRTUAL_SIZE, Span};
use vellum_base::storage::SimStorage;
use vellum_base::{Error, ErrorKind};
use vellum_core::layer::{SealedLayer, Severity, check_layer, seal_in_place};

use super::disk::{DIR, open_on};

/// Layers of up to this many blocks of data are read whole.
const READABLE: u64 = 1024;
/// So many blocks of a device are looked at.
const SAMPLES: u64 = 64;

/// What blocks hold; `None` for one that cannot be read. All of a small device, samples of a large.
fn content(device: &dyn BlockDevice) -> Vec<Option<Vec<u8>>> {
    let blocks = device.size() / BLOCK_SIZE;
    let step = (blocks / SAMPLES).max(1);
    let read = |block: u64| {
        let mut bytes = vec![0; BLOCK_SIZE as usize];
        match device.read_at(&mut bytes, block * BLOCK_SIZE) {
            Ok(()) => Some(bytes),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
                None
            }
        }
    };
    (0..blocks).step_by(step as usize).map(read).collect()
}

/// An error says that the layer is bad and nothing else, and names it.
fn judge(error: &Error) {
    let kinds = [
        ErrorKind::Corrupt,
        ErrorKind::Unsupported,
        ErrorKind::InvalidInput,
        ErrorKind::NotFound,
    ];
    assert!(kinds.contains(&error.kind()), "{error:?}");
    assert!(error.to_string().contains(DIR), "{error}");
}

/// Looks a layer over, opens it, reads it, and, where it can be written, writes, closes, seals.
///
/// * `check` changes nothing, and finds damage wherever opening fails for damage.
/// * Opening again shows the same.
/// * What is written and flushed is there after closing; the rest is as before.
/// * After sealing too, and every block then fits its checksum.
pub(super) fn exercise(disk: &SimStorage, is_sealed: bool, deep: bool) {
    let before = disk.changes();
    let found = check_layer(disk, Path::new(DIR), deep);
    assert_eq!(disk.changes(), before, "a check changed something");
    let damaged = found
        .iter()
        .any(|finding| finding.severity == Severity::Damage);
    let chain = match open_on(disk, is_sealed) {
        Ok(chain) => chain,
        Err(error) => {
            judge(&error);
            let excused = error.kind() == ErrorKind::InvalidInput;
            assert!(damaged || excused, "{error}, but check is content");
            return;
        }
    };
    assert!(chain.size() <= MAX_VIRTUAL_SIZE);
    let shown = content(&chain);
    let _ = chain.extents(0, chain.size(), 100).unwrap();
    chain
        .read_at(&mut [0; 512], chain.size())
        .expect_err("a read past the end");
    if is_sealed {
        let layer = SealedLayer::open(disk, Path::new(DIR)).unwrap();
        let all = Span::up_to(layer.header().blocks());
        layer
            .for_each_run(|run| assert!(!run.is_empty() && all.contains(run.span)))
            .unwrap();
        if layer.data_blocks().get() <= READABLE {
            let _ = layer.scrub(|_| {}).inspect_err(judge);
        }
        return;
    }
    drop(chain);
    let chain = open_on(disk, false).expect("it was opened a moment ago");
    assert!(
        content(&chain) == shown,
        "another open shows something else"
    );
    let last = chain.size() - BLOCK_SIZE;
    chain
        .write_at(&[0x77; 1000], last + 512, Durability::Buffered)
        .unwrap();
    chain.discard(0, BLOCK_SIZE.min(last)).unwrap();
    chain.flush().unwrap();
    let expected = content(&chain);
    chain.close().unwrap();
    drop(chain);
    let chain = open_on(disk, false).expect("it was closed in order");
    assert!(content(&chain) == expected, "something flushed is gone");
    let data_blocks = chain.top().unwrap().data_blocks().get();
    assert!(data_blocks <= chain.size() / BLOCK_SIZE);
    chain.top().unwrap().seal().unwrap();
    drop(chain);
    if data_blocks <= READABLE {
        seal_in_place(disk, Path::new(DIR), |_| {}).unwrap();
        let layer = SealedLayer::open(disk, Path::new(DIR)).unwrap();
        assert_eq!(layer.data_blocks().get(), data_blocks);
        let report = layer.scrub(|_| {}).unwrap();
        assert!(report.corrupt.is_empty() && report.digest.is_some());
    }
    let chain = open_on(disk, true).expect("it was sealed in order");
    assert!(content(&chain) == expected, "sealing changed something");
}
