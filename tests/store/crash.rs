//! The store's operations on a simulated disk that loses power: in every step that makes something
//! durable, and in between. Whatever a cut leaves, each image, container, snapshot and volume is
//! there whole or not at all, what was done stays done, and `prune` collects all the rest.
//!
//! `VELLUM_LONG=1` makes it 60,000 cuts, `VELLUM_CUTS=n` any number; `VELLUM_SEED=n` runs one
//! workload, as a failure prints it. (Layers have random names, and what is done in the order of
//! their names differs from run to run: a seed may have to be run more than once.)

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use uuid::Uuid;
use vellum_base::block::{BLOCK_SIZE, BlockDevice, Durability};
use vellum_base::storage::{
    Fault, FaultPlan, FaultStorage, Moment, Observer, OpKind, SeededRng, SimStorage, Storage,
};
use vellum_base::{Error, ErrorKind, Result};
use vellum_core::layer::{Header, LayerOptions, WritableLayer};
use vellum_engine::check::finish_commits;
use vellum_engine::commit::commit;
use vellum_engine::device::Target;
use vellum_engine::import::{ImportOptions, import};
use vellum_engine::merge::merge;
use vellum_engine::seal::How;
use vellum_engine::snapshot::{
    ForkVolumes, Present, fork, remove_snapshot, rollback, snapshot as keep,
};
use vellum_engine::watch::Quiet;
use vellum_store::{
    FsInfo, LayerInfo, NewContainer, SnapshotKind, SnapshotRecord, Store, TemplateRecord,
};

/// Nothing of that name is on the host.
const ROOT: &str = "/vellum-simulated-store";
const BLOCKS: u64 = 10;
const SIZE: u64 = BLOCKS * BLOCK_SIZE;
const SECTOR: usize = 512;
/// Of each workload.
const OPS: usize = 40;

type Content = Vec<u8>;

/// What users see of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    images: BTreeMap<String, Content>,
    containers: BTreeMap<String, Content>,
    /// Snapshots of containers, as `C@NAME`.
    kept: BTreeMap<String, Content>,
    /// containerd's snapshots.
    snapshots: BTreeMap<String, (bool, Content)>,
    volumes: BTreeMap<String, ()>,
    quarantined: BTreeMap<String, ()>,
}

#[derive(Clone, Debug)]
enum Op {
    /// Another process opens the store.
    Open,
    Import(String, u8),
    Create(String, String),
    Write(String, u64, u8),
    Commit(String, String),
    Keep(String, String),
    ForgetKept(String, String),
    Fork(String, Option<String>, String),
    Rollback(String, String),
    Merge(String),
    Tag(String, String),
    Rename(String, String),
    Remove(String),
    RemoveImage(String),
    Prune,
    Prepare(String, Option<String>),
    CommitSnapshot(String, u8),
    RemoveSnapshot(String),
    AddVolume(String),
    RemoveVolume(String),
    Quarantine(String),
}

/// What a cut may leave: for each thing what it was before the operation or is after it.
struct World {
    before: State,
    after: State,
    rng: SeededRng,
    cuts: u64,
    failure: Option<String>,
}

