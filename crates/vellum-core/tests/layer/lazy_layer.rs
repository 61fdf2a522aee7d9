//! Lazy layers: blocks come when they are read, whoever reads holds nobody up, and whatever cuts the work off, no block
//! is shown that is not the layer's.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use vellum_base::ErrorKind;
use vellum_base::block::{
    BLOCK_LEN, BLOCK_SIZE, Block, BlockDevice, BlockState, Blocks, Durability, Run, Span,
    WindowPower,
};
use vellum_base::storage::{Fault, FaultPlan, FaultStorage, OpKind, SimStorage, Storage};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{
    Completion, Fetch, Header, LayerOptions, LazyContent, LazyLayer, SealedLayer, Severity,
    WritableLayer, check_layer, fetch_by, repair_layer, seal_in_place,
};

/// Sixteen windows of 64 KiB.
pub const SIZE: u64 = 1 << 20;
pub const POWER: WindowPower = WindowPower::LEAST;
pub const WHOLE: &str = "/whole";
pub const LAZY: &str = "/lazy";
const TOP: &str = "/top";

type Serve = Arc<dyn Fn(Range<u32>) -> vellum_base::Result<()> + Send + Sync>;
pub type Heal = Arc<dyn Fn(Span) -> vellum_base::Result<bool> + Send + Sync>;

/// Who fetches for which directory.
static SERVERS: Mutex<BTreeMap<PathBuf, Serve>> = Mutex::new(BTreeMap::new());
static HEALERS: Mutex<BTreeMap<PathBuf, Heal>> = Mutex::new(BTreeMap::new());

struct Dispatch;

impl Fetch for Dispatch {
    fn fetch(&self, dir: &Path, windows: Range<u32>) -> vellum_base::Result<()> {
        let serve = SERVERS.lock().unwrap().get(dir).cloned();
        serve.expect("nobody fetches for that layer")(windows)
    }

    fn heal(&self, dir: &Path, blocks: Span) -> vellum_base::Result<bool> {
        let heal = HEALERS.lock().unwrap().get(dir).cloned();
        heal.map_or(Ok(false), |heal| heal(blocks))
    }
}

/// From now on `serve` fetches for the layer in `dir`.
pub fn serve(dir: &Path, serve: Serve) {
    fetch_by(Box::new(Dispatch));
    SERVERS.lock().unwrap().insert(dir.to_owned(), serve);
}

/// From now on `heal` brings blocks of the layer in `dir` again.
pub fn heal_by(dir: &Path, heal: Heal) {
    fetch_by(Box::new(Dispatch));
    HEALERS.lock().unwrap().insert(dir.to_owned(), heal);
}

fn span(start: u64, len: u64) -> Span {
    Span::new(Block::new(start), Blocks::new(len))
}

/// What the layer holds: some windows whole, some in part, some not at all.
pub fn extents() -> Vec<Run<BlockState>> {
    vec![
        Run::new(span(0, 40), BlockState::Data),
        Run::new(span(40, 8), BlockState::Zero),
        Run::new(span(70, 2), BlockState::Data),
        Run::new(span(78, 30), BlockState::Data),
        Run::new(span(200, 56), BlockState::Data),
    ]
}

/// The windows with data: of 16 blocks each.
pub fn windows() -> Vec<u32> {
    vec![0, 1, 2, 4, 5, 6, 12, 13, 14, 15]
}

pub fn bytes_of(block: Block) -> [u8; BLOCK_LEN] {
    let mut bytes = [0; BLOCK_LEN];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (block.get() * 7 + at as u64 * 3 + 1) as u8;
    }
    bytes
}

/// What a block of the layer reads as.
pub fn expected(block: Block) -> [u8; BLOCK_LEN] {
    let data =
        |run: &Run<BlockState>| run.value == BlockState::Data && run.span.contains(Span::of(block));
    match extents().iter().any(data) {
        true => bytes_of(block),
        false => [0; BLOCK_LEN],
    }
}

/// The layer as whoever pushed it has it; returns its digest.
pub fn make_whole(disk: &SimStorage) -> [u8; 32] {
    let storage: Arc<dyn Storage> = Arc::new(disk.clone());
    let header = Header::new(None, SIZE).unwrap();
    WritableLayer::create(disk, Path::new(WHOLE), &header).unwrap();
    let layer = WritableLayer::open(storage, Path::new(WHOLE), LayerOptions::default()).unwrap();
    for run in extents() {
        let held = layer.lock_blocks(run.span).unwrap();
        match run.value {
            BlockState::Data => {
                let bytes: Vec<u8> = run.span.blocks().flat_map(bytes_of).collect();
                layer.write_blocks(&held, run.start(), &bytes).unwrap();
            }
            state => layer.clear_blocks(&held, run.span, state).unwrap(),
        }
    }
    layer.seal().unwrap();
    drop(layer);
    seal_in_place(disk, Path::new(WHOLE), |_| {}).unwrap()
}

