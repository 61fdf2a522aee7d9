use super::*;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::super::Remote;
use crate::registry::digest_of;
use vellum_base::block::{BLOCK_LEN, Block, Blocks, Span, WindowPower};
use vellum_base::storage::{Fault, FaultPlan, FaultStorage, FileStorage, OpKind, Storage};
use vellum_core::layer::{Header, LazyContent, LazyLayer, WritableLayer};
use vellum_registry::artifact::LayerEncoder;

/// Sixteen windows.
const SIZE: usize = 1 << 20;
const WINDOW: u64 = 64 << 10;

/// The fetcher of a store with a lazy layer, whose blocks are in a directory.
struct Stage {
    _dir: TempDir,
    faults: Arc<FaultStorage>,
    fetcher: Fetcher,
    layer: Uuid,
}

/// What `remote` and `table` say of a layer, whose data is in `layout` then.
fn pushed(layout: &Path, level: i32) -> (Remote, Vec<u8>, LazyParts) {
    let bytes: Vec<u8> = (0..SIZE)
        .map(|at| (at / 5 + at / BLOCK_LEN) as u8)
        .collect();
    let mut encoder = LayerEncoder::new(Vec::new(), WindowPower::LEAST, level).unwrap();
    encoder.data(Block::FIRST, &bytes).unwrap();
    let encoded = encoder.finish(SIZE as u64, [0; 32]).unwrap();
    let data = digest_of(encoded.sha256);
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    fs::write(blobs.join(data.trim_start_matches("sha256:")), encoded.out).unwrap();
    let table = encoded.table.encode().unwrap();
    let remote = Remote {
        reference: format!("file://{}:1", layout.display()),
        plain_http: false,
        table: digest_of(Sha256::digest(&table).into()),
        data: Some(data),
        background: None,
        keep: false,
    };
    (remote, table, encoded.table.extents)
}

type LazyParts = Vec<vellum_base::block::Run<vellum_base::block::BlockState>>;

impl Stage {
    fn new() -> Stage {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        fs::create_dir(&root).unwrap();
        let faults = Arc::new(FaultStorage::new(Arc::new(FileStorage)));
        let store = Store::with_storage(&root, faults.clone()).unwrap();
        let (remote, table, extents) = pushed(&dir.path().join("layout"), 3);
        let header = Header::new(None, SIZE as u64).unwrap();
        let layer_dir = store.layer_dir(header.uuid);
        WritableLayer::create(&*faults, &layer_dir, &header).unwrap();
        let content = LazyContent {
            power: WindowPower::LEAST,
            digest: [0; 32],
            extents: &extents,
        };
        LazyLayer::make(&*faults, &layer_dir, &header, &content).unwrap();
        remote.write(&*faults, &layer_dir, (&table, None)).unwrap();
        let fetcher = Fetcher::new(store);
        fetcher.cache.set_limit(Some(16 * WINDOW));
        Stage {
            _dir: dir,
            faults,
            fetcher,
            layer: header.uuid,
        }
    }

    fn open(&self) -> Arc<Incoming> {
        self.fetcher.layer(self.layer).unwrap().unwrap()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.fetcher.store.layer_dir(self.layer).join(name)
    }

    /// What the layer's blocks take.
    fn taken(&self) -> u64 {
        fs::metadata(self.file("data")).unwrap().blocks() * 512
    }
}

/// Whoever sees that a window is missing has to ask once more when nobody else can be at it: it may have come meanwhile.
#[test]
fn windows_that_came_since_they_were_seen_missing_are_not_fetched() {
    let stage = Stage::new();
    let layer = stage.open();
    let missing = [2, 3, 4];
    layer.want(2..4).unwrap();
    let claim = layer.claim(&missing).unwrap();
    assert_eq!(claim.windows.first(), Some(&4));
    assert!(layer.claim(&missing).is_none());
    drop(claim);
    layer.want(4..5).unwrap();
    assert!(layer.claim(&missing).is_none());
}

fn here(open: &Incoming) -> Vec<u32> {
    (0..16).filter(|window| open.has(*window)).collect()
}

/// Reads the first nine windows, one after the other, and returns what is here then: with the last of them come eight.
fn read_up_to_eight(open: &Incoming) -> Vec<u32> {
    for window in 0..8 {
        open.want(window..window + 1).unwrap();
    }
    assert_eq!(here(open), Vec::from_iter(0..8));
    open.want(8..9).unwrap();
    here(open)
}

#[test]
fn what_is_behind_who_reads_in_order_comes_although_nobody_waits_for_it() {
    let stage = Stage::new();
    stage.fetcher.cache.set_limit(None);
    let open = stage.open();
    // With the last of these, its four.
    assert_eq!(read_up_to_eight(&open), Vec::from_iter(0..12));
    while let Some(brought) = stage.fetcher.ahead.bring_next(&stage.fetcher) {
        brought.unwrap();
    }
    assert!(open.is_all_here());
}

#[test]
fn with_a_bound_what_is_behind_who_reads_in_order_comes_in_their_request() {
    let stage = Stage::new();
    let open = stage.open();
    assert_eq!(read_up_to_eight(&open), Vec::from_iter(0..16));
    let ahead = stage.fetcher.ahead.bring_next(&stage.fetcher);
    assert!(ahead.is_none());
}

#[test]
fn of_who_reads_here_and_there_nothing_comes_that_was_not_wanted() {
    let stage = Stage::new();
    stage.fetcher.cache.set_limit(None);
    let open = stage.open();
    open.want(5..6).unwrap();
    assert_eq!(here(&open), [5]);
    let ahead = stage.fetcher.ahead.bring_next(&stage.fetcher);
    assert!(ahead.is_none());
}