fn open_store(disk: &(impl Storage + Clone + 'static)) -> Result<Store> {
    Store::with_storage(Path::new(ROOT), Arc::new(disk.clone()))
}

fn read_device(device: &dyn BlockDevice) -> Result<Content> {
    let mut content = vec![0; SIZE as usize];
    device.read_at(&mut content, 0)?;
    Ok(content)
}

fn read_target(store: &Store, target: &Target) -> Result<Content> {
    let open = target.open(store)?;
    read_device(&**open.chain())
}

/// Reads everything that the store shows.
fn view(store: &Store) -> Result<State> {
    let records = store.records()?;
    if let Some(damaged) = records.damaged.into_iter().next() {
        return Err(damaged);
    }
    let mut state = State::default();
    for image in records.images {
        let top = Target::Sealed(*image.layers.last().unwrap());
        let content = read_target(store, &top).map_err(|e| e.context(&image.name))?;
        state.images.insert(image.name, content);
    }
    for container in records.containers {
        let settled = store.as_settled(container.clone())?;
        for kept in &settled.snapshots {
            let name = format!("{}@{}", settled.name, kept.name);
            let top = *settled.snapshot_layers(kept.id)?.last().unwrap();
            let content = read_target(store, &Target::Sealed(top)).map_err(|e| e.context(&name))?;
            state.kept.insert(name, content);
        }
        let target = Target::of(&container);
        let content = read_target(store, &target)?;
        state.containers.insert(container.name, content);
    }
    for snapshot in records.snapshots {
        let target = Target::Layer(snapshot.top());
        let content = read_target(store, &target).map_err(|e| e.context(&snapshot.key))?;
        let committed = snapshot.kind == SnapshotKind::Committed;
        state.snapshots.insert(snapshot.key, (committed, content));
    }
    state.volumes = store.volumes()?.into_iter().map(|v| (v, ())).collect();
    let quarantined = records.quarantined.into_iter();
    state.quarantined = quarantined.map(|entry| (entry.name, ())).collect();
    Ok(state)
}

/// Each sector as before or after.
fn is_between(found: &[u8], before: &[u8], after: &[u8]) -> bool {
    let sectors = found.chunks(SECTOR).zip(before.chunks(SECTOR));
    let mut sectors = sectors.zip(after.chunks(SECTOR));
    sectors.all(|((found, before), after)| found == before || found == after)
}

fn check_kind<T: PartialEq>(
    what: &str,
    found: &BTreeMap<String, T>,
    before: &BTreeMap<String, T>,
    after: &BTreeMap<String, T>,
    between: impl Fn(&T, &T, &T) -> bool,
) -> std::result::Result<(), String> {
    // One that is renamed is there, under one name or the other and not under both.
    if ![before.len(), after.len()].contains(&found.len()) {
        return Err(format!(
            "{what}s: {:?}, where there were {:?} and then {:?}",
            found.keys(),
            before.keys(),
            after.keys()
        ));
    }
    let names: BTreeSet<&String> = found
        .keys()
        .chain(before.keys())
        .chain(after.keys())
        .collect();
    for name in names {
        let (found, before, after) = (found.get(name), before.get(name), after.get(name));
        if found == before || found == after {
            continue;
        }
        if let (Some(found), Some(before), Some(after)) = (found, before, after)
            && between(found, before, after)
        {
            continue;
        }
        return Err(format!(
            "{what} {name}: {}",
            match (found, before, after) {
                (None, Some(_), Some(_)) => "is lost",
                (None, ..) => "is neither as before nor as after",
                (Some(_), None, None) => "came from nowhere",
                _ => "holds what it never held",
            }
        ));
    }
    Ok(())
}

fn check_state(found: &State, before: &State, after: &State) -> std::result::Result<(), String> {
    let no = |_: &Content, _: &Content, _: &Content| false;
    check_kind("image", &found.images, &before.images, &after.images, no)?;
    let between =
        |found: &Content, before: &Content, after: &Content| is_between(found, before, after);
    check_kind("kept snapshot", &found.kept, &before.kept, &after.kept, no)?;
    check_kind(
        "container",
        &found.containers,
        &before.containers,
        &after.containers,
        between,
    )?;
    check_kind(
        "snapshot",
        &found.snapshots,
        &before.snapshots,
        &after.snapshots,
        |found, before, after| {
            // A commit writes, seals, and then names it.
            [before.0, after.0].contains(&found.0) && is_between(&found.1, &before.1, &after.1)
        },
    )?;
    let never = |_: &(), _: &(), _: &()| false;
    check_kind(
        "volume",
        &found.volumes,
        &before.volumes,
        &after.volumes,
        never,
    )?;
    check_kind(
        "quarantined container",
        &found.quarantined,
        &before.quarantined,
        &after.quarantined,
        never,
    )
}

/// As `vellum prune`.
fn prune(store: &Store) -> Result<()> {
    finish_commits(store)?;
    let report = store.prune()?;
    assert!(!report.busy);
    Ok(())
}

/// Everything that is there although nothing refers to it.
fn leaks(disk: &SimStorage, store: &Store) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let used = store.records()?.used_layers();
    for layer in store.layers()? {
        if !used.contains(&layer) {
            found.push(format!("layer {layer}"));
        }
    }
    let list = |dir: &str| disk.list(&Path::new(ROOT).join(dir)).unwrap_or_default();
    for dir in ["staging", "trash", "run"] {
        found.extend(
            list(dir)
                .into_iter()
                .map(|entry| format!("{dir}/{}", entry.name)),
        );
    }
    for dir in [
        "images",
        "containers",
        "templates",
        "snapshots",
        "quarantine/containers",
        "quarantine/images",
    ] {
        let names: Vec<String> = list(dir).into_iter().map(|entry| entry.name).collect();
        for name in &names {
            let belongs = match name.strip_suffix(".reason") {
                Some(stem) => names.contains(&format!("{stem}.json")),
                None => name.ends_with(".json"),
            };
            if !belongs {
                found.push(format!("{dir}/{name}"));
            }
        }
    }
    for layer in list("layers") {
        const FILES: [&str; 8] = [
            "layer",
            "data",
            "map",
            "journal.0",
            "journal.1",
            "live",
            "seal",
            "info.json",
        ];
        let dir = format!("layers/{}", layer.name);
        for entry in list(&dir) {
            if !FILES.contains(&entry.name.as_str()) {
                found.push(format!("{dir}/{}", entry.name));
            }
        }
    }
    Ok(found)
}

