//! Faults: every operation of a workload fails once in every way, and nothing that was reported as
//! done is lost; a process that dies in any operation loses nothing either. docs/durability.md
//! says what is promised. `VELLUM_LONG=1` runs ten times as many workloads.

use crate::crash::workload;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::crash::model::Model;
use crate::crash::workload::{Change, Op, SIZE};
use vellum_base::block::{BLOCK_SIZE, BlockDevice, Durability};
use vellum_base::storage::{Fault, FaultPlan, FaultStorage, OpKind, SimStorage, Storage};
use vellum_base::{Error, ErrorKind};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, WritableLayer, seal_in_place};

const ROOT: &str = "/layers";

/// Everything that can go wrong with one operation.
const FAULTS: [Fault; 8] = [
    Fault::Errno(libc::EIO),
    Fault::Errno(libc::ENOSPC),
    Fault::Errno(libc::EDQUOT),
    Fault::Short(libc::ENOSPC),
    Fault::Short(libc::EIO),
    Fault::LostSync(libc::EIO),
    Fault::Done(libc::EIO),
    Fault::Done(libc::ENOSPC),
];

fn tiny(journal_blocks: usize, background: bool) -> LayerOptions {
    LayerOptions {
        journal_blocks,
        journal_start: 8 << 10,
        journal_max: 32 << 10,
        map_log: 8 << 10,
        preallocate: 1 << 20,
        background,
    }
}

/// A device on a simulated disk that fails on demand.
struct Rig {
    disk: SimStorage,
    faults: FaultStorage,
    options: LayerOptions,
    spec: ChainSpec,
    /// The layer that a failed snapshot may have made the top.
    chain: Option<Chain>,
    model: Model,
    layers: u64,
    tag: u16,
}

impl Rig {
    fn new(options: LayerOptions) -> Self {
        let disk = SimStorage::new();
        disk.create_dir(Path::new(ROOT)).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        let faults = FaultStorage::new(Arc::new(disk.clone()));
        let mut rig = Rig {
            disk,
            faults,
            options,
            spec: ChainSpec::default(),
            chain: None,
            model: Model::new(SIZE),
            layers: 0,
            tag: 0,
        };
        let top = rig.new_layer(None).unwrap();
        rig.spec = ChainSpec {
            sealed: vec![],
            top: Some(top),
            options,
        };
        rig.open().unwrap();
        rig
    }

    fn seam(&self) -> Arc<dyn Storage> {
        Arc::new(self.faults.clone())
    }

    fn new_layer(&mut self, parent: Option<uuid::Uuid>) -> vellum_base::Result<PathBuf> {
        self.layers += 1;
        let dir = Path::new(ROOT).join(format!("layer{}", self.layers));
        let header = Header::new(parent, SIZE).unwrap();
        WritableLayer::create(&self.faults, &dir, &header)?;
        self.faults
            .sync_dir(Path::new(ROOT))
            .map_err(|error| Error::io("syncing", error))?;
        Ok(dir)
    }

    /// Opens the chain; a top that was sealed without our knowing gets a new one.
    fn open(&mut self) -> vellum_base::Result<()> {
        self.chain = None;
        let top = self.spec.top.clone().unwrap();
        let header = Header::read(&self.faults, &top)?;
        if header.sealed {
            let next = self.new_layer(Some(header.uuid))?;
            self.spec.sealed.push(top);
            self.spec.top = Some(next);
        }
        self.chain = Some(open_chain(&self.seam(), &self.spec)?);
        Ok(())
    }

    fn chain(&self) -> &Chain {
        self.chain.as_ref().unwrap()
    }

    fn read(&self) -> vellum_base::Result<Vec<u8>> {
        let mut content = vec![0; SIZE as usize];
        self.chain().read_at(&mut content, 0)?;
        Ok(content)
    }

    fn poisoned(&self) -> bool {
        let top = self.chain.as_ref().and_then(Chain::top);
        top.is_some_and(|top| top.poisoned().is_some())
    }

    fn change(&mut self, change: &Change) -> vellum_base::Result<()> {
        let (offset, bytes) = (change.offset, &change.bytes);
        self.model.begin(offset, bytes);
        change.apply(self.chain())?;
        self.model.complete(offset, bytes);
        if change.fua {
            self.model.acknowledge(offset, bytes.len() as u64);
        }
        Ok(())
    }

    /// Does one operation. Whatever becomes of it, the layer in memory is sound.
    fn step(&mut self, op: Op) -> vellum_base::Result<()> {
        let outcome = self.try_step(op);
        if let Some(top) = self.chain.as_ref().and_then(Chain::top) {
            top.assert_sound();
        }
        outcome
    }

