//! What NBD clients may ask of an export's blocks beside where there is data: by names of QEMU's, which
//! backup programs know. docs/operations.md, "What changed, over NBD".

use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::changed::Older;
use super::device::OpenChain;
use vellum_base::block::{Offset, Run};
use vellum_base::error::Result;
use vellum_core::chain::{Chain, Source};
use vellum_export::nbd::MetaContext;
use vellum_store::{ContainerRecord, Store};

/// In which layer a block is found: 0 in none, 1 in the uppermost, and so on downwards.
const DEPTH: &str = "qemu:allocation-depth";
/// Whether a block may differ from what it was at the snapshot of that name: bit 0.
const DIRTY: &str = "qemu:dirty-bitmap:";
const IS_DIRTY: u32 = 1;

/// The contexts of a chain: its depth, and what changed since each snapshot of the container that it is of;
/// `layers` are its sealed ones, from the bottom up.
pub(super) fn contexts(
    store: &Store,
    chain: &Arc<OpenChain>,
    of: Option<(&ContainerRecord, &[Uuid])>,
) -> Vec<Arc<dyn MetaContext>> {
    let mut contexts: Vec<Arc<dyn MetaContext>> = vec![Arc::new(Depth(chain.clone()))];
    let Some((container, layers)) = of else {
        return contexts;
    };
    for snapshot in &container.snapshots {
        contexts.push(Arc::new(Dirty {
            name: format!("{DIRTY}{}", snapshot.name),
            store: store.clone(),
            container: container.clone(),
            snapshot: snapshot.id,
            chain: chain.clone(),
            layers: layers.to_vec(),
            older: Mutex::new(None),
        }));
    }
    contexts
}

/// The sources of the blocks of a range, in at most `max` runs.
fn sources(chain: &Chain, offset: u64, len: u64, max: usize) -> Vec<Run<Source>> {
    let mut runs = chain.sources(Offset::new(offset).block(), max);
    let end = offset + len;
    runs.retain(|run| run.start().offset().get() < end);
    runs
}

/// Runs of whole blocks as bytes from `offset`, which lies in the first of them.
fn from_offset<T>(offset: u64, runs: &[Run<T>], status: impl Fn(&T) -> u32) -> Vec<(u64, u32)> {
    let mut at = offset;
    let mut statuses = Vec::with_capacity(runs.len());
    for run in runs {
        let end = run.end().offset().get();
        statuses.push((end - at, status(&run.value)));
        at = end;
    }
    statuses
}

struct Depth(Arc<OpenChain>);

impl MetaContext for Depth {
    fn name(&self) -> &str {
        DEPTH
    }

    fn statuses(&self, offset: u64, len: u64, max: usize) -> Result<Vec<(u64, u32)>> {
        let chain = self.0.chain();
        let sealed = chain.base().depth() as u32;
        let top = u32::from(chain.top().is_some());
        let depth = |source: &Source| match *source {
            Source::Hole => 0,
            // Whose zeros they are the chain does not keep: none has to be looked for below.
            Source::Top | Source::Zero => 1,
            Source::Sealed(number) => top + sealed - number,
        };
        Ok(from_offset(
            offset,
            &sources(chain, offset, len, max),
            depth,
        ))
    }
}

struct Dirty {
    name: String,
    store: Store,
    container: ContainerRecord,
    snapshot: Uuid,
    chain: Arc<OpenChain>,
    layers: Vec<Uuid>,
    /// Opened by the first who asks, and kept from being collected from then on.
    older: Mutex<Option<(Arc<Older>, OpenChain)>>,
}

impl Dirty {
    fn older(&self) -> Result<Arc<Older>> {
        let mut older = self.older.lock();
        if let Some((there, _)) = &*older {
            return Ok(there.clone());
        }
        let layers = self.container.snapshot_layers(self.snapshot)?;
        let (there, open) = Older::open(&self.store, &layers)
            .map_err(|error| error.context(format!("the snapshot of {}", self.name)))?;
        let there = Arc::new(there);
        *older = Some((there.clone(), open));
        Ok(there)
    }
}

impl MetaContext for Dirty {
    fn name(&self) -> &str {
        &self.name
    }

    fn statuses(&self, offset: u64, len: u64, max: usize) -> Result<Vec<(u64, u32)>> {
        let older = self.older()?;
        let newer = sources(self.chain.chain(), offset, len, max);
        let end = newer.last().map_or(offset, |run| run.end().offset().get());
        let mut statuses = Vec::new();
        let mut at = offset;
        for run in older.changed_at(&newer, &self.layers) {
            let start = run.start().offset().get().max(offset);
            if at < start {
                statuses.push((start - at, 0));
            }
            at = run.end().offset().get();
            statuses.push((at - start, IS_DIRTY));
        }
        if at < end {
            statuses.push((end - at, 0));
        }
        statuses.truncate(max);
        Ok(statuses)
    }
}