/// Checks what a cut left.
fn check_cut(disk: SimStorage, world: &mut World) -> std::result::Result<(), String> {
    let mut disk = disk;
    // The power goes again while the store is opened, commits are finished, and things collected.
    for _ in 0..world.rng.below(3) {
        disk.arm(1 + world.rng.below(25));
        if let Ok(store) = open_store(&disk) {
            let _ = prune(&store);
        }
        disk = disk.cut(world.rng.bits());
    }
    let text = |error: Error| error.to_string();
    let store = open_store(&disk).map_err(|error| format!("cannot open: {error}"))?;
    let found = view(&store).map_err(|error| format!("cannot read: {error}"))?;
    check_state(&found, &world.before, &world.after)?;
    prune(&store).map_err(|error| format!("cannot prune: {error}"))?;
    let pruned = view(&store).map_err(|error| format!("cannot read what prune left: {error}"))?;
    if pruned != found {
        return Err("prune changed what is seen".into());
    }
    let leaks = leaks(&disk, &store).map_err(text)?;
    if !leaks.is_empty() {
        return Err(format!("prune left {leaks:?}"));
    }
    // Nothing of that goes away any more.
    let again = disk.cut(world.rng.bits());
    let store = open_store(&again).map_err(text)?;
    if view(&store).map_err(text)? != found {
        return Err("a second cut, after prune, changed what is seen".into());
    }
    if world.rng.chance(1, 6) {
        empty(&again, &store).map_err(|error| format!("cannot empty the store: {error}"))?;
    }
    Ok(())
}

/// Removes everything; then no layer may be left.
fn empty(disk: &SimStorage, store: &Store) -> Result<()> {
    let records = store.records()?;
    for container in &records.containers {
        store.remove_container(&container.name)?;
    }
    for image in &records.images {
        store.remove_image(&image.name)?;
    }
    for snapshot in &records.snapshots {
        store.remove_snapshot(snapshot.id)?;
    }
    for entry in &records.quarantined {
        disk.remove_file(&entry.path).unwrap();
    }
    prune(store)?;
    assert_eq!(store.layers()?, Vec::<Uuid>::new());
    let left = leaks(disk, store)?;
    assert!(left.is_empty(), "left in an empty store: {left:?}");
    Ok(())
}

struct Run {
    world: Arc<Mutex<World>>,
    disk: SimStorage,
    /// Disk images to import.
    files: tempfile::TempDir,
}

