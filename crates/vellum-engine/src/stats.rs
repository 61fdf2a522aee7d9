//! The cost of copy-on-write as numbers: the counters of whoever serves a container, without
//! disturbing it, and what the layer files say.
//!
//! [`stats`] is what `vellum stats` prints, [`served`] the same of all
//! that is served.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::device::{DeviceStats, STATS};
use super::mount_point::mounted;
pub use super::sockets::Server;
use super::sockets::Sockets;
use super::wire::decode;
use crate::lazy::traffic;
use vellum_base::block::{BLOCK_SIZE, Blocks};
use vellum_base::error::{ErrorKind, Result};
use vellum_base::moment::rfc3339_of_seconds;
use vellum_core::chain::{LatencySnapshot, Sample};
use vellum_core::layer::{SpaceStatus, data_blocks_on_disk};
use vellum_export::device::control;
use vellum_fs::run_dir::RunDir;
use vellum_registry::Traffic;
use vellum_store::{ContainerRecord, SnapshotKind, SnapshotRecord, Store};

/// Version of [`Stats`] as JSON: fields may be added, others only change with this number.
pub const STATS_SCHEMA: u32 = 1;

/// How long a server may take to answer. One that is being restarted takes milliseconds.
const ASK_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a list waits for one of its servers: it may just be replaced.
const LOOK_TIMEOUT: Duration = Duration::from_millis(500);

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A container of this store.
    Container,
    /// A snapshot of containerd's.
    Snapshot,
}

/// What copy-on-write cost a container, and its layers.
#[derive(Debug, Clone, Serialize)]
pub struct Stats {
    /// [`STATS_SCHEMA`].
    pub schema: u32,
    /// The container's name, or the snapshot's key.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its id.
    pub id: Uuid,
    /// The name of its image; `None` for snapshots.
    pub image: Option<String>,
    /// Size of its device in bytes.
    pub virtual_size: u64,
    /// Who serves it; `None` for nobody.
    pub server: Option<Server>,
    /// Where it is mounted.
    pub mounted: Option<PathBuf>,
    /// What its server counted; `None` while nobody serves it.
    pub counters: Option<Counters>,
    /// What the store's fetcher has asked registries for since it began, for whatever container; `None` where there is none.
    pub fetcher: Option<Traffic>,
    /// Its layers from the bottom up.
    pub layers: Vec<LayerUse>,
}

/// A layer of a container.
#[derive(Debug, Clone, Serialize)]
pub struct LayerUse {
    /// 0 is the bottom.
    pub number: usize,
    /// Its name in the store.
    pub uuid: Uuid,
    /// True for the writable one.
    pub top: bool,
    /// Where it came from.
    pub origin: String,
    /// Blocks of data that it holds, of 4096 bytes; `None` where that cannot be read.
    pub blocks: Option<u64>,
    /// Blocks that reads got from it since counting began; `None` while nobody serves it.
    pub read_blocks: Option<u64>,
}

/// What a server counted since it was started, restarts of its worker included.
#[derive(Debug, Clone, Serialize)]
pub struct Counters {
    /// When counting began.
    pub since: String,
    /// Read requests.
    pub reads: ReadCounters,
    /// Write requests.
    pub writes: WriteCounters,
    /// What copy-on-write added to them.
    pub copy_up: CopyUpCounters,
    /// What went to the store's disk for what clients wrote.
    pub amplification: Amplification,
    /// Flush requests.
    pub flushes: FlushCounters,
    /// Blocks of the writable layer.
    pub blocks: BlockCounters,
    /// Space on the host.
    pub space: Space,
}

/// How a container stands with the space of the store's disk.
#[derive(Debug, Clone, Serialize)]
pub struct Space {
    /// Bytes that its writable layer keeps back there.
    pub reserved_bytes: u64,
    /// Since when that disk has had no room for its writes (RFC 3339); `None` while it has.
    pub full_since: Option<String>,
}

impl Space {
    pub(super) fn new(status: SpaceStatus) -> Self {
        Space {
            reserved_bytes: status.reserved_bytes,
            full_since: status.full_since.map(rfc3339_of_seconds),
        }
    }
}

/// Read requests.
#[derive(Debug, Clone, Serialize)]
pub struct ReadCounters {
    /// Requests.
    pub requests: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Blocks that no layer holds data for: zeros without any I/O.
    pub zero_blocks: u64,
    /// Blocks from sealed layers so far up that they are not told apart (from the 1025th on).
    pub deeper_blocks: u64,
}

/// Write requests.
#[derive(Debug, Clone, Serialize)]
pub struct WriteCounters {
    /// Requests that were carried out.
    pub requests: u64,
    /// Bytes that clients wrote.
    pub bytes: u64,
    /// Bytes that clients discarded or zeroed.
    pub discarded_bytes: u64,
    /// Writes that allocated a block in the writable layer.
    pub first_touch: Latency,
    /// Writes whose blocks were all there.
    pub steady: Latency,
}