    fn try_step(&mut self, op: Op) -> vellum_base::Result<()> {
        if let Some(change) = op.change(&mut self.tag) {
            self.change(&change)?;
        }
        match op {
            Op::Write { ahead: true, .. } => {
                self.chain().top().unwrap().flush_ahead();
                Ok(())
            }
            Op::Write { .. } | Op::Discard { .. } | Op::Zero { .. } => Ok(()),
            Op::Flush => {
                self.chain().flush()?;
                self.model.acknowledge_all();
                Ok(())
            }
            Op::Close => {
                self.chain().close()?;
                self.model.acknowledge_all();
                Ok(())
            }
            Op::Reopen | Op::Kill | Op::Cut(_) | Op::Remount(_) => {
                if op == Op::Reopen {
                    self.chain().close()?;
                    self.model.acknowledge_all();
                }
                self.open()?;
                let content = self.read()?;
                if let Err(why) = self.model.check(&content) {
                    return Err(Error::new(ErrorKind::Corrupt, why));
                }
                self.model.adopt(&content);
                Ok(())
            }
            Op::Checksum(which) => {
                let sealed = &self.spec.sealed;
                if !sealed.is_empty() {
                    seal_in_place(&self.faults, &sealed[which as usize % sealed.len()], |_| {})?;
                }
                Ok(())
            }
            Op::Snapshot => {
                if self.spec.sealed.len() >= 3 {
                    return Ok(());
                }
                let old = self.chain().top().unwrap();
                let dir = self.new_layer(Some(old.header().uuid))?;
                let next = WritableLayer::open(self.seam(), &dir, self.options)?;
                self.chain().seal_top(next)?;
                self.model.acknowledge_all();
                self.spec.sealed.push(old.dir().to_owned());
                self.spec.top = Some(dir);
                Ok(())
            }
        }
    }

    /// A process starts on what another left.
    fn come_back(&mut self, disk: SimStorage) -> Result<(), String> {
        self.chain = None;
        self.disk = disk.clone();
        self.faults = FaultStorage::new(Arc::new(disk));
        self.open()
            .map_err(|error| format!("cannot open: {error}"))?;
        let content = self.read().map_err(|error| error.to_string())?;
        self.model.check(&content)?;
        self.model.adopt(&content);
        // And it works.
        for offset in [0, 5 * BLOCK_SIZE + 700] {
            self.step(Op::Write {
                offset,
                len: 9000,
                fua: true,
                ahead: false,
            })
            .map_err(|error| format!("after it came back: {error}"))?;
        }
        Ok(())
    }
}

/// One run with one plan: false where the plan's operation never came.
fn survive(ops: &[Op], options: LayerOptions, plan: &FaultPlan) -> Result<bool, String> {
    let mut rig = Rig::new(options);
    rig.faults.fail(plan.clone());
    let mut poisoned = false;
    for (at, op) in ops.iter().enumerate() {
        let here = |why: String| format!("operation {at} ({op:?}): {why}");
        let result = rig.step(*op);
        let opens = matches!(op, Op::Reopen | Op::Kill | Op::Cut(_) | Op::Remount(_));
        if poisoned && !opens && !matches!(op, Op::Checksum(_)) {
            match &result {
                // What changes nothing may succeed; what reads or writes own data may not.
                Ok(()) if matches!(op, Op::Flush | Op::Close) => {
                    return Err(here("a poisoned layer flushed".into()));
                }
                _ => {}
            }
        }
        if let Err(error) = &result {
            let no_space = error.kind() == ErrorKind::NoSpace;
            // What a failed sync has lost, room does not bring back.
            let lost = error.to_string().starts_with("syncing ");
            if no_space
                && !lost
                && matches!(
                    op,
                    Op::Flush | Op::Close | Op::Discard { .. } | Op::Reopen | Op::Kill
                )
            {
                return Err(here(format!(
                    "that wants no space but of the reserve: {error}"
                )));
            }
            let expected = match plan.fault {
                _ if poisoned || rig.poisoned() => ErrorKind::Poisoned,
                Fault::Errno(libc::EIO)
                | Fault::Short(libc::EIO)
                | Fault::LostSync(_)
                | Fault::Done(libc::EIO) => ErrorKind::Io,
                _ => ErrorKind::NoSpace,
            };
            if error.kind() != expected && error.kind() != ErrorKind::Poisoned {
                return Err(here(format!("{expected:?} expected, not {error:?}")));
            }
            if rig.chain.is_none() {
                // Opening failed. It works once the host does.
                rig.faults.heal();
                rig.open()
                    .map_err(|error| here(format!("cannot open after a fault: {error}")))?;
            }
        }
        match rig.read() {
            Ok(content) => {
                if result.is_err() {
                    rig.model.check(&content).map_err(here)?;
                    // A failed write leaves old or new, and that stays.
                    rig.model.adopt(&content);
                } else if content != rig.model.content() {
                    return Err(here("reads something else than was written".into()));
                }
            }
            Err(error) if error.kind() == ErrorKind::Poisoned && rig.poisoned() => {}
            Err(error) if rig.faults.fired() > 0 && error.kind() == ErrorKind::Io => {}
            Err(error) => return Err(here(format!("cannot read: {error}"))),
        }
        poisoned = rig.poisoned();
    }
    let fired = rig.faults.fired() > 0;
    rig.faults.heal();
    if !rig.poisoned() {
        rig.step(Op::Flush)
            .map_err(|error| format!("the last flush: {error}"))?;
    }
    rig.chain = None;
    for seed in 0..3 {
        let cut = rig.disk.cut(seed);
        let mut after = Rig {
            disk: cut.clone(),
            faults: rig.faults.clone(),
            options,
            spec: rig.spec.clone(),
            chain: None,
            model: rig.model.clone(),
            layers: rig.layers,
            tag: 1000,
        };
        after
            .come_back(cut)
            .map_err(|why| format!("after power cut {seed}: {why}"))?;
    }
    let disk = rig.disk.clone();
    rig.come_back(disk)
        .map_err(|why| format!("after the process ended: {why}"))?;
    Ok(fired)
}