impl Run {
    fn new(seed: u64) -> Self {
        let disk = SimStorage::new();
        disk.create_dir(Path::new(ROOT)).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        let world = Arc::new(Mutex::new(World {
            before: State::default(),
            after: State::default(),
            rng: SeededRng::new(seed ^ 0xc4a5),
            cuts: 0,
            failure: None,
        }));
        let seen = world.clone();
        let observer: Observer = Arc::new(move |moment: &Moment<'_>| {
            let world = &mut *seen.lock();
            if world.failure.is_some() {
                return;
            }
            let times = if moment.kind.is_sync() {
                2
            } else if moment.kind != OpKind::Create && world.rng.chance(1, 3) {
                1
            } else {
                0
            };
            for _ in 0..times {
                world.cuts += 1;
                let seed = world.rng.bits();
                if let Err(why) = check_cut(moment.cut(seed), world) {
                    world.failure = Some(format!("cut in {moment:?}: {why}"));
                    return;
                }
            }
        });
        disk.observe(Some(observer));
        Run {
            world,
            disk,
            files: tempfile::tempdir().unwrap(),
        }
    }

    /// A disk image of `tag`, on the host.
    fn raw(&self, tag: u8) -> (PathBuf, Content) {
        let mut content = vec![0; SIZE as usize];
        for block in 0..BLOCKS / 2 {
            let start = (block * BLOCK_SIZE) as usize;
            content[start..start + BLOCK_SIZE as usize].fill(tag);
        }
        let path = self.files.path().join(format!("{tag}.img"));
        std::fs::write(&path, &content).unwrap();
        (path, content)
    }

    /// What there is after an operation that succeeds.
    fn predict(&self, op: &Op, state: &mut State) {
        match op {
            Op::Open | Op::Prune | Op::Merge(_) => {}
            Op::Import(name, tag) => {
                state.images.insert(name.clone(), self.raw(*tag).1);
            }
            Op::Create(name, image) => {
                let content = state.images[image].clone();
                state.containers.insert(name.clone(), content);
            }
            Op::Write(name, block, tag) => {
                let start = (block * BLOCK_SIZE) as usize;
                let content = state.containers.get_mut(name).unwrap();
                content[start..start + BLOCK_SIZE as usize].fill(*tag);
            }
            Op::Commit(name, image) => {
                let content = state.containers[name].clone();
                state.images.insert(image.clone(), content);
            }
            Op::Keep(name, kept) => {
                let content = state.containers[name].clone();
                state.kept.insert(format!("{name}@{kept}"), content);
            }
            Op::ForgetKept(name, kept) => {
                state.kept.remove(&format!("{name}@{kept}"));
            }
            Op::Fork(name, kept, new) => {
                let content = match kept {
                    Some(kept) => state.kept[&format!("{name}@{kept}")].clone(),
                    None => state.containers[name].clone(),
                };
                state.containers.insert(new.clone(), content);
            }
            Op::Rollback(name, kept) => {
                let content = state.kept[&format!("{name}@{kept}")].clone();
                state.containers.insert(name.clone(), content);
            }
            Op::Tag(name, new) => {
                let content = state.images[name].clone();
                state.images.insert(new.clone(), content);
            }
            Op::Rename(name, new) => {
                let content = state.containers.remove(name).unwrap();
                state.containers.insert(new.clone(), content);
                let prefix = format!("{name}@");
                let own: Vec<String> = state.kept.keys().cloned().collect();
                for key in own.iter().filter(|key| key.starts_with(&prefix)) {
                    let content = state.kept.remove(key).unwrap();
                    state.kept.insert(key.replacen(name, new, 1), content);
                }
            }
            Op::Remove(name) => {
                state.containers.remove(name);
                forget_all_kept(state, name);
            }
            Op::RemoveImage(name) => {
                state.images.remove(name);
            }
            Op::Prepare(key, parent) => {
                let content = match parent {
                    Some(parent) => state.snapshots[parent].1.clone(),
                    None => vec![0; SIZE as usize],
                };
                state.snapshots.insert(key.clone(), (false, content));
            }
            Op::CommitSnapshot(key, tag) => {
                let (committed, content) = state.snapshots.get_mut(key).unwrap();
                *committed = true;
                content[..BLOCK_SIZE as usize].fill(*tag);
            }
            Op::RemoveSnapshot(key) => {
                state.snapshots.remove(key);
            }
            Op::AddVolume(name) => {
                state.volumes.insert(name.clone(), ());
            }
            Op::RemoveVolume(name) => {
                state.volumes.remove(name);
            }
            Op::Quarantine(name) => {
                state.containers.remove(name);
                forget_all_kept(state, name);
                state.quarantined.insert(name.clone(), ());
            }
        }
    }

    fn carry_out(&self, op: &Op) -> Result<()> {
        self.carry_out_on(&open_store(&self.disk)?, op)
    }

    fn carry_out_on(&self, store: &Store, op: &Op) -> Result<()> {
        match op {
            Op::Open => {}
            Op::Import(name, tag) => {
                let options = ImportOptions {
                    format: Some(vellum_image::Format::Raw),
                    ..ImportOptions::default()
                };
                import(store, name, &self.raw(*tag).0, &options, &Quiet)?;
            }
            Op::Create(name, image) => {
                store.create_container(&NewContainer {
                    image,
                    name: Some(name),
                    ..NewContainer::default()
                })?;
            }
            Op::Write(name, block, tag) => {
                let open = Target::of(&store.container(name)?).open(store)?;
                let bytes = [*tag; BLOCK_SIZE as usize];
                let chain = open.chain();
                chain.write_at(&bytes, block * BLOCK_SIZE, Durability::Buffered)?;
                chain.flush()?;
            }
            Op::Commit(name, image) => {
                commit(store, name, image, None)?;
            }
            Op::Keep(name, kept) => drop(keep(store, name, Some(kept), How::Crash, None)?),
            Op::ForgetKept(name, kept) => drop(remove_snapshot(store, name, kept)?),
            Op::Fork(name, kept, new) => {
                let names = [new.clone()];
                fork(store, name, &names, kept.as_deref(), ForkVolumes::Ask)?;
            }
            Op::Rollback(name, kept) => {
                rollback(store, name, kept, Present::Discard, false)?;
            }
            Op::Merge(name) => drop(merge(store, name, None, &Quiet)?),
            Op::Tag(name, new) => drop(store.tag_image(name, new)?),
            Op::Rename(name, new) => drop(store.rename_container(name, new)?),
            Op::Remove(name) => drop(store.remove_container(name)?),
            Op::RemoveImage(name) => drop(store.remove_image(name)?),
            Op::Prune => prune(store)?,
            Op::Prepare(key, parent) => prepare(store, key, parent.as_deref())?,
            Op::CommitSnapshot(key, tag) => commit_snapshot(store, key, *tag)?,
            Op::RemoveSnapshot(key) => {
                let record = snapshot(store, key)?;
                store.remove_snapshot(record.id)?;
                for layer in record.layers {
                    store.discard_layer(layer)?;
                }
            }
            Op::AddVolume(name) => {
                let place = store.volume_place(name)?;
                match store.storage().create_dir(&place.full) {
                    // Before the cut.
                    Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                    other => other.map_err(|error| Error::io("create_dir", error))?,
                }
                store.publish_volume(&place)?;
            }
            Op::RemoveVolume(name) => store.remove_volume(name, &[])?,
            Op::Quarantine(name) => {
                store.quarantine_container(name, "a test")?;
            }
        }
        Ok(())
    }

    fn step(&self, op: &Op) -> std::result::Result<(), String> {
        let mut after = self.world.lock().before.clone();
        self.predict(op, &mut after);
        self.world.lock().after = after;
        let done = self.carry_out(op);
        let world = &mut *self.world.lock();
        if let Some(why) = world.failure.take() {
            return Err(why);
        }
        done.map_err(|error| format!("failed: {error}"))?;
        world.before = world.after.clone();
        Ok(())
    }
}

