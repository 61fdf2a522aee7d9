//! Runs a workload on a simulated disk, cuts the power all the time, and checks what is found
//! then against a model.

pub mod model;
pub mod workload;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use vellum_base::block::{BlockDevice, Durability};
use vellum_base::storage::{Moment, Observer, OpKind, SeededRng, SimStorage, Storage};
use vellum_core::chain::{Chain, ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, SealedLayer, WritableLayer, seal_in_place};

use model::{Model, pattern};
use workload::{Change, Op, SIZE};

const ROOT: &str = "/layers";
/// More sealed layers than this only cost time.
const MAX_SEALED: usize = 4;

/// How often to cut.
#[derive(Clone, Copy)]
pub struct Effort {
    /// Cuts in each operation that makes something durable.
    pub at_sync: u64,
    /// Cuts in each other change.
    pub between: u64,
    /// ... one in this many of them.
    pub one_in: u64,
}

/// What was checked.
#[derive(Default)]
pub struct Cuts {
    pub all: AtomicU64,
    /// Of these, file systems that were mounted again in the same boot.
    pub remounts: AtomicU64,
}

/// What the store above would know after a cut.
#[derive(Clone, Default)]
struct Shape {
    sealed: Vec<PathBuf>,
    /// What a client reads through the sealed layers up to each.
    views: Vec<Vec<u8>>,
    top: PathBuf,
    /// The layer that is about to become the top.
    next: Option<PathBuf>,
}

struct World {
    model: Model,
    shape: Shape,
    rng: SeededRng,
    failure: Option<String>,
}

/// One run of a workload.
pub struct Run {
    world: Arc<Mutex<World>>,
    options: LayerOptions,
    storage: SimStorage,
    chain: Option<Chain>,
    cuts: Arc<Cuts>,
    effort: Effort,
    layers: u64,
    tag: u16,
}

fn seam(storage: &SimStorage) -> Arc<dyn Storage> {
    Arc::new(storage.clone())
}

fn read_all(chain: &Chain) -> Result<Vec<u8>, String> {
    let mut content = vec![0; SIZE as usize];
    chain
        .read_at(&mut content, 0)
        .map_err(|error| format!("cannot read: {error}"))?;
    Ok(content)
}

/// Opens what a cut left, as the store would.
fn open(storage: &SimStorage, shape: &Shape, options: LayerOptions) -> Result<Chain, String> {
    let seam = seam(storage);
    let mut spec = ChainSpec {
        sealed: shape.sealed.clone(),
        top: Some(shape.top.clone()),
        options,
    };
    if let Some(next) = &shape.next {
        let header = Header::read(&*seam, &shape.top).map_err(|error| error.to_string())?;
        if header.sealed {
            spec.sealed.push(shape.top.clone());
            spec.top = Some(next.clone());
        }
    }
    open_chain(&seam, &spec).map_err(|error| format!("cannot open: {error}"))
}

/// The file that says which blocks changed since the last flush: only memory, so nothing syncs it, and
/// whatever the host had written back of it is there after the file system was mounted again.
const LOG: &str = "live";

/// What is found after a file system was shut down and mounted again in the same boot, or `None` for a
/// power cut. Mostly the log of changes had been written back whole, and little else.
fn remounts(rng: &mut SeededRng) -> Option<Option<&'static str>> {
    rng.chance(1, 2).then(|| rng.chance(3, 4).then_some(LOG))
}

/// Takes the disk's memory away, with the power or without.
fn lose(disk: &SimStorage, rng: &mut SeededRng) -> SimStorage {
    match remounts(rng) {
        Some(kept) => disk.remount(rng.bits(), kept),
        None => disk.cut(rng.bits()),
    }
}

fn check_sealed(storage: &SimStorage, shape: &Shape) -> Result<(), String> {
    let seam = seam(storage);
    for (at, view) in shape.views.iter().enumerate() {
        let spec = ChainSpec {
            sealed: shape.sealed[..=at].to_vec(),
            ..ChainSpec::default()
        };
        let chain = open_chain(&seam, &spec).map_err(|error| format!("sealed: {error}"))?;
        if read_all(&chain)? != *view {
            return Err(format!("sealed layer {at} changed"));
        }
        let layer = SealedLayer::open(&*seam, &shape.sealed[at])
            .map_err(|error| format!("sealed: {error}"))?;
        let report = layer
            .scrub(|_| {})
            .map_err(|error| format!("sealed: {error}"))?;
        if !report.corrupt.is_empty() {
            return Err(format!(
                "sealed layer {at}: corrupt blocks {:?}",
                report.corrupt
            ));
        }
    }
    Ok(())
}