/// An empty lazy layer of that digest, durable.
pub fn make_lazy(disk: &SimStorage, digest: [u8; 32]) {
    let header = Header::new(None, SIZE).unwrap();
    let dir = Path::new(LAZY);
    WritableLayer::create(disk, dir, &header).unwrap();
    let extents = extents();
    let content = LazyContent {
        power: POWER,
        digest,
        extents: &extents,
    };
    LazyLayer::make(disk, dir, &header, &content).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
}

/// A disk with both.
pub fn lazy_disk() -> (SimStorage, [u8; 32]) {
    let disk = SimStorage::new();
    let digest = make_whole(&disk);
    make_lazy(&disk, digest);
    (disk, digest)
}

pub fn put(lazy: &LazyLayer, window: u32) -> vellum_base::Result<()> {
    let whole = POWER.span(window);
    let mut blocks = Vec::new();
    for run in extents().iter().filter(|run| run.value == BlockState::Data) {
        if let Some(here) = run.span.intersection(whole) {
            blocks.push((here, here.blocks().flat_map(bytes_of).collect::<Vec<u8>>()));
        }
    }
    lazy.put(
        window,
        blocks.iter().map(|(span, bytes)| (*span, &bytes[..])),
    )
}

pub fn open_lazy(disk: &dyn Storage) -> LazyLayer {
    LazyLayer::open(disk, Path::new(LAZY)).unwrap().unwrap()
}

/// Fetches at once what is asked for, and counts.
fn serve_at_once(dir: &Path, disk: &SimStorage) -> Arc<AtomicUsize> {
    let lazy = LazyLayer::open(disk, dir).unwrap().unwrap();
    let fetched = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&fetched);
    serve(
        dir,
        Arc::new(move |windows| {
            for window in windows.filter(|window| !lazy.is_here(*window)) {
                put(&lazy, window)?;
                count.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        }),
    );
    fetched
}

fn chain(disk: &SimStorage) -> Chain {
    chain_on(disk, LAZY)
}

/// A new container on the layer in `below`.
pub fn chain_on(disk: &SimStorage, below: &str) -> Chain {
    let storage: Arc<dyn Storage> = Arc::new(disk.clone());
    let parent = Header::read(disk, Path::new(below)).unwrap();
    let top = Header::new(Some(parent.uuid), SIZE).unwrap();
    WritableLayer::create(disk, Path::new(TOP), &top).unwrap();
    let spec = ChainSpec {
        sealed: vec![below.into()],
        top: Some(TOP.into()),
        options: LayerOptions::default(),
    };
    open_chain(&storage, &spec).unwrap()
}

pub fn read(device: &dyn BlockDevice, block: u64) -> [u8; BLOCK_LEN] {
    let mut bytes = [0; BLOCK_LEN];
    device.read_at(&mut bytes, block * BLOCK_SIZE).unwrap();
    bytes
}

// Tests of one process share the table of servers, so each has a disk of its own but the same directory: one at a time.
static ONE: Mutex<()> = Mutex::new(());

#[test]
fn blocks_come_when_they_are_read_and_stay() {
    let _one = ONE.lock();
    let (disk, _) = lazy_disk();
    let fetched = serve_at_once(Path::new(LAZY), &disk);
    let chain = chain(&disk);
    for block in 0..SIZE / BLOCK_SIZE {
        assert_eq!(read(&chain, block), expected(Block::new(block)), "{block}");
    }
    assert_eq!(fetched.load(Ordering::SeqCst), windows().len());
    let mut all = vec![0; SIZE as usize];
    chain.read_at(&mut all, 0).unwrap();
    assert_eq!(fetched.load(Ordering::SeqCst), windows().len());
}