fn snapshot(store: &Store, key: &str) -> Result<SnapshotRecord> {
    let mut records = store.records()?;
    if let Some(damaged) = records.damaged.pop() {
        return Err(damaged);
    }
    let found = records
        .snapshots
        .into_iter()
        .find(|record| record.key == key);
    found.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such snapshot"))
}

/// As the engine makes a template, with an empty layer for the file system.
fn template(store: &Store, pin: &vellum_store::StoreGuard) -> Result<Uuid> {
    if let Some(record) = store.template("test")? {
        return Ok(record.layer);
    }
    let staged = store.stage_layer(None, SIZE)?;
    let storage = store.storage().clone();
    WritableLayer::open(storage, &staged.dir(), LayerOptions::default())?.seal()?;
    vellum_core::layer::seal_in_place(&**store.storage(), &staged.dir(), |_| {})?;
    let layer = staged.publish(&LayerInfo::default(), pin)?;
    store.put_template(&TemplateRecord {
        key: "test".into(),
        layer,
        fs: FsInfo {
            fixed: None,
            kind: "ext4".into(),
        },
    })?;
    Ok(layer)
}

/// Of a snapshot that is written to, on `base`.
pub fn snapshot_record(key: &str, parent: Option<&str>, base: Uuid, layer: Uuid) -> SnapshotRecord {
    SnapshotRecord {
        key: key.into(),
        id: Uuid::new_v4(),
        kind: SnapshotKind::Active,
        parent: parent.map(Into::into),
        base,
        layers: vec![layer],
        virtual_size: SIZE,
        bytes: 0,
        base_inodes: None,
        inodes: None,
        device: false,
        labels: BTreeMap::new(),
        created: SystemTime::now(),
        updated: SystemTime::now(),
    }
}