/// Checks what a power cut left: it opens by itself, holds what it may, holds it still after
/// another cut, and works.
fn check_cut(
    disk: SimStorage,
    model: &Model,
    shape: &Shape,
    options: LayerOptions,
    rng: &mut SeededRng,
) -> Result<(), String> {
    let mut disk = disk;
    // The power goes again while the layer recovers, and again.
    for _ in 0..rng.below(3) {
        disk.arm(1 + rng.below(9));
        drop(open(&disk, shape, options));
        disk = lose(&disk, rng);
    }
    let chain = open(&disk, shape, options)?;
    let content = read_all(&chain)?;
    model.check(&content)?;
    let again = lose(&disk, rng);
    if read_all(&open(&again, shape, options)?)? != content {
        return Err("a second cut, right after the layer was opened, changed it".into());
    }
    if rng.chance(1, 4) {
        check_sealed(&again, shape)?;
    }
    if rng.chance(1, 3) {
        let mut model = model.clone();
        model.adopt(&content);
        model.acknowledge_all();
        for tag in 0..1 + rng.below(4) {
            let offset = rng.below(SIZE - 9000);
            let bytes = pattern(60000 + tag as u16, offset, 1 + rng.below(9000));
            model.begin(offset, &bytes);
            let durability = if rng.chance(1, 2) {
                Durability::Durable
            } else {
                Durability::Buffered
            };
            chain
                .write_at(&bytes, offset, durability)
                .map_err(|error| format!("cannot write after a cut: {error}"))?;
            model.complete(offset, &bytes);
            if durability == Durability::Durable {
                model.acknowledge(offset, bytes.len() as u64);
            }
        }
        let last = lose(&disk, rng);
        let content = read_all(&open(&last, shape, options)?)?;
        model
            .check(&content)
            .map_err(|why| format!("written after a cut, then cut again: {why}"))?;
    }
    Ok(())
}

impl Run {
    /// A run on an empty layer. `cuts` counts the cuts that were checked.
    pub fn new(options: LayerOptions, seed: u64, effort: Effort, cuts: &Arc<Cuts>) -> Self {
        let storage = SimStorage::new();
        storage.create_dir(Path::new(ROOT)).unwrap();
        storage.sync_dir(Path::new("/")).unwrap();
        let mut run = Run {
            world: Arc::new(Mutex::new(World {
                model: Model::new(SIZE),
                shape: Shape::default(),
                rng: SeededRng::new(seed ^ 0x5eed),
                failure: None,
            })),
            options,
            storage,
            chain: None,
            cuts: cuts.clone(),
            effort,
            layers: 0,
            tag: 0,
        };
        let top = run.new_layer(None);
        run.world.lock().shape.top = top;
        run.watch();
        run.reopen();
        run
    }