/// What copy-on-write added to writes.
#[derive(Debug, Clone, Serialize)]
pub struct CopyUpCounters {
    /// Blocks that writes allocated.
    pub first_touch_blocks: u64,
    /// Of those, blocks that were written in part and filled up from a layer below.
    pub partial: u64,
    /// Bytes that they were filled up with.
    pub copied_bytes: u64,
    /// Those for each byte that clients wrote.
    pub copied_per_written: f64,
    /// Blocks that `vellum prewarm` allocated.
    pub prewarmed_blocks: u64,
}

/// What went to the store's disk for what clients wrote.
#[derive(Debug, Clone, Serialize)]
pub struct Amplification {
    /// Bytes that clients wrote.
    pub written_bytes: u64,
    /// Bytes written to data files.
    pub stored_bytes: u64,
    /// Bytes written to journals: map changes, and small writes as a whole.
    pub journal_bytes: u64,
    /// Bytes of checkpoints of the map.
    pub checkpoint_bytes: u64,
    /// All of these for each byte that clients wrote; 0 before the first. What prewarming stored
    /// is left out.
    pub factor: f64,
}

/// Flush requests.
#[derive(Debug, Clone, Serialize)]
pub struct FlushCounters {
    /// How many came, and how long they took.
    pub latency: Latency,
    /// Flushes of the writable layer: those requests, and the layer's own.
    pub count: u64,
    /// Of those, flushes that another's work covered.
    pub coalesced: u64,
    /// Of those, flushes that had nothing to do.
    pub empty: u64,
    /// fdatasync calls on data files.
    pub data_syncs: u64,
    /// Journal records written.
    pub journal_writes: u64,
    /// Of those, records written ahead of a flush: not synchronous.
    pub records_ahead: u64,
    /// fdatasync calls on the journal, for records written ahead.
    pub journal_syncs: u64,
    /// Syncs and synchronous journal writes for each flush.
    pub syncs_per_flush: f64,
    /// Checkpoints of the map.
    pub checkpoints: u64,
    /// Flushes that waited for room in the journal.
    pub journal_waits: u64,
}

/// Blocks of the writable layer.
#[derive(Debug, Clone, Serialize)]
pub struct BlockCounters {
    /// Blocks that it holds now.
    pub held: u64,
    /// Blocks allocated since counting began, freed ones included.
    pub allocated: u64,
    /// That number over time, oldest first: by minutes for the last day, by seconds for the last
    /// two minutes. Times in which it did not change are left out.
    pub over_time: Vec<Sample>,
}

/// How long requests took, in microseconds; 0 where none was timed.
#[derive(Debug, Clone, Serialize)]
pub struct Latency {
    /// Requests, all of them.
    pub count: u64,
    /// Of those, requests that were timed: about one write in [`vellum_core::chain::SAMPLE_EVERY`], drawn
    /// at random, and every flush. The times below are theirs.
    pub timed: u64,
    /// Mean.
    pub mean_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 90 of 100 were no slower.
    pub p90_us: f64,
    /// 99 of 100 were no slower.
    pub p99_us: f64,
    /// 999 of 1000 were no slower.
    pub p999_us: f64,
    /// The slowest of those that were timed.
    pub max_us: f64,
    /// The histogram in nanoseconds: what a metrics endpoint makes its own buckets of.
    pub histogram: LatencySnapshot,
}