/// As the snapshotter's, without the mount.
fn prepare(store: &Store, key: &str, parent: Option<&str>) -> Result<()> {
    store.prepare_snapshots()?;
    let pin = store.pin_layers()?;
    let base = match parent {
        Some(parent) => snapshot(store, parent)?.top(),
        None => template(store, &pin)?,
    };
    let layer = store
        .stage_layer(Some(base), SIZE)?
        .place(&LayerInfo::default(), &pin)?;
    // The mount of the snapshotter does not wait for layer and record: what it writes is what was there.
    let open = Target::Layer(layer.uuid).open(store)?;
    let mut block = [0; BLOCK_SIZE as usize];
    open.chain().read_at(&mut block, 0)?;
    open.chain().write_at(&block, 0, Durability::Buffered)?;
    open.chain().flush()?;
    let record = snapshot_record(key, parent, base, layer.uuid);
    store.put_snapshot(&record, Some(&layer), &pin)
}

fn commit_snapshot(store: &Store, key: &str, tag: u8) -> Result<()> {
    let mut record = snapshot(store, key)?;
    let open = Target::Layer(record.top()).open(store)?;
    let bytes = [tag; BLOCK_SIZE as usize];
    open.chain().write_at(&bytes, 0, Durability::Buffered)?;
    open.seal()?;
    drop(open);
    let pin = store.pin_layers()?;
    record.kind = SnapshotKind::Committed;
    store.put_snapshot(&record, None, &pin)?;
    drop(pin);
    // The snapshotter does this in the background.
    let dir = store.layer_dir(record.top());
    vellum_core::layer::seal_in_place(&**store.storage(), &dir, |_| {}).map(drop)
}

fn forget_all_kept(state: &mut State, container: &str) {
    let prefix = format!("{container}@");
    state.kept.retain(|name, _| !name.starts_with(&prefix));
}

/// One of these, if there is any.
fn pick<'a, T>(rng: &mut SeededRng, from: impl Iterator<Item = &'a T>) -> Option<&'a T> {
    let all: Vec<&T> = from.collect();
    all.get(rng.below(all.len() as u64) as usize).copied()
}

/// An operation that makes sense in `state`; the store knows which snapshots have children.
fn next_op(rng: &mut SeededRng, run: &Run, number: usize) -> Option<Op> {
    let state = run.world.lock().before.clone();
    let new = format!("n{number}");
    let tag = 1 + rng.below(250) as u8;
    Some(match rng.below(45) {
        0..=3 if state.images.len() < 4 => Op::Import(new, tag),
        4..=7 if state.containers.len() < 4 => {
            Op::Create(new, pick(rng, state.images.keys())?.clone())
        }
        8..=11 => Op::Write(
            pick(rng, state.containers.keys())?.clone(),
            rng.below(BLOCKS),
            tag,
        ),
        12..=15 if state.images.len() < 5 => {
            Op::Commit(pick(rng, state.containers.keys())?.clone(), new)
        }
        16 | 17 => Op::Remove(pick(rng, state.containers.keys())?.clone()),
        18 | 19 => {
            let name = pick(rng, state.images.keys())?.clone();
            let store = open_store(&run.disk).ok()?;
            let id = store.image(&name).ok()?.id;
            let names = store.images().ok()?.into_iter();
            let last_name = names.filter(|image| image.id == id).count() == 1;
            let used = store.containers().ok()?;
            if last_name && used.iter().any(|container| container.image_id == id) {
                return None;
            }
            Op::RemoveImage(name)
        }
        20 => Op::Prune,
        21 | 22 if state.snapshots.len() < 4 => {
            let committed = state
                .snapshots
                .iter()
                .filter(|(_, (committed, _))| *committed);
            let parent = pick(rng, committed.map(|(key, _)| key)).cloned();
            Op::Prepare(new, parent.filter(|_| rng.chance(2, 3)))
        }
        23 | 24 => {
            let active = state
                .snapshots
                .iter()
                .filter(|(_, (committed, _))| !committed);
            Op::CommitSnapshot(pick(rng, active.map(|(key, _)| key))?.clone(), tag)
        }
        25 => {
            let key = pick(rng, state.snapshots.keys())?.clone();
            let records = open_store(&run.disk).ok()?.records().ok()?;
            let has_child = |record: &SnapshotRecord| record.parent.as_ref() == Some(&key);
            if records.snapshots.iter().any(has_child) {
                return None;
            }
            Op::RemoveSnapshot(key)
        }
        26 => Op::AddVolume(new),
        27 => Op::RemoveVolume(pick(rng, state.volumes.keys())?.clone()),
        28 if state.quarantined.is_empty() => {
            Op::Quarantine(pick(rng, state.containers.keys())?.clone())
        }
        30..=32 if state.kept.len() < 6 => {
            Op::Keep(pick(rng, state.containers.keys())?.clone(), new)
        }
        33 => {
            let (name, kept) = pick(rng, state.kept.keys())?.split_once('@')?;
            Op::ForgetKept(name.into(), kept.into())
        }
        34 | 35 if state.containers.len() < 5 => {
            let name = pick(rng, state.containers.keys())?.clone();
            let prefix = format!("{name}@");
            let own = state.kept.keys().filter(|key| key.starts_with(&prefix));
            let kept = pick(rng, own).filter(|_| rng.chance(1, 2));
            let kept = kept
                .and_then(|key| key.split_once('@'))
                .map(|(_, kept)| kept.into());
            Op::Fork(name, kept, new)
        }
        37..=39 => Op::Merge(pick(rng, state.containers.keys())?.clone()),
        36 => {
            let (name, kept) = pick(rng, state.kept.keys())?.split_once('@')?;
            Op::Rollback(name.into(), kept.into())
        }
        40 | 41 if state.images.len() < 6 => Op::Tag(pick(rng, state.images.keys())?.clone(), new),
        42 | 43 => Op::Rename(pick(rng, state.containers.keys())?.clone(), new),
        _ => Op::Open,
    })
}

