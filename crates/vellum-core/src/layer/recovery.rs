//! Opening a layer after it was closed or after a crash. format.md, section 3.3.

use std::collections::BTreeMap;
use std::path::Path;

use super::data::DataFiles;
use super::files::sync_names;
use super::header::Header;
use super::index::Index;
use super::journal::{
    AREA_FILES, AreaRecords, Record, check_record, has_journal, load_area, payload_to_replay,
    read_area, remove_journal,
};
use super::live::{self, Left};
use super::map_file::{LogPlace, MAP_FILE, MapFile, replace_map, sync_map};
use super::space::{Claim, Space};
use super::table::{MapExtent, Table, checkpoint_len, push_extent};
use vellum_base::block::{Block, BlockState, Blocks, Span};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::Storage;

/// How often a layer in use is read that looks damaged, because its files changed meanwhile.
const READ_ATTEMPTS: u32 = 3;

/// A layer's map, and the last generation that its checkpoint contains.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) index: Index,
    pub(super) generation: u64,
    /// Where changes are added to the file `map`; `None`: it must be replaced first.
    pub(super) place: Option<LogPlace>,
}

/// What the checkpoint and the journal of a layer say.
struct Loaded {
    index: Index,
    generation: u64,
    place: Option<LogPlace>,
    records: Vec<Record>,
}

/// Loads the map of a layer and brings its data up to date, whatever happened before. Can be cut
/// off at any point and called again. `in_memory` says that the page cache holds all that was written:
/// see [`super::live::Left`].
pub(super) fn recover(
    storage: &dyn Storage,
    dir: &Path,
    header: &Header,
    data: &DataFiles,
    space: &Space,
    in_memory: bool,
) -> Result<Recovered> {
    let loaded = load(storage, dir, header)?;
    let extents = extents_of(&loaded.index);
    space.map_is(checkpoint_len(extents.len() as u64));
    if loaded.records.is_empty() {
        // A process that died may have written without a sync. What clients read from now on must
        // not go away, and no later flush would know of it. (After a kill the next flush syncs.)
        if !in_memory {
            data.sync()?;
        }
        if has_journal(storage, dir)? {
            // The checkpoint may be, or have its name, only in memory, if its process died right
            // then.
            sync_map(storage, dir)?;
            space.within(Claim::Own, 0, || {
                sync_names(storage, dir)?;
                // Areas may still lie there whose records a checkpoint contains.
                remove_journal(storage, dir)
            })?;
        }
        return Ok(Recovered {
            index: loaded.index,
            generation: loaded.generation,
            place: loaded.place,
        });
    }
    tracing::info!(
        layer = %dir.display(),
        records = loaded.records.len(),
        "recovering a layer that was not closed"
    );
    for (block, bytes) in payload_to_replay(&loaded.records) {
        // What became zero or parent again later needs no space.
        // After a kill the page cache has it, or newer bytes.
        if !in_memory && loaded.index.get(block) == BlockState::Data {
            space.within(Claim::Own, bytes.len() as u64, || {
                data.write(bytes, block.offset())
            })?;
        }
    }
    data.sync().inspect_err(|_| {
        if in_memory {
            // The kernel tells only us.
            live::distrust(storage, dir);
        }
    })?;
    // Whole: what the records say is not durable before the data is, and the file may be torn.
    let place = space.within(Claim::Own, checkpoint_len(extents.len() as u64), || {
        let place = replace_map(storage, dir, header, loaded.generation, &extents)?;
        remove_journal(storage, dir)?;
        Ok(place)
    })?;
    space.top_up();
    Ok(Recovered {
        index: loaded.index,
        generation: loaded.generation,
        place: Some(place),
    })
}

/// What a check wants to know of a layer.
pub(super) struct LoadedForCheck {
    pub(super) index: Index,
    /// Journal records that the checkpoint does not contain.
    pub(super) records: usize,
}