/// Two who have a layer open each forget it, where one has failed and the other has opened it anew.
#[test]
fn who_was_forgotten_changes_nothing_of_a_layer_that_was_opened_anew() {
    let stage = Stage::new();
    let old = stage.open();
    old.want(0..4).unwrap();
    stage.fetcher.forget(stage.layer, &old);
    let new = stage.open();
    assert!(!Arc::ptr_eq(&old, &new));
    stage.fetcher.forget(stage.layer, &old);
    assert!(Arc::ptr_eq(&stage.open(), &new));
    assert!(stage.fetcher.cache.holds(stage.layer));
    old.want(8..9).unwrap_err();
    assert!(old.sync().is_err());
    assert!(old.complete(&stage.fetcher.store).is_err());
    assert_eq!(old.evict(&[0, 1]), BTreeSet::from([0, 1]));
    let windows = 0..16;
    let layer = stage.layer;
    stage.fetcher.want(&Want { layer, windows }).unwrap();
    assert!(new.is_all_here());
    new.sync().unwrap();
}

#[test]
fn a_read_whose_layer_is_opened_anew_is_answered_by_the_new_one() {
    let stage = Stage::new();
    let calls = AtomicUsize::new(0);
    let answered = stage.fetcher.with_layer(stage.layer, |open| {
        if calls.fetch_add(1, Ordering::SeqCst) == 0 {
            stage.fetcher.forget(stage.layer, &stage.open());
        }
        open.want(0..16)
    });
    assert_eq!(answered.unwrap(), Some(()));
    assert_eq!(calls.load(Ordering::SeqCst), 2);
    assert!(stage.open().is_all_here());
}

#[test]
fn a_window_that_is_evicted_while_it_is_healed_is_no_sign_of_a_bad_disk() {
    let stage = Stage::new();
    let open = stage.open();
    open.want(0..2).unwrap();
    open.sync().unwrap();
    let data = fs::OpenOptions::new().write(true).open(stage.file("data"));
    let damaged = Span::new(Block::new(3), Blocks::new(1));
    data.unwrap()
        .write_all_at(b"damaged", damaged.start().get() * BLOCK_LEN as u64)
        .unwrap();
    // The first read finds the damage, the second one looks whether the disk keeps what was written.
    let (own, reads) = (Arc::clone(&open), AtomicUsize::new(0));
    stage
        .faults
        .set_hook(Some(Arc::new(move |kind, path: &Path| {
            if kind == OpKind::Read
                && path.ends_with("data")
                && reads.fetch_add(1, Ordering::SeqCst) == 1
            {
                assert!(own.evict(&[0]).is_empty());
            }
        })));
    assert!(open.heal(damaged).unwrap());
    stage.faults.set_hook(None);
    assert!(!open.has(0), "it was not evicted");
    assert!(open.has(1));
}

#[test]
fn windows_whose_eviction_fails_count_until_they_are_gone() {
    let stage = Stage::new();
    let open = stage.open();
    open.want(0..8).unwrap();
    open.sync().unwrap();
    let all = stage.taken();
    let here = here(&open).len() as u64;
    assert!(all >= here * WINDOW, "{all}");
    stage.faults.fail(FaultPlan {
        kinds: vec![OpKind::Punch],
        nth: 1,
        fault: Fault::Errno(libc::EIO),
        lasting: true,
    });
    stage.fetcher.cache.evict(4 * WINDOW);
    assert!(stage.faults.fired() > 0, "nothing failed");
    stage.faults.heal();
    assert_eq!(stage.taken(), all);
    // One of them that comes again takes no more than before.
    open.want(0..1).unwrap();
    stage.fetcher.cache.set_limit(Some(here * WINDOW));
    stage.fetcher.cache.make_room(0);
    assert_eq!(stage.taken(), all, "more was counted than there is");
    stage.fetcher.cache.set_limit(Some(4 * WINDOW));
    stage.fetcher.cache.make_room(0);
    assert!(stage.taken() <= all - 4 * WINDOW, "{}", stage.taken());
}

#[test]
fn what_is_damaged_beside_one_layer_or_in_the_bound_holds_up_no_other() {
    let stage = Stage::new();
    let open = stage.open();
    open.want(0..8).unwrap();
    fs::write(stage.file("remote"), "{").unwrap();
    stage.fetcher.look().unwrap();
    fs::write(stage.fetcher.store.root().join("cache.json"), "{").unwrap();
    stage.fetcher.cache.set_limit(Some(4 * WINDOW));
    stage.fetcher.keep_to_limits();
    let here = here(&open);
    assert!(here.len() <= 4, "{here:?}");
}

#[test]
fn whoever_reads_where_blocks_are_while_a_push_notes_that_anew_has_a_pair_of_one_push() {
    let stage = Stage::new();
    let dir = stage.fetcher.store.layer_dir(stage.layer);
    let elsewhere = tempfile::tempdir().unwrap();
    let (remote, table, _) = pushed(elsewhere.path(), 12);
    let once = AtomicBool::new(true);
    let (faults, noted, at) = (Arc::clone(&stage.faults), remote.clone(), dir.clone());
    stage
        .faults
        .set_hook(Some(Arc::new(move |kind, path: &Path| {
            if kind == OpKind::Open && path.ends_with("table") && once.swap(false, Ordering::SeqCst)
            {
                noted
                    .note_push(&*faults as &dyn Storage, &at, (&table, None))
                    .unwrap();
            }
        })));
    let read = Remote::read_with_table(&stage.fetcher.store, &dir);
    stage.faults.set_hook(None);
    assert_eq!(read.unwrap().unwrap().0, remote);
}