    /// Has every moment of the disk looked at.
    fn watch(&self) {
        let world = self.world.clone();
        let (options, effort, cuts) = (self.options, self.effort, self.cuts.clone());
        let observer: Observer = Arc::new(move |moment: &Moment<'_>| {
            let world = &mut *world.lock();
            if world.failure.is_some() {
                return;
            }
            let times = if moment.kind.is_sync() {
                effort.at_sync
            } else if moment.kind != OpKind::Create && world.rng.chance(1, effort.one_in) {
                effort.between
            } else {
                0
            };
            for _ in 0..times {
                let remount = remounts(&mut world.rng);
                let seed = world.rng.bits();
                let disk = match remount {
                    Some(kept) => moment.remount(seed, kept),
                    None => moment.cut(seed),
                };
                cuts.all.fetch_add(1, Ordering::Relaxed);
                let remounts = u64::from(remount.is_some());
                cuts.remounts.fetch_add(remounts, Ordering::Relaxed);
                let outcome = check_cut(disk, &world.model, &world.shape, options, &mut world.rng);
                if let Err(why) = outcome {
                    let what = match remount {
                        Some(kept) => format!("mounted again (whole: {kept:?})"),
                        None => "cut".into(),
                    };
                    world.failure = Some(format!("{what} in {moment:?}: {why}"));
                    return;
                }
            }
        });
        self.storage.observe(Some(observer));
    }

    fn new_layer(&mut self, parent: Option<uuid::Uuid>) -> PathBuf {
        self.layers += 1;
        let dir = Path::new(ROOT).join(format!("layer{}", self.layers));
        let header = Header::new(parent, SIZE).unwrap();
        WritableLayer::create(&self.storage, &dir, &header).unwrap();
        self.storage.sync_dir(Path::new(ROOT)).unwrap();
        dir
    }

    fn chain(&self) -> &Chain {
        self.chain.as_ref().unwrap()
    }

    fn reopen(&mut self) {
        // The old one first: its threads must have ended.
        self.chain = None;
        let shape = self.world.lock().shape.clone();
        match open(&self.storage, &shape, self.options) {
            Ok(chain) => self.chain = Some(chain),
            Err(why) => self.fail(why),
        }
    }

    fn fail(&self, why: String) {
        self.world.lock().failure.get_or_insert(why);
    }

    /// A client comes back and reads; `certain` is true after a power cut, when nothing but what
    /// it reads is anywhere.
    fn come_back(&mut self, certain: bool) {
        self.reopen();
        let Some(chain) = &self.chain else { return };
        let outcome = read_all(chain).and_then(|content| {
            let mut world = self.world.lock();
            world.model.check(&content)?;
            world.model.adopt(&content);
            if certain {
                world.model.acknowledge_all();
            }
            Ok(())
        });
        if let Err(why) = outcome {
            self.fail(why);
        }
    }

    fn change(&self, change: &Change) {
        let (offset, bytes) = (change.offset, &change.bytes);
        self.world.lock().model.begin(offset, bytes);
        match change.apply(self.chain()) {
            Ok(()) => {
                let model = &mut self.world.lock().model;
                model.complete(offset, bytes);
                if change.fua {
                    model.acknowledge(offset, bytes.len() as u64);
                }
            }
            Err(error) => self.fail(format!("a write failed: {error}")),
        }
    }

    /// Does one operation; true while all is well.
    pub fn step(&mut self, op: Op) -> bool {
        if let Some(change) = op.change(&mut self.tag) {
            self.change(&change);
        }
        match op {
            Op::Write { ahead: true, .. } => self.chain().top().unwrap().flush_ahead(),
            Op::Write { .. } | Op::Discard { .. } | Op::Zero { .. } => {}
            Op::Flush => self.acknowledge(Chain::flush),
            Op::Close => self.acknowledge(Chain::close),
            Op::Reopen => {
                self.acknowledge(Chain::close);
                self.come_back(false);
            }
            Op::Snapshot => self.snapshot(),
            Op::Checksum(which) => {
                let sealed = self.world.lock().shape.sealed.clone();
                if !sealed.is_empty() {
                    let dir = &sealed[which as usize % sealed.len()];
                    if let Err(error) = seal_in_place(&self.storage, dir, |_| {}) {
                        self.fail(format!("cannot seal: {error}"));
                    }
                }
            }
            Op::Kill => self.come_back(false),
            Op::Cut(seed) => {
                self.go_on_after(|disk| disk.cut(seed));
            }
            Op::Remount(seed) => {
                let kept = SeededRng::new(seed).chance(3, 4).then_some(LOG);
                self.go_on_after(|disk| disk.remount(seed, kept));
            }
        }
        if let Some(top) = self.chain.as_ref().and_then(Chain::top) {
            top.assert_sound();
        }
        self.world.lock().failure.is_none()
    }

    /// What was in memory is gone.
    fn go_on_after(&mut self, loss: impl FnOnce(&SimStorage) -> SimStorage) {
        self.chain = None;
        self.storage.observe(None);
        self.storage = loss(&self.storage);
        self.watch();
        self.come_back(true);
    }

    fn acknowledge(&self, work: impl FnOnce(&Chain) -> vellum_base::Result<()>) {
        match work(self.chain()) {
            Ok(()) => self.world.lock().model.acknowledge_all(),
            Err(error) => self.fail(format!("a flush failed: {error}")),
        }
    }

    fn snapshot(&mut self) {
        if self.world.lock().shape.sealed.len() >= MAX_SEALED {
            return;
        }
        let old = self.chain().top().unwrap();
        let dir = self.new_layer(Some(old.header().uuid));
        let next = match WritableLayer::open(seam(&self.storage), &dir, self.options) {
            Ok(next) => next,
            Err(error) => return self.fail(format!("cannot open the next layer: {error}")),
        };
        self.world.lock().shape.next = Some(dir.clone());
        match self.chain().seal_top(next) {
            Ok(_) => {
                let world = &mut *self.world.lock();
                world.model.acknowledge_all();
                let shape = &mut world.shape;
                shape.next = None;
                shape.sealed.push(std::mem::replace(&mut shape.top, dir));
                shape.views.push(world.model.content());
            }
            Err(error) => self.fail(format!("cannot snapshot: {error}")),
        }
    }

    /// Runs a workload; the failure says after which operation.
    pub fn run(&mut self, ops: &[Op]) -> Result<(), String> {
        for (at, op) in ops.iter().enumerate() {
            if !self.step(*op) {
                let why = self.world.lock().failure.clone().unwrap_or_default();
                return Err(format!("operation {at} ({op:?}): {why}"));
            }
        }
        let content = read_all(self.chain())?;
        if content != self.world.lock().model.content() {
            return Err("the device does not read as it was written".into());
        }
        Ok(())
    }
}