#[test]
fn whole_blocks_are_written_without_the_registry_and_parts_copy_up_what_comes() {
    let _one = ONE.lock();
    let (disk, _) = lazy_disk();
    let fetched = serve_at_once(Path::new(LAZY), &disk);
    let chain = chain(&disk);
    chain
        .write_at(&[9; BLOCK_LEN], 0, Durability::Durable)
        .unwrap();
    chain
        .write_zeroes(
            BLOCK_SIZE,
            BLOCK_SIZE,
            vellum_base::block::ZeroMode::MayUnmap,
            Durability::Durable,
        )
        .unwrap();
    assert_eq!(fetched.load(Ordering::SeqCst), 0);
    chain
        .write_at(&[8; 10], 2 * BLOCK_SIZE + 100, Durability::Durable)
        .unwrap();
    assert_eq!(fetched.load(Ordering::SeqCst), 1);
    let mut block = bytes_of(Block::new(2));
    block[100..110].fill(8);
    assert_eq!(read(&chain, 2), block);
    assert_eq!(read(&chain, 0), [9; BLOCK_LEN]);
    assert_eq!(read(&chain, 1), [0; BLOCK_LEN]);
}

#[test]
fn a_read_and_a_copy_up_that_wait_hold_up_no_write_and_no_seal() {
    let _one = ONE.lock();
    let (disk, _) = lazy_disk();
    let lazy = open_lazy(&disk);
    let (tell, waiting) = mpsc::channel();
    let (go, held) = mpsc::channel::<()>();
    let (tell, held) = (Mutex::new(tell), Mutex::new(held));
    serve(
        Path::new(LAZY),
        Arc::new(move |windows| {
            tell.lock().unwrap().send(windows.clone()).unwrap();
            held.lock().unwrap().recv().unwrap();
            windows
                .filter(|one| !lazy.is_here(*one))
                .try_for_each(|one| put(&lazy, one))
        }),
    );
    let chain = Arc::new(chain(&disk));
    let (reads, copies) = (Arc::clone(&chain), Arc::clone(&chain));
    let reader = std::thread::spawn(move || read(&*reads, 80));
    assert_eq!(waiting.recv_timeout(Duration::from_secs(20)).unwrap(), 5..6);
    let copier = std::thread::spawn(move || {
        copies
            .write_at(&[1; 5], 3 * BLOCK_SIZE, Durability::Durable)
            .unwrap();
    });
    // It waits for its turn in the server.
    std::thread::sleep(Duration::from_millis(50));
    chain
        .write_at(&[7; BLOCK_LEN], 90 * BLOCK_SIZE, Durability::Durable)
        .unwrap();
    chain
        .write_at(&[6; BLOCK_LEN], 3 * BLOCK_SIZE, Durability::Buffered)
        .unwrap();
    chain.flush().unwrap();
    assert_eq!(read(&*chain, 90), [7; BLOCK_LEN]);
    chain.seal_last().unwrap();
    go.send(()).unwrap();
    go.send(()).unwrap();
    assert_eq!(reader.join().unwrap(), bytes_of(Block::new(80)));
    // Its container was sealed meanwhile, and nothing is above.
    assert!(copier.join().is_err());
}

#[test]
fn blocks_that_cannot_be_had_are_an_error_and_the_next_read_tries_again() {
    let _one = ONE.lock();
    let (disk, _) = lazy_disk();
    let lazy = open_lazy(&disk);
    let tries = AtomicUsize::new(0);
    serve(
        Path::new(LAZY),
        Arc::new(
            move |mut windows| match tries.fetch_add(1, Ordering::SeqCst) {
                0 => Err(vellum_base::Error::new(
                    ErrorKind::Absent,
                    "the registry is gone",
                )),
                _ => windows.try_for_each(|one| put(&lazy, one)),
            },
        ),
    );
    let chain = chain(&disk);
    let mut bytes = [0; BLOCK_LEN];
    let error = chain.read_at(&mut bytes, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Absent);
    assert!(
        error.to_string().contains("the registry is gone"),
        "{error}"
    );
    assert_eq!(read(&chain, 0), bytes_of(Block::FIRST));
}