/// The workloads of a normal run, or of a long one.
fn more(seeds: std::ops::Range<u64>) -> Box<dyn Iterator<Item = u64>> {
    let long = std::env::var("VELLUM_LONG").is_ok_and(|value| value != "0");
    if long {
        Box::new(seeds.flat_map(|seed| (0..10).map(move |round| round * 1000 + seed)))
    } else {
        Box::new(seeds)
    }
}

/// Every operation of a workload, every fault.
fn prove(options: LayerOptions, seeds: std::ops::Range<u64>) {
    for seed in more(seeds) {
        let ops = workload::generate(seed, 40);
        for fault in FAULTS {
            let changes = OpKind::CHANGES.into_iter();
            let kinds = match fault {
                Fault::Errno(libc::EIO) => vec![],
                Fault::LostSync(_) => changes
                    .filter(|kind| kind.is_sync())
                    .chain([OpKind::CheckWrittenBack])
                    .collect(),
                Fault::Short(_) => vec![OpKind::Write, OpKind::WriteDurable, OpKind::WriteDirect],
                _ => changes.collect(),
            };
            let plan = FaultPlan {
                kinds,
                nth: 1,
                fault,
                lasting: false,
            };
            plan.in_each_operation(|plan| survive(&ops, options, plan))
                .unwrap_or_else(|why| panic!("workload {seed}, {why}"));
        }
    }
}

/// The process dies as the plan says and another comes; then the power goes. False where there is no
/// such operation.
fn survive_death(ops: &[Op], options: LayerOptions, plan: &FaultPlan) -> Result<bool, String> {
    let mut rig = Rig::new(options);
    rig.faults.fail(plan.clone());
    let died = ops.iter().any(|op| rig.step(*op).is_err());
    let disk = rig.disk.clone();
    rig.come_back(disk)
        .map_err(|why| format!("after the process died: {why}"))?;
    for op in [Op::Checksum(0), Op::Snapshot, Op::Checksum(0), Op::Flush] {
        rig.step(op).map_err(|error| format!("{op:?}: {error}"))?;
    }
    for seed in 0..4 {
        rig.come_back(rig.disk.cut(seed))
            .map_err(|why| format!("after the process died, then power cut {seed}: {why}"))?;
    }
    Ok(died)
}

fn prove_death(options: LayerOptions, seeds: std::ops::Range<u64>) {
    for seed in more(seeds) {
        let ops = workload::generate(seed, 40);
        FaultPlan::death()
            .in_each_operation(|plan| survive_death(&ops, options, plan))
            .unwrap_or_else(|why| panic!("workload {seed}, {why}"));
    }
}

#[test]
fn a_process_that_dies_anywhere_loses_nothing_flushed() {
    prove_death(tiny(0, false), 20..21);
    prove_death(tiny(4, false), 24..27);
}

#[test]
fn a_process_that_dies_while_areas_are_freed_in_the_background_loses_nothing_flushed() {
    prove_death(tiny(4, true), 32..34);
}

#[test]
fn any_single_fault_loses_nothing_flushed_without_blocks_in_the_journal() {
    prove(tiny(0, false), 2..3);
}

#[test]
fn any_single_fault_loses_nothing_flushed_with_a_tiny_journal() {
    prove(tiny(4, false), 4..6);
}

#[test]
fn any_single_fault_loses_nothing_flushed_while_areas_are_freed_in_the_background() {
    prove(tiny(4, true), 8..9);
}

#[test]
fn any_single_fault_loses_nothing_flushed_with_the_default_journal() {
    prove(LayerOptions::default(), 11..12);
}

/// Memory may have let go of the block, and the record would carry what was there before.
#[test]
fn a_flush_of_a_block_that_could_not_be_written_back_fails() {
    let mut rig = Rig::new(LayerOptions::default());
    rig.chain()
        .write_at(&[1; 4096], 0, Durability::Durable)
        .unwrap();
    rig.faults.fail(FaultPlan {
        kinds: vec![OpKind::CheckWrittenBack],
        nth: 1,
        fault: Fault::LostSync(libc::EIO),
        lasting: false,
    });
    let flushed = rig.chain().write_at(&[2; 4096], 0, Durability::Durable);
    let error = flushed.unwrap_err().to_string();
    assert!(
        error.contains("writing /layers/layer1/data back"),
        "{error}"
    );
    assert!(rig.poisoned());
    rig.faults.evict().unwrap();
    rig.open().unwrap();
    assert!(rig.read().unwrap().starts_with(&[1; 4096]));
}