/// The map of a writable layer as recovery would find it. Reads only.
pub(super) fn load_for_check(
    storage: &dyn Storage,
    dir: &Path,
    header: &Header,
) -> Result<LoadedForCheck> {
    let loaded = load(storage, dir, header)?;
    Ok(LoadedForCheck {
        index: loaded.index,
        records: loaded.records.len(),
    })
}

/// A writable layer as recovery would leave it, without having changed anything.
#[derive(Debug)]
pub(super) struct AsRecovered {
    pub(super) index: Index,
    /// Blocks whose bytes are in the journal and not in the data files yet.
    pub(super) blocks: BTreeMap<Block, Box<[u8]>>,
}

/// What [`recover`] and the log of changes would make of a layer. Reads only. The blocks are no more
/// than the journal's two areas hold.
pub(super) fn load_as_recovered(
    storage: &dyn Storage,
    dir: &Path,
    header: &Header,
    left: &Left,
) -> Result<AsRecovered> {
    let mut loaded = load(storage, dir, header)?;
    let mut blocks = BTreeMap::new();
    if let Left::Trusted(changes) = left {
        for change in changes {
            // What is about to be emptied has kept its state.
            if let Some(new) = change.value.state() {
                loaded.index.set(change.span, new);
            }
        }
    } else {
        for (block, bytes) in payload_to_replay(&loaded.records) {
            if loaded.index.get(block) == BlockState::Data {
                blocks.insert(block, bytes.into());
            }
        }
    }
    Ok(AsRecovered {
        index: loaded.index,
        blocks,
    })
}

/// The map of a sealed layer whose seal file is not there yet. Reads only.
pub(super) fn load_map(storage: &dyn Storage, dir: &Path, header: &Header) -> Result<Index> {
    let loaded = load(storage, dir, header)?;
    if payload_to_replay(&loaded.records).next().is_some() {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "{}: the layer is sealed, but its journal holds unwritten blocks",
                dir.display()
            ),
        ));
    }
    Ok(loaded.index)
}

fn load(storage: &dyn Storage, dir: &Path, header: &Header) -> Result<Loaded> {
    let mut index = Index::new();
    let map = MapFile::read(storage, dir, header)?;
    for run in map.table.iter().flat_map(Table::extents) {
        let run = run.context(|| dir.join(MAP_FILE).display().to_string())?;
        index.set(run.span, run.value);
    }
    let areas = load_areas(storage, dir, header, map.generation)?;
    if map.torn && areas.is_empty() {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "{}: the map is damaged: what follows generation {} is unreadable, and the journal \
                 does not hold it either",
                dir.join(MAP_FILE).display(),
                map.generation
            ),
        ));
    }
    let mut generation = map.generation;
    let mut records = Vec::new();
    for area in areas {
        generation = area.generation;
        records.extend(area.records);
    }
    let changes = records.iter().flat_map(|record| &record.body.changes);
    apply(&mut index, map.changes.iter().chain(changes));
    Ok(Loaded {
        index,
        generation,
        place: map.place,
        records,
    })
}

/// Applies changes, the last one first and each block once: a damaged or hostile journal may change
/// terabytes a million times over.
fn apply<'a>(index: &mut Index, changes: impl DoubleEndedIterator<Item = &'a MapExtent>) {
    // Start and end of what later changes have settled; none touches another.
    let mut settled: BTreeMap<Block, Block> = BTreeMap::new();
    for change in changes.rev() {
        let state = change.state();
        let (start, end) = (change.span().start(), change.span().end());
        let (mut from, mut to) = (start, end);
        // Where the part of the change begins that was dealt with, from its end on.
        let mut rest = end;
        while let Some((&first, &last)) = settled.range(..=end).next_back()
            && last >= start
        {
            if last < rest {
                index.set(Span::between(last, rest), state);
            }
            rest = rest.min(first);
            from = from.min(first);
            to = to.max(last);
            settled.remove(&first);
        }
        if start < rest {
            index.set(Span::between(start, rest), state);
        }
        settled.insert(from, to);
    }
}

