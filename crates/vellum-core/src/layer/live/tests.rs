//! A log of changes that is full most of the time (24 entries here), under flushes that fail.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::chain::{ChainSpec, open_chain};
use crate::layer::{Header, LayerOptions, WritableLayer};
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, BlockDevice, BlockState, Durability, Offset};
use vellum_base::storage::{
    Fault, FaultPlan, FaultStorage, FileStorage, OpKind, SeededRng, SimStorage,
};

const BLOCKS: u64 = 60;
const DIR: &str = "/layer";
/// What a block may hold: one byte all over, sector by sector.
struct Model {
    now: Vec<u8>,
    may: Vec<BTreeSet<u8>>,
}

impl Model {
    fn new() -> Self {
        Model {
            now: vec![0; BLOCKS as usize],
            may: vec![[0].into(); BLOCKS as usize],
        }
    }

    fn acknowledge(&mut self) {
        for (may, now) in self.may.iter_mut().zip(&self.now) {
            *may = [*now].into();
        }
    }

    /// After a power cut.
    fn check_cut(&self, layer: &WritableLayer) -> Result<(), String> {
        for (block, may) in self.may.iter().enumerate() {
            for byte in sectors(layer, block as u64) {
                if !may.contains(&byte) {
                    return Err(format!(
                        "block {block} holds {byte:#x}, not one of {may:x?}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// After the process died, or now.
    fn check_now(&self, layer: &WritableLayer) -> Result<(), String> {
        for (block, now) in self.now.iter().enumerate() {
            if sectors(layer, block as u64) != [*now; 8] {
                let found = sectors(layer, block as u64);
                return Err(format!("block {block} holds {found:x?}, not {now:#x}"));
            }
        }
        Ok(())
    }
}

/// The byte of each sector of a block.
fn sectors(layer: &WritableLayer, block: u64) -> [u8; 8] {
    let block = Block::new(block);
    match layer.state(block) {
        // There is nothing below.
        BlockState::Parent | BlockState::Zero => [0; 8],
        BlockState::Data => {
            let mut bytes = [0; BLOCK_LEN];
            layer.read_blocks(&mut bytes, block).unwrap();
            for sector in bytes.chunks(512) {
                assert!(sector.iter().all(|byte| *byte == sector[0]), "torn sector");
            }
            std::array::from_fn(|sector| bytes[sector * 512])
        }
    }
}

fn new_disk() -> SimStorage {
    let disk = SimStorage::new();
    let header = Header::new(None, BLOCKS * BLOCK_SIZE).unwrap();
    WritableLayer::create(&disk, Path::new(DIR), &header).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk
}

fn options(journal_blocks: usize) -> LayerOptions {
    LayerOptions {
        journal_blocks,
        journal_start: 8 << 10,
        journal_max: 16 << 10,
        map_log: 12 << 10,
        preallocate: LayerOptions::default().preallocate,
        background: false,
    }
}

fn open(storage: impl Storage + 'static, options: LayerOptions) -> Arc<WritableLayer> {
    WritableLayer::open(Arc::new(storage), Path::new(DIR), options).unwrap()
}

/// One change, as the chain makes it. Both `Zero` and `Parent` read as zeros.
fn change(
    layer: &WritableLayer,
    block: u64,
    byte: u8,
    cleared: BlockState,
) -> vellum_base::Result<()> {
    let block = Block::new(block);
    let held = layer.lock_blocks(Span::of(block))?;
    match byte {
        0 => layer.clear_blocks(&held, Span::of(block), cleared),
        _ => layer
            .write_blocks(&held, block, &[byte; BLOCK_LEN])
            .map(drop),
    }
}

fn no_space(kinds: &[OpKind]) -> FaultPlan {
    FaultPlan {
        kinds: kinds.to_vec(),
        nth: 1,
        fault: Fault::Errno(libc::ENOSPC),
        lasting: true,
    }
}

fn run(seed: u64) -> Result<(), String> {
    let mut rng = SeededRng::new(seed);
    let options = options([0, 4][seed as usize % 2]);
    let mut disk = new_disk();
    let mut faults = FaultStorage::new(Arc::new(disk.clone()));
    let mut layer = open(faults.clone(), options);
    let mut model = Model::new();
    let mut failing = false;
    for step in 0..300 {
        let here = |why: String| format!("seed {seed}, step {step}: {why}");
        match rng.below(40) {
            0 if !failing => {
                let journal = [OpKind::WriteDurable, OpKind::Create];
                let log_too = [OpKind::WriteDurable, OpKind::Create, OpKind::Write];
                let all = rng.chance(1, 4);
                faults.fail(no_space(if all { &log_too } else { &journal }));
                failing = true;
            }
            0 | 1 if failing => {
                faults.heal();
                failing = false;
            }
            2 | 3 => match layer.flush() {
                Ok(()) => model.acknowledge(),
                Err(error) if failing && error.kind() == ErrorKind::NoSpace => {}
                Err(error) => return Err(here(error.to_string())),
            },
            _ => {
                let block = rng.below(BLOCKS);
                let byte = [0, 0, 1 + rng.below(200) as u8][rng.below(3) as usize];
                let cleared = [BlockState::Zero, BlockState::Parent][rng.below(2) as usize];
                model.may[block as usize].insert(byte);
                match change(&layer, block, byte, cleared) {
                    Ok(()) => model.now[block as usize] = byte,
                    Err(error) if failing && error.kind() == ErrorKind::NoSpace => {}
                    Err(error) => return Err(here(error.to_string())),
                }
            }
        }
        model.check_now(&layer).map_err(here)?;
        let killed = disk.fork();
        let after = open(killed.clone(), options);
        model
            .check_now(&after)
            .map_err(|why| here(format!("killed: {why}")))?;
        model
            .check_cut(&open(disk.cut(rng.bits()), options))
            .map_err(|why| here(format!("power cut: {why}")))?;
        if rng.chance(1, 10) {
            // The successor's first flush makes durable all that it shows.
            after.flush().map_err(|error| here(error.to_string()))?;
            let mut flushed = Model::new();
            flushed.now.clone_from(&model.now);
            flushed.acknowledge();
            flushed
                .check_cut(&open(killed.cut(rng.bits()), options))
                .map_err(|why| here(format!("killed, flushed, power cut: {why}")))?;
        }
        if rng.chance(1, 30) {
            // Go on where the process died, with whatever is in the log.
            disk = disk.fork();
            faults = FaultStorage::new(Arc::new(disk.clone()));
            layer = open(faults.clone(), options);
            failing = false;
        }
    }
    Ok(())
}

#[test]
fn a_log_that_is_full_while_flushes_fail_loses_nothing_and_takes_changes_once_they_succeed() {
    for seed in 0..20 {
        run(seed).unwrap();
    }
}

#[test]
fn a_full_log_refuses_changes_until_a_flush_has_made_room() {
    let disk = new_disk();
    let layer = open(disk.clone(), options(0));
    // Held all the time, since each new lock would flush once the log fills.
    let held = layer.lock_blocks(Span::up_to(Blocks::new(BLOCKS))).unwrap();
    let zero = |block| layer.clear_blocks(&held, Span::of(Block::new(block)), BlockState::Zero);
    (0..LIMIT).try_for_each(zero).unwrap();
    let error = zero(LIMIT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!(layer.state(Block::new(LIMIT)), BlockState::Parent);
    layer.flush().unwrap();
    zero(LIMIT).unwrap();
    let states = |layer: &WritableLayer| -> Vec<BlockState> {
        (0..BLOCKS)
            .map(|block| layer.state(Block::new(block)))
            .collect()
    };
    assert_eq!(states(&open(disk.fork(), options(0))), states(&layer));
    assert_eq!(
        open(disk.cut(1), options(0)).state(Block::new(LIMIT - 1)),
        BlockState::Zero
    );
}

/// The thread that frees a journal area may find that a sync failed while a flush has the map.
#[test]
fn a_layer_that_is_poisoned_while_somebody_has_the_map_is_not_trusted_by_a_successor() {
    let disk = new_disk();
    let layer = open(disk.clone(), options(0));
    layer.put(0, &[1; BLOCK_LEN]).unwrap();
    {
        let _map = layer.shared.map.write();
        layer
            .shared
            .poison(&Error::new(ErrorKind::Io, "a sync failed"));
    }
    assert_eq!(left(&disk, Path::new(DIR)), Left::Stale { reread: true });
}

/// What is left in a directory, as the next to open it would find it.
fn left(storage: &dyn Storage, dir: &Path) -> Left {
    let header = Header::read(storage, dir).unwrap();
    let data = DataFiles::open(storage, dir, &header, OpenMode::Write).unwrap();
    read_left(storage, dir, &header, &data).unwrap()
}

const STALE: Left = Left::Stale { reread: true };

/// A layer on the host's own file system with a log of one block that was written, number 3.
struct Killed {
    dir: tempfile::TempDir,
    header: Header,
}

impl Killed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let header = Header::new(None, BLOCKS * BLOCK_SIZE).unwrap();
        let killed = Killed { dir, header };
        WritableLayer::create(&FileStorage, &killed.layer(), &killed.header).unwrap();
        let layer = killed.open();
        layer.put(3, &[1; BLOCK_LEN]).unwrap();
        drop(layer);
        assert!(matches!(killed.left(), Left::Trusted(_)));
        killed
    }

    fn layer(&self) -> std::path::PathBuf {
        self.dir.path().join("layer")
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.layer().join(name)
    }

    fn open(&self) -> Arc<WritableLayer> {
        WritableLayer::open(Arc::new(FileStorage), &self.layer(), options(0)).unwrap()
    }

    fn left(&self) -> Left {
        left(&FileStorage, &self.layer())
    }

    /// Writes a file anew: by another in its place, as tar(1) and rsync(1) do, or into it, as cp(1).
    fn put_back(&self, name: &str, into: bool) {
        let bytes = std::fs::read(self.file(name)).unwrap();
        if !into {
            std::fs::remove_file(self.file(name)).unwrap();
        }
        std::fs::write(self.file(name), bytes).unwrap();
    }
}

#[test]
fn a_log_is_not_trusted_once_a_backup_was_put_back_over_the_layer() {
    for (name, into) in [
        ("live", false),
        ("data", false),
        ("layer", false),
        ("layer", true),
    ] {
        let killed = Killed::new();
        killed.put_back(name, into);
        assert_eq!(killed.left(), STALE, "{name}, into: {into}");
        let layer = killed.open();
        assert_eq!(layer.state(Block::new(3)), BlockState::Parent, "{name}");
        // It works, and what it is told from now on holds after a kill.
        layer.put(5, &[2; BLOCK_LEN]).unwrap();
        drop(layer);
        let layer = killed.open();
        assert_eq!(layer.state(Block::new(5)), BlockState::Data, "{name}");
        assert_eq!(layer.state(Block::new(3)), BlockState::Parent, "{name}");
    }
}

#[test]
fn a_log_that_was_not_trusted_once_is_never_trusted_again() {
    let killed = Killed::new();
    let kept = killed.dir.path().join("kept");
    // The same file, which nothing but its name will have left.
    std::fs::hard_link(killed.file("live"), &kept).unwrap();
    let rights = std::fs::metadata(killed.file("layer"))
        .unwrap()
        .permissions();
    std::fs::set_permissions(killed.file("layer"), rights).unwrap();
    drop(killed.open());
    assert!(!killed.file("live").exists());
    assert_eq!(killed.left(), Left::Nothing);
}

#[test]
fn a_log_that_says_written_of_what_is_a_hole_is_not_trusted() {
    let killed = Killed::new();
    let data = FileStorage
        .open(&killed.file("data"), OpenMode::Write)
        .unwrap();
    data.punch_hole(0, BLOCKS * BLOCK_SIZE).unwrap();
    // Some file systems cannot tell.
    if data.has_hole(0, BLOCK_SIZE).unwrap() {
        assert_eq!(killed.left(), STALE);
        assert_eq!(killed.open().state(Block::new(3)), BlockState::Parent);
    }
}

/// All that makes a hole below data is in the log.
#[test]
fn blocks_that_were_made_zeros_in_place_are_taken_over_as_such() {
    let real = Killed::new();
    let layers: [Arc<WritableLayer>; 2] = [real.open(), open(new_disk(), options(0))];
    for layer in layers {
        for (start, len) in [(3, 1), (10, 4), (20, 2)] {
            layer
                .put(start, &vec![7; BLOCK_LEN * len as usize])
                .unwrap();
        }
        // Data alone, data and what is none, none.
        for (start, len) in [(3, 1), (12, 6), (30, 2)] {
            let span = Span::new(Block::new(start), Blocks::new(len));
            let held = layer.lock_blocks(span).unwrap();
            layer.allocate_zeroed(&held, span).unwrap();
        }
        let held = layer.lock_blocks(Span::of(Block::new(13))).unwrap();
        layer
            .write_within(&held, Offset::new(13 * BLOCK_SIZE), &[9; 512])
            .unwrap();
        drop(held);
        layer
            .clear(Span::of(Block::new(20)), BlockState::Zero)
            .unwrap();
        let (storage, dir) = (layer.storage_handle(), layer.dir().to_owned());
        let before: Vec<_> = (0..BLOCKS).map(|block| sectors(&layer, block)).collect();
        drop(layer);
        assert!(matches!(left(&*storage, &dir), Left::Trusted(_)));
        let layer = WritableLayer::open(storage, &dir, options(0)).unwrap();
        for (block, before) in (0..BLOCKS).zip(before) {
            assert_eq!(sectors(&layer, block), before, "block {block}");
        }
        assert_eq!(layer.state(Block::new(30)), BlockState::Data);
        assert_eq!(sectors(&layer, 13)[..2], [9, 0]);
    }
}

/// Taken over, an entry that names no block of the layer would have been passed over, and with it
/// what a client was told of.
#[test]
fn a_log_that_names_blocks_beyond_the_layer_is_not_trusted() {
    let last = BLOCKS - 1;
    for (start, len, outcome) in [
        (last, 1, true),
        (last, 2, false),
        (BLOCKS, 1, false),
        (1 << 60, 1 << 47, false),
    ] {
        let killed = Killed::new();
        let span = Span::new(Block::new(start), Blocks::new(len));
        let zero = Run::new(span, Noted::Becomes(BlockState::Zero));
        let live = FileStorage
            .open(&killed.file("live"), OpenMode::Write)
            .unwrap();
        // The first region has one entry, and is of the first epoch.
        live.write_at(&entry(zero, 1), region_at(0) + ENTRY_LEN as u64)
            .unwrap();
        let trusted = matches!(killed.left(), Left::Trusted(changes) if changes.len() == 2);
        assert_eq!(trusted, outcome, "{span}");
        if !trusted {
            assert_eq!(killed.left(), STALE, "{span}");
            assert_eq!(killed.open().state(Block::new(3)), BlockState::Parent);
        }
    }
}

#[test]
fn a_log_of_another_version_is_not_trusted_and_that_a_sync_failed_is_heeded() {
    let killed = Killed::new();
    let live = FileStorage
        .open(&killed.file("live"), OpenMode::Write)
        .unwrap();
    let mut header = [0; IDENTITY_LEN];
    live.read_at(&mut header, 0).unwrap();
    for version in [1u32, 3] {
        header[8..12].copy_from_slice(&version.to_le_bytes());
        let crc = crc32fast::hash(&header[..52]);
        header[52..].copy_from_slice(&crc.to_le_bytes());
        live.write_at(&header, 0).unwrap();
        assert_eq!(killed.left(), STALE, "{version}");
    }
    assert_eq!(killed.open().state(Block::new(3)), BlockState::Parent);
}

#[test]
fn a_log_whose_layer_has_grown_is_trusted() {
    let killed = Killed::new();
    let layer = killed.open();
    layer.grow(2 * BLOCKS * BLOCK_SIZE).unwrap();
    layer.put(BLOCKS + 1, &[4; BLOCK_LEN]).unwrap();
    drop(layer);
    let layer = killed.open();
    assert_eq!(layer.state(Block::new(3)), BlockState::Data);
    assert_eq!(layer.state(Block::new(BLOCKS + 1)), BlockState::Data);
}

/// The kernel reports a failed write-back once, to whoever syncs next.
#[test]
fn what_a_successors_sync_lost_is_replayed_from_the_journal_at_the_next_opening() {
    let disk = new_disk();
    let layer = open(disk.clone(), options(4));
    layer.put(3, &[1; BLOCK_LEN]).unwrap();
    layer.flush().unwrap();
    drop(layer);
    let faults = FaultStorage::new(Arc::new(disk.clone()));
    faults.fail(FaultPlan {
        kinds: vec![OpKind::SyncData],
        nth: 1,
        fault: Fault::Errno(libc::EIO),
        lasting: false,
    });
    let storage: Arc<dyn Storage> = Arc::new(faults);
    let opened = WritableLayer::open(storage, Path::new(DIR), options(4));
    assert_eq!(opened.unwrap_err().kind(), ErrorKind::Io);
    // What it could not write is gone once the host needs its memory.
    let data = disk
        .open(&Path::new(DIR).join("data"), OpenMode::Write)
        .unwrap();
    data.punch_hole(3 * BLOCK_SIZE, BLOCK_SIZE).unwrap();
    drop(data);
    assert_eq!(sectors(&open(disk, options(4)), 3), [1; 8]);
}

#[test]
fn a_log_of_another_file_is_not_applied() {
    let dir = tempfile::tempdir().unwrap();
    let storage = vellum_base::storage::FileStorage;
    let layer = dir.path().join("layer");
    let header = Header::new(None, BLOCKS * BLOCK_SIZE).unwrap();
    WritableLayer::create(&storage, &layer, &header).unwrap();
    let open = |dir: &Path| WritableLayer::open(Arc::new(storage), dir, options(0)).unwrap();
    let writer = open(&layer);
    writer.put(3, &[1; BLOCK_LEN]).unwrap();
    // A snapshot of the file system, taken while the layer is written.
    let copy = dir.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(&layer).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    drop(writer);
    assert_eq!(open(&copy).state(Block::new(3)), BlockState::Parent);
    assert_eq!(open(&layer).state(Block::new(3)), BlockState::Data);
}

#[test]
fn a_discard_of_more_runs_than_the_log_has_entries_succeeds() {
    let storage: Arc<dyn Storage> = Arc::new(new_disk());
    let spec = ChainSpec {
        sealed: vec![],
        top: Some(DIR.into()),
        options: options(0),
    };
    let chain = open_chain(&storage, &spec).unwrap();
    for block in (0..BLOCKS).step_by(2) {
        let bytes = [1; BLOCK_LEN];
        chain
            .write_at(&bytes, block * BLOCK_SIZE, Durability::Buffered)
            .unwrap();
    }
    const { assert!(BLOCKS / 2 > LIMIT) };
    chain.discard(0, BLOCKS * BLOCK_SIZE).unwrap();
    assert_eq!(chain.top().unwrap().data_blocks(), Blocks::NONE);
}