fn env(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    let parsed = value.parse();
    Some(parsed.unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

/// Runs one workload; returns the number of cuts.
fn workload(seed: u64) -> u64 {
    let mut rng = SeededRng::new(seed);
    let run = Run::new(seed);
    let mut done = vec![Op::Open];
    let mut op = Some(Op::Open);
    for number in 0..OPS {
        if let Some(op) = op {
            done.push(op.clone());
            if let Err(why) = run.step(&op) {
                panic!(
                    "seed {seed}, operation {number} ({op:?}): {why}\n\
                     after {done:?}\n\
                     to see it again: VELLUM_SEED={seed} cargo nextest run --test store crash::"
                );
            }
        }
        op = next_op(&mut rng, &run, number);
    }
    let store = open_store(&run.disk).unwrap();
    assert_eq!(
        view(&store).unwrap(),
        run.world.lock().before,
        "seed {seed}"
    );
    let cuts = run.world.lock().cuts;
    run.disk.observe(None);
    cuts
}

/// Cuts to be checked by each of the two tests.
fn wanted() -> u64 {
    let all = env("VELLUM_CUTS").unwrap_or(match env("VELLUM_LONG") {
        Some(1..) => 60_000,
        _ => 3_000,
    });
    all.div_ceil(2)
}

fn prove(seeds: std::ops::RangeFrom<u64>) {
    if let Some(seed) = env("VELLUM_SEED") {
        workload(seed);
        return;
    }
    let mut cuts = 0;
    for seed in seeds {
        cuts += workload(seed);
        if cuts >= wanted() {
            println!("{cuts} cuts, the last seed is {seed}");
            return;
        }
    }
}

#[test]
fn a_power_cut_in_any_store_operation_leaves_it_done_or_not_done_and_nothing_that_prune_misses() {
    prove(1..);
}

#[test]
fn a_power_cut_in_other_orders_of_store_operations_leaves_nothing_half_made_either() {
    prove(1_000_000..);
}

#[test]
fn a_layer_that_is_half_removed_by_a_cut_is_collected() {
    let run = Run::new(0);
    run.disk.observe(None);
    run.step(&Op::Import("a".into(), 3)).unwrap();
    let store = open_store(&run.disk).unwrap();
    let layer = store.image("a").unwrap().layers[0];
    for change in 1.. {
        let disk = run.disk.fork();
        disk.arm(change);
        let removed = open_store(&disk).unwrap().remove_image("a");
        for seed in 0..20 {
            let cut = disk.cut(seed);
            let store = open_store(&cut).unwrap();
            let there = store.image("a").is_ok();
            store.prune().unwrap();
            assert_eq!(store.layers().unwrap().contains(&layer), there);
            if there {
                let header = Header::read(&cut, &store.layer_dir(layer)).unwrap();
                assert!(header.sealed);
            }
            assert_eq!(leaks(&cut, &store).unwrap(), Vec::<String>::new());
        }
        if removed.is_ok() {
            break;
        }
    }
}

/// One run of an operation of which a step fails: false where there is no such step.
fn survive_fault(run: &Run, op: &Op, plan: &FaultPlan) -> std::result::Result<bool, String> {
    let before = run.world.lock().before.clone();
    let mut after = before.clone();
    run.predict(op, &mut after);
    let disk = run.disk.fork();
    let faults = FaultStorage::new(Arc::new(disk.clone()));
    faults.fail(plan.clone());
    let done = open_store(&faults).and_then(|store| run.carry_out_on(&store, op));
    let fired = faults.fired() > 0;
    let text = |error: Error| error.to_string();
    for seed in 0..2 {
        // Without a power cut first.
        let left = if seed == 0 {
            disk.fork()
        } else {
            disk.cut(seed)
        };
        let store = open_store(&left).map_err(|error| format!("cannot open: {error}"))?;
        let found = view(&store).map_err(|error| format!("cannot read: {error}"))?;
        check_state(&found, &before, &after)?;
        if done.is_ok() && found != after {
            return Err("reported as done, and is not".into());
        }
        prune(&store).map_err(|error| format!("cannot prune: {error}"))?;
        if view(&store).map_err(text)? != found {
            return Err("prune changed what is seen".into());
        }
        let leaks = leaks(&left, &store).map_err(text)?;
        if !leaks.is_empty() {
            return Err(format!("prune left {leaks:?}"));
        }
        // And it can be done now.
        if found == before && found != after {
            run.carry_out_on(&store, op)
                .map_err(|error| format!("cannot be done again: {error}"))?;
        }
    }
    Ok(fired)
}

/// Every operation, every step of the kinds that count, fails once.
fn prove_faults(kinds: &[OpKind], fault: Fault) {
    let run = Run::new(0);
    run.disk.observe(None);
    let name = String::from;
    let ops = [
        Op::Open,
        Op::Import(name("a"), 1),
        Op::Create(name("c"), name("a")),
        Op::Write(name("c"), 7, 2),
        Op::Commit(name("c"), name("b")),
        Op::Tag(name("b"), name("b2")),
        Op::RemoveImage(name("b")),
        Op::Tag(name("b2"), name("b")),
        Op::Keep(name("c"), name("k")),
        Op::Fork(name("c"), Some(name("k")), name("f")),
        Op::Write(name("c"), 7, 4),
        Op::Fork(name("c"), None, name("g")),
        Op::Keep(name("c"), name("l")),
        Op::ForgetKept(name("c"), name("l")),
        Op::Merge(name("c")),
        Op::Rename(name("c"), name("r")),
        Op::Rename(name("r"), name("c")),
        Op::Rollback(name("c"), name("k")),
        Op::ForgetKept(name("c"), name("k")),
        Op::Prepare(name("s"), None),
        Op::CommitSnapshot(name("s"), 3),
        Op::Prepare(name("t"), Some(name("s"))),
        Op::RemoveSnapshot(name("t")),
        Op::AddVolume(name("v")),
        Op::RemoveVolume(name("v")),
        Op::Create(name("d"), name("b")),
        Op::Quarantine(name("d")),
        Op::Remove(name("c")),
        Op::Remove(name("f")),
        Op::Remove(name("g")),
        Op::RemoveImage(name("a")),
        Op::Prune,
    ];
    for op in &ops {
        let plan = FaultPlan {
            kinds: kinds.to_vec(),
            nth: 1,
            fault,
            lasting: false,
        };
        plan.in_each_operation(|plan| survive_fault(&run, op, plan))
            .unwrap_or_else(|why| panic!("{op:?}, {why}"));
        run.step(op).unwrap();
    }
}

#[test]
fn a_store_operation_of_which_any_step_fails_is_done_or_not_done_and_can_be_done_again() {
    prove_faults(&[], Fault::Errno(libc::EIO));
}

#[test]
fn a_store_operation_without_quota_for_one_step_is_done_or_not_done_and_can_be_done_again() {
    prove_faults(&OpKind::CHANGES, Fault::Errno(libc::EDQUOT));
    prove_faults(
        &[OpKind::Write, OpKind::WriteDurable],
        Fault::Short(libc::ENOSPC),
    );
}

#[test]
fn a_store_operation_with_a_step_that_is_done_and_reported_as_failed_can_be_done_again() {
    prove_faults(&OpKind::CHANGES, Fault::Done(libc::EIO));
}