/// The generations behind checkpoint `covered`, in order.
fn load_areas(
    storage: &dyn Storage,
    dir: &Path,
    header: &Header,
    covered: u64,
) -> Result<Vec<AreaRecords>> {
    let mut areas = Vec::new();
    for name in AREA_FILES {
        let Some(bytes) = load_area(storage, dir, name)? else {
            continue;
        };
        let area = read_area(&bytes, header.uuid, covered)
            .context(|| dir.join(name).display().to_string())?;
        if let Some(area) = area {
            for record in &area.records {
                check_record(record, header.blocks())
                    .context(|| dir.join(name).display().to_string())?;
            }
            areas.push(area);
        }
    }
    areas.sort_by_key(|area| area.generation);
    let mut next = covered;
    let mut before: Option<u64> = None;
    for area in &areas {
        next += 1;
        let stated = area.records_before;
        if area.generation != next || before.is_some_and(|count| count != stated) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{}: the journal is damaged: generation {} with {stated} records before it \
                     follows checkpoint {covered}{}",
                    dir.display(),
                    area.generation,
                    before.map_or(String::new(), |count| format!(" and {count} records")),
                ),
            ));
        }
        before = Some(area.records.len() as u64);
    }
    Ok(areas)
}

/// The extents of a layer's index.
pub(super) fn extents_of(index: &Index) -> Vec<MapExtent> {
    let mut extents = Vec::new();
    for run in index.iter() {
        push_extent(&mut extents, run);
    }
    extents
}

/// Data blocks in the map of a writable layer as it stands on disk. Reads only, so it may be called
/// while the layer is in use, and then answers for some moment of the recent past.
///
/// # Errors
/// As [`super::WritableLayer::open`].
pub fn data_blocks_on_disk(storage: &dyn Storage, dir: &Path) -> Result<Blocks> {
    let mut attempts = 0;
    loop {
        let header = Header::read(storage, dir)?;
        attempts += 1;
        match load(storage, dir, &header) {
            // The map was read, and the journal when it was freed and written anew.
            Err(error) if error.kind() == ErrorKind::Corrupt && attempts < READ_ATTEMPTS => {}
            loaded => return Ok(data_blocks(&loaded?.index)),
        }
    }
}

/// Data blocks of a layer's index.
pub(super) fn data_blocks(index: &Index) -> Blocks {
    tally(index).0
}

/// Data blocks of a layer's index, and its extents.
pub(super) fn tally(index: &Index) -> (Blocks, u64) {
    let none = (Blocks::NONE, 0);
    index.iter().fold(none, |(blocks, extents), run| {
        let data = match run.value {
            BlockState::Data => run.len(),
            BlockState::Parent | BlockState::Zero => Blocks::NONE,
        };
        (blocks + data, extents + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vellum_base::block::Run;

    proptest! {
        #[test]
        fn changes_applied_from_the_last_on_come_to_the_same_as_in_order(
            there in prop::collection::vec((0u64..300, 1u64..60, 0usize..3), 0..10),
            changes in prop::collection::vec((0u64..300, 1u64..60, 0usize..3), 0..40),
        ) {
            let extents = |runs: &[(u64, u64, usize)]| {
                let mut extents = Vec::new();
                for &(start, len, state) in runs {
                    let span = Span::new(Block::new(start), Blocks::new(len));
                    let state = [BlockState::Parent, BlockState::Data, BlockState::Zero][state];
                    push_extent(&mut extents, Run::new(span, state));
                }
                extents
            };
            let mut index = Index::new();
            let set = |index: &mut Index, change: &MapExtent| {
                index.set(change.span(), change.state());
            };
            extents(&there).iter().for_each(|change| set(&mut index, change));
            let mut in_order = index.clone();
            let changes = extents(&changes);
            changes.iter().for_each(|change| set(&mut in_order, change));
            apply(&mut index, changes.iter());
            for block in Span::up_to(Blocks::new(400)).blocks() {
                prop_assert_eq!(index.get(block), in_order.get(block), "block {}", block);
            }
        }
    }
}
