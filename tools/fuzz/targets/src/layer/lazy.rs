//! `have`, the windows of a lazy layer that are here.

use std::path::Path;
use std::sync::OnceLock;

use vellum_base::ErrorKind;
use vellum_base::block::{BLOCK_LEN, Block};
use vellum_base::block::{BlockState, Blocks, Run, Span, WindowPower};
use vellum_base::storage::SimStorage;
use vellum_core::layer::{Completion, Header, LazyContent, LazyLayer, SealedLayer};

use super::disk::{DIR, FIX, SMALL, UUID, file, fresh, put_file, template};
use super::split;
use crate::input::with_mode;
use crate::{Seed, fixup};

fn span(start: u64, len: u64) -> Span {
    Span::new(Block::new(start), Blocks::new(len))
}

/// A lazy layer of which nothing is here.
fn lazy(virtual_size: u64) -> SimStorage {
    let disk = fresh(virtual_size);
    let header = Header::read(&disk, Path::new(DIR)).unwrap();
    let extents = [
        Run::new(span(0, 20), BlockState::Data),
        Run::new(span(20, 4), BlockState::Zero),
        Run::new(span(40, 24), BlockState::Data),
    ];
    let content = LazyContent {
        power: WindowPower::LEAST,
        digest: [7; 32],
        extents: &extents,
    };
    LazyLayer::make(&disk, Path::new(DIR), &header, &content).unwrap();
    disk
}

/// Puts a window of which every block holds zeros.
fn put(open: &LazyLayer, window: u32) {
    let whole = open.power().span(window);
    let data = [span(0, 20), span(40, 24)];
    let here = data.into_iter().filter_map(|one| one.intersection(whole));
    let blocks: Vec<(Span, Vec<u8>)> = here
        .map(|span| (span, vec![0; span.len().buffer_len()]))
        .collect();
    let blocks = blocks.iter().map(|(span, bytes)| (*span, &bytes[..]));
    open.put(window, blocks).unwrap();
}

/// As [`lazy`], of which the windows 0 and 3 are here.
fn half(virtual_size: u64) -> SimStorage {
    let disk = lazy(virtual_size);
    let open = LazyLayer::open(&disk, Path::new(DIR)).unwrap().unwrap();
    for window in [0, 3] {
        put(&open, window);
    }
    open.sync().unwrap();
    disk
}

/// `have`, in a lazy layer: what is said to be here is read or found to be damaged, what is not is an error, and what comes is completed or found
/// out.
pub fn have(input: &[u8]) {
    static DISKS: [OnceLock<SimStorage>; 2] = [OnceLock::new(), OnceLock::new()];
    let Some((mode, mut bytes)) = split(input) else {
        return;
    };
    if mode & FIX != 0 {
        fixup::have(&mut bytes, UUID, SMALL);
    }
    // Of one size: a set has a bit for each window.
    let disk = template(&DISKS, 0, lazy);
    put_file(&disk, "have", &bytes);
    let dir = Path::new(DIR);
    let layer = match SealedLayer::open(&disk, dir) {
        Ok(layer) => layer,
        Err(error) => {
            let kinds = [ErrorKind::Corrupt, ErrorKind::Unsupported];
            assert!(kinds.contains(&error.kind()), "{error:?}");
            assert!(LazyLayer::open(&disk, dir).is_err());
            return;
        }
    };
    let open = LazyLayer::open(&disk, dir).unwrap().unwrap();
    let mut block = [0; BLOCK_LEN];
    for at in (0..20).chain(40..64).map(Block::new) {
        let here = open.is_here(open.power().window_of(at));
        match layer.read_blocks(&mut block, at) {
            Ok(()) => assert!(here, "{at}"),
            // Said to be here, and never brought.
            Err(error) if here => assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Absent, "{error:?}"),
        }
    }
    for window in open.missing() {
        put(&open, window);
    }
    let mut completed = open.complete(&disk, |_| {}).unwrap();
    if let Completion::Damaged(_) = completed {
        open.missing().into_iter().for_each(|one| put(&open, one));
        completed = open.complete(&disk, |_| {}).unwrap();
    }
    assert_eq!(completed, Completion::Wrong);
}

pub fn have_seeds() -> Vec<Seed> {
    let (none, some) = (file(&lazy(SMALL), "have"), file(&half(SMALL), "have"));
    let mut first = some.clone();
    // Of version 1, without checksums.
    first[8] = 1;
    vec![
        ("some-v1".into(), with_mode(FIX, &first)),
        ("none".into(), with_mode(0, &none)),
        ("some".into(), with_mode(FIX, &some)),
        ("some-raw".into(), with_mode(0, &some)),
        ("cut".into(), with_mode(FIX, &some[..4000])),
    ]
}