impl Latency {
    fn new(count: u64, histogram: LatencySnapshot) -> Result<Self> {
        let all = histogram.histogram()?;
        let micros = |nanos: u64| nanos as f64 / 1000.0;
        let at = |quantile: f64| micros(all.value_at_quantile(quantile).min(histogram.max_ns));
        Ok(Latency {
            count,
            timed: histogram.count,
            mean_us: ratio(histogram.sum_ns, histogram.count) / 1000.0,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: micros(histogram.max_ns),
            histogram,
        })
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

impl Counters {
    /// Another process counted these: its numbers are any, and one that is too large is shown as the
    /// largest.
    fn new(device: DeviceStats) -> Result<Self> {
        let DeviceStats { chain, layer, .. } = device;
        let prewarmed = chain.prewarmed_blocks.saturating_mul(BLOCK_SIZE);
        let for_clients = chain.stored_bytes.saturating_sub(prewarmed);
        let journal = layer.journal_bytes.saturating_add(layer.checkpoint_bytes);
        let to_disk = for_clients.saturating_add(journal);
        Ok(Counters {
            since: rfc3339_of_seconds(chain.since),
            reads: ReadCounters {
                requests: chain.reads,
                bytes: chain.read_bytes,
                zero_blocks: chain.zero_read_blocks,
                deeper_blocks: chain.deeper_read_blocks,
            },
            writes: WriteCounters {
                requests: chain.writes,
                bytes: chain.written_bytes,
                discarded_bytes: chain.discarded_bytes,
                first_touch: Latency::new(chain.first_touch_writes, chain.first_touch)?,
                steady: Latency::new(chain.steady_writes, chain.steady)?,
            },
            copy_up: CopyUpCounters {
                first_touch_blocks: chain.first_touch_blocks,
                partial: chain.partial_copy_ups,
                copied_bytes: chain.copied_bytes,
                copied_per_written: ratio(chain.copied_bytes, chain.written_bytes),
                prewarmed_blocks: chain.prewarmed_blocks,
            },
            amplification: Amplification {
                written_bytes: chain.written_bytes,
                stored_bytes: chain.stored_bytes,
                journal_bytes: layer.journal_bytes,
                checkpoint_bytes: layer.checkpoint_bytes,
                factor: ratio(to_disk, chain.written_bytes),
            },
            flushes: FlushCounters {
                latency: Latency::new(chain.flush.count, chain.flush)?,
                count: layer.flushes,
                coalesced: layer.flushes_coalesced,
                empty: layer.flushes_empty,
                data_syncs: layer.data_syncs,
                journal_writes: layer.journal_writes,
                records_ahead: layer.records_ahead,
                journal_syncs: layer.journal_syncs,
                syncs_per_flush: ratio(layer.synchronous_operations(), layer.flushes),
                checkpoints: layer.checkpoints,
                journal_waits: layer.journal_waits,
            },
            blocks: BlockCounters {
                held: device.top_blocks,
                allocated: (chain.first_touch_blocks).saturating_add(chain.prewarmed_blocks),
                over_time: chain.allocated,
            },
            space: Space::new(device.space),
        })
    }
}

/// The raw counters of the device that is served from `run_dir`.
///
/// # Errors
/// [`ErrorKind::NotFound`] while none is.
pub fn device_stats(run_dir: &RunDir) -> Result<DeviceStats> {
    decode(control::call_again(
        run_dir,
        STATS,
        Value::Null,
        ASK_TIMEOUT,
    )?)
}

/// The raw counters of whoever serves `id`; `None` for nobody.
fn ask(store: &Store, id: Uuid, timeout: Duration) -> Result<Option<(Server, DeviceStats)>> {
    match Sockets::new(store, id).ask(STATS, &Value::Null, timeout) {
        Ok((server, answer)) => Ok(Some((server, decode(answer)?))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// How `id` stands with the space of the store's disk; `None` where nobody serves it.
pub(super) fn space(store: &Store, id: Uuid) -> Option<Space> {
    let (_, stats) = ask(store, id, LOOK_TIMEOUT).ok()??;
    Some(Space::new(stats.space))
}

/// What copy-on-write cost a container. One that nobody serves has its layers alone.
///
/// # Errors
/// [`ErrorKind::NotFound`] for the name; [`ErrorKind::Timeout`] where its server hangs.
pub fn stats(store: &Store, name: &str) -> Result<Stats> {
    of_container(store, &store.container(name)?)
}

fn of_container(store: &Store, record: &ContainerRecord) -> Result<Stats> {
    let answer = ask(store, record.id, ASK_TIMEOUT)?;
    let resolved = store.resolve(record)?;
    let mut stats = assemble(store, record.id, answer, &resolved.sealed, resolved.top)?;
    stats.name.clone_from(&record.name);
    stats.image = Some(record.image.clone());
    stats.virtual_size = record.disk.virtual_size;
    stats.mounted = mounted(store, record)?.map(|mounted| mounted.dir);
    Ok(stats)
}

fn assemble(
    store: &Store,
    id: Uuid,
    answer: Option<(Server, DeviceStats)>,
    sealed: &[Uuid],
    top: Uuid,
) -> Result<Stats> {
    let (server, device) = answer.unzip();
    let mut layers: Vec<LayerUse> = sealed
        .iter()
        .enumerate()
        .map(|(number, layer)| {
            let info = store.layer_info(*layer).ok();
            let reads = device
                .as_ref()
                .map(|device| &device.chain.layer_read_blocks);
            LayerUse {
                number,
                uuid: *layer,
                top: false,
                origin: info.as_ref().map_or(String::new(), |i| i.origin.clone()),
                blocks: info.map(|info| info.bytes / BLOCK_SIZE),
                read_blocks: reads.map(|reads| reads.get(number).copied().unwrap_or_default()),
            }
        })
        .collect();
    let held = match &device {
        Some(device) => Some(device.top_blocks),
        None => data_blocks_on_disk(&**store.storage(), &store.layer_dir(top))
            .ok()
            .map(Blocks::get),
    };
    layers.push(LayerUse {
        number: layers.len(),
        uuid: top,
        top: true,
        origin: "writable layer".into(),
        blocks: held,
        read_blocks: device.as_ref().map(|device| device.chain.top_read_blocks),
    });
    Ok(Stats {
        schema: STATS_SCHEMA,
        name: String::new(),
        kind: Kind::Container,
        id,
        image: None,
        virtual_size: device.as_ref().map_or(0, |device| device.virtual_size),
        server,
        mounted: None,
        counters: device.map(Counters::new).transpose()?,
        fetcher: fetcher(store),
        layers,
    })
}

/// What the fetcher counts, if there is one.
fn fetcher(store: &Store) -> Option<Traffic> {
    let asked = traffic(&store.runs());
    asked.unwrap_or_else(|error| {
        tracing::warn!("what registries were asked for is not known: {error}");
        None
    })
}

/// The counters of every container and every active snapshot of containerd's that is served now,
/// sorted by name. One whose server does not answer is left out with a warning.
///
/// # Errors
/// Where the records cannot be listed.
pub fn served(store: &Store) -> Result<Vec<Stats>> {
    let mut all = Vec::new();
    let mut note = |name: &str, stats: Result<Stats>| match stats {
        Ok(stats) if stats.server.is_some() => all.push(stats),
        Ok(_) => {}
        Err(error) => tracing::warn!(%name, %error, "no counters"),
    };
    for record in store.containers()? {
        note(&record.name, of_container(store, &record));
    }
    for record in store.snapshots(Store::warn_damaged)? {
        if record.kind != SnapshotKind::Active {
            continue;
        }
        let Some(top) = record.layers.last().copied() else {
            continue;
        };
        let stats = ask(store, record.id, ASK_TIMEOUT).and_then(|answer| {
            let mut sealed = store.ancestry(Some(record.base))?;
            sealed.extend(record.layers.iter().take(record.layers.len() - 1));
            let mut stats = assemble(store, record.id, answer, &sealed, top)?;
            stats.kind = Kind::Snapshot;
            stats.name.clone_from(&record.key);
            stats.virtual_size = record.virtual_size;
            Ok(stats)
        });
        note(&record.key, stats);
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

/// A container, or an active snapshot of containerd's, that is served, and its raw counters.
#[derive(Debug, Clone)]
pub struct Served {
    /// What it is.
    pub kind: Kind,
    /// The container's name, or the snapshot's key.
    pub name: String,
    /// Its id.
    pub id: Uuid,
    /// What its server counted.
    pub counters: DeviceStats,
}

/// The counters of the containers, and of the active ones of `snapshots`, that are served now, the
/// first `most` of them by name, and how many more there are. One whose server does not answer is
/// left out with a warning.
///
/// # Errors
/// Where the records cannot be listed.
pub fn served_counters(
    store: &Store,
    snapshots: &[SnapshotRecord],
    most: usize,
) -> Result<(Vec<Served>, usize)> {
    let containers = store.containers()?.into_iter();
    let mut all: Vec<(String, Kind, Uuid)> = containers
        .map(|record| (record.name, Kind::Container, record.id))
        .collect();
    all.extend(
        snapshots
            .iter()
            .filter(|record| record.kind == SnapshotKind::Active)
            .map(|record| (record.key.clone(), Kind::Snapshot, record.id)),
    );
    all.sort();
    let mut found = Vec::new();
    let mut more = 0;
    for (name, kind, id) in all {
        if found.len() >= most {
            more += usize::from(store.runs().dir(id).exists());
            continue;
        }
        match ask(store, id, ASK_TIMEOUT) {
            Ok(Some((_, counters))) => found.push(Served {
                kind,
                name,
                id,
                counters,
            }),
            Ok(None) => {}
            Err(error) => tracing::warn!(%name, %error, "no counters"),
        }
    }
    Ok((found, more))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value with every number in it as large as there are.
    fn at_most(value: Value) -> Value {
        match value {
            Value::Number(_) => u64::MAX.into(),
            Value::Array(list) => list.into_iter().map(at_most).collect(),
            Value::Object(fields) => fields.into_iter().map(|(k, v)| (k, at_most(v))).collect(),
            other => other,
        }
    }

    #[test]
    fn a_server_that_sends_numbers_which_nobody_counts_to_is_shown_all_the_same() {
        let mut stats = DeviceStats::default();
        stats.chain.layer_read_blocks = vec![1, 1];
        stats.chain.steady.buckets = vec![(1, 1), (2, 1)];
        stats.space.full_since = Some(1);
        let sent = at_most(serde_json::to_value(stats).unwrap());
        let counters = Counters::new(decode(sent).unwrap()).unwrap();
        assert_eq!(counters.blocks.allocated, u64::MAX);
        assert!(counters.since.contains("seconds"), "{}", counters.since);
        assert_eq!(counters.space.full_since, Some(counters.since));
    }
}