#[test]
fn a_layer_of_which_all_is_here_becomes_a_sealed_one_of_the_same_digest() {
    let (disk, digest) = lazy_disk();
    let lazy = open_lazy(&disk);
    assert_eq!(lazy.missing(), windows());
    let error = lazy.complete(&disk, |_| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(seal_in_place(&disk, Path::new(LAZY), |_| {}).is_err());
    windows()
        .into_iter()
        .for_each(|window| put(&lazy, window).unwrap());
    assert_eq!(lazy.complete(&disk, |_| {}).unwrap(), Completion::Whole);
    let layer = SealedLayer::open(&disk, Path::new(LAZY)).unwrap();
    assert_eq!((layer.digest(), layer.is_lazy()), (Some(digest), false));
    assert!(!Header::read(&disk, Path::new(LAZY)).unwrap().lazy);
    assert!(LazyLayer::open(&disk, Path::new(LAZY)).unwrap().is_none());
    assert_eq!(check_layer(&disk, Path::new(LAZY), true), []);
}

#[test]
fn a_layer_with_another_digest_than_it_should_have_has_nothing_here_any_more() {
    let disk = SimStorage::new();
    make_whole(&disk);
    make_lazy(&disk, [3; 32]);
    let lazy = open_lazy(&disk);
    windows()
        .into_iter()
        .for_each(|window| put(&lazy, window).unwrap());
    assert_eq!(lazy.complete(&disk, |_| {}).unwrap(), Completion::Wrong);
    assert_eq!(lazy.missing(), windows());
    drop(lazy);
    assert_eq!(open_lazy(&disk.cut(1)).missing(), windows());
}

#[test]
fn what_a_failed_sync_may_have_lost_is_missing_again() {
    let (disk, _) = lazy_disk();
    let faults = FaultStorage::new(Arc::new(disk.clone()));
    let lazy = open_lazy(&faults);
    put(&lazy, 0).unwrap();
    lazy.sync().unwrap();
    put(&lazy, 1).unwrap();
    faults.fail(FaultPlan {
        kinds: OpKind::CHANGES
            .into_iter()
            .filter(|kind| kind.is_sync())
            .collect(),
        nth: 1,
        fault: Fault::LostSync(libc::EIO),
        lasting: false,
    });
    assert!(lazy.sync().is_err());
    assert!(lazy.is_here(0) && !lazy.is_here(1));
}

/// Brings all windows, syncs now and then, and completes.
pub fn bring(disk: &SimStorage) -> vellum_base::Result<()> {
    let Some(lazy) = LazyLayer::open(disk, Path::new(LAZY))? else {
        return seal_in_place(disk, Path::new(LAZY), |_| {}).map(drop);
    };
    for (index, window) in lazy.missing().into_iter().enumerate() {
        put(&lazy, window)?;
        if index % 3 == 2 {
            lazy.sync()?;
        }
    }
    match lazy.complete(disk, |_| {})? {
        Completion::Whole => Ok(()),
        other => panic!("the right blocks: {other:?}"),
    }
}

/// What is said to be here is what it should be, and the rest can be brought.
pub fn check_after(disk: &SimStorage, digest: [u8; 32], when: &str) {
    for finding in check_layer(disk, Path::new(LAZY), true) {
        assert_eq!(finding.severity, Severity::Note, "{when}: {finding}");
    }
    let layer = SealedLayer::open(disk, Path::new(LAZY)).unwrap();
    let lazy = LazyLayer::open(disk, Path::new(LAZY)).unwrap();
    for run in extents().iter().filter(|run| run.value == BlockState::Data) {
        for block in run.span.blocks() {
            if lazy
                .as_ref()
                .is_none_or(|lazy| lazy.is_here(POWER.window_of(block)))
            {
                let mut bytes = [0; BLOCK_LEN];
                layer.read_blocks(&mut bytes, block).unwrap();
                assert_eq!(bytes, bytes_of(block), "{when}: {block}");
            }
        }
    }
    drop((layer, lazy));
    bring(disk).unwrap();
    repair_layer(disk, Path::new(LAZY)).unwrap();
    let layer = SealedLayer::open(disk, Path::new(LAZY)).unwrap();
    assert_eq!(layer.digest(), Some(digest), "{when}");
    assert!(!Header::read(disk, Path::new(LAZY)).unwrap().lazy, "{when}");
    assert_eq!(check_layer(disk, Path::new(LAZY), true), [], "{when}");
}

#[test]
fn a_power_cut_or_a_kill_at_any_step_leaves_windows_that_are_right_or_missing() {
    let mut steps = 0;
    for step in 1.. {
        let (disk, digest) = lazy_disk();
        disk.arm(step);
        let result = bring(&disk);
        let off = disk.is_off();
        for seed in 0..6 {
            check_after(&disk.cut(seed), digest, &format!("cut {seed} at {step}"));
        }
        if !off {
            result.unwrap();
            break;
        }
        steps = step;
        check_after(&disk.fork(), digest, &format!("kill at {step}"));
    }
    assert!(steps > 30, "{steps} steps");
}
