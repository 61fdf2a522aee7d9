//! What a layer keeps in the host's memory.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use vellum_base::block::{BlockDevice, Durability};
use vellum_base::storage::{FileStorage, Storage};
use vellum_core::chain::{ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, WritableLayer};

const WRITTEN: u64 = 128 << 20;
const PIECE: u64 = 64 << 10;

/// Bytes of a file that the page cache holds.
fn in_memory(file: &Path) -> u64 {
    let mut fincore = Command::new("fincore");
    fincore.args(["--bytes", "--noheadings", "--raw", "--output", "RES"]);
    let output = fincore
        .arg(file)
        .output()
        .expect("fincore (util-linux) is not there");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

/// The file system on the device has it in memory, too, as far as anybody wants it.
#[test]
fn what_was_written_and_flushed_piece_by_piece_does_not_stay_in_memory() {
    // Not where /tmp may be a tmpfs, which is memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let storage: Arc<dyn Storage> = Arc::new(FileStorage);
    let top = dir.path().join("top");
    WritableLayer::create(&*storage, &top, &Header::new(None, WRITTEN).unwrap()).unwrap();
    let spec = ChainSpec {
        sealed: vec![],
        top: Some(top.clone()),
        options: LayerOptions::default(),
    };
    let chain = open_chain(&storage, &spec).unwrap();
    let piece = |offset: u64| vec![(offset / PIECE) as u8 | 1; PIECE as usize];
    for offset in (0..WRITTEN).step_by(PIECE as usize) {
        chain
            .write_at(&piece(offset), offset, Durability::Durable)
            .unwrap();
    }
    let resident = in_memory(&top.join("data"));
    assert!(resident < WRITTEN / 2, "{resident} bytes of {WRITTEN}");
    let mut read = vec![0; PIECE as usize];
    for offset in (0..WRITTEN).step_by(PIECE as usize) {
        chain.read_at(&mut read, offset).unwrap();
        assert_eq!(read, piece(offset), "at {offset}");
    }
}
