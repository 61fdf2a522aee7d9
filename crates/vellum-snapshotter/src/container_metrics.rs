//! What copy-on-write costs each container that is served, for Prometheus.

use std::collections::HashMap;
use std::fmt::Write;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
    NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use uuid::Uuid;

use vellum_base::block::BLOCK_SIZE;
use vellum_base::error::Result;
use vellum_core::chain::LatencySnapshot;
use vellum_engine::stats::{Kind, Served, served_counters};
use vellum_store::{SnapshotRecord, Store};

/// Containers that are told apart: each has some 80 series.
pub(super) const MOST: usize = 250;

/// Upper bounds of latencies in nanoseconds, from 10 microseconds to 10 seconds.
const BOUNDS: [u64; 15] = [
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    100_000_000,
    500_000_000,
    2_500_000_000,
    10_000_000_000,
];

/// A name as a label's value: any text, which the library does not escape.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key(String);

impl EncodeLabelValue for Key {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        for letter in self.0.chars() {
            match letter {
                '\\' => encoder.write_str("\\\\")?,
                '"' => encoder.write_str("\\\"")?,
                '\n' => encoder.write_str("\\n")?,
                other => encoder.write_char(other)?,
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    kind: &'static str,
    key: Key,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfTouch {
    #[prometheus(flatten)]
    of: Of,
    touch: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfSource {
    #[prometheus(flatten)]
    of: Of,
    source: &'static str,
}

/// The containers as they were at the last [`Containers::look`]. One that is gone by then has no
/// series any more.
#[derive(Debug, Default)]
pub(super) struct Containers {
    seen: Mutex<(Vec<Served>, usize)>,
}

impl Containers {
    /// Asks the servers of a store, whose snapshots are these. Returns the blocks that each of them
    /// has in its writable layer.
    ///
    /// # Errors
    /// Where the records cannot be listed.
    pub(super) fn look(
        &self,
        store: &Store,
        snapshots: &[SnapshotRecord],
    ) -> Result<HashMap<Uuid, u64>> {
        let now = served_counters(store, snapshots, MOST)?;
        let top_blocks = now.0.iter().map(|of| (of.id, of.counters.top_blocks));
        let top_blocks = top_blocks.collect();
        *self.seen.lock() = now;
        Ok(top_blocks)
    }
}

fn of(container: &Served) -> Of {
    Of {
        kind: match container.kind {
            Kind::Container => "container",
            Kind::Snapshot => "snapshot",
        },
        key: Key(container.name.clone()),
    }
}

/// (name, help, unit, value) of a number.
type Number = (&'static str, &'static str, Option<Unit>, fn(&Served) -> u64);

const COUNTERS: [Number; 11] = [
    ("container_reads", "Read requests", None, |c| {
        c.counters.chain.reads
    }),
    (
        "container_read",
        "Bytes that clients read",
        Some(Unit::Bytes),
        |c| c.counters.chain.read_bytes,
    ),
    (
        "container_written",
        "Bytes that clients wrote",
        Some(Unit::Bytes),
        |c| c.counters.chain.written_bytes,
    ),
    (
        "container_stored",
        "Bytes written to data files, copies from layers below included",
        Some(Unit::Bytes),
        |c| c.counters.chain.stored_bytes,
    ),
    (
        "container_journal",
        "Bytes written to the journal of the writable layer",
        Some(Unit::Bytes),
        |c| c.counters.layer.journal_bytes,
    ),
    (
        "container_copied_up",
        "Bytes that first writes to a part of a block copied from layers below",
        Some(Unit::Bytes),
        |c| c.counters.chain.copied_bytes,
    ),
    (
        "container_discarded",
        "Bytes that clients discarded or zeroed",
        Some(Unit::Bytes),
        |c| c.counters.chain.discarded_bytes,
    ),
    (
        "container_partial_copy_ups",
        "Blocks that were written in part and filled up from layers below",
        None,
        |c| c.counters.chain.partial_copy_ups,
    ),
    (
        "container_first_touch_blocks",
        "Blocks of 4096 bytes that writes allocated",
        None,
        |c| c.counters.chain.first_touch_blocks,
    ),
    (
        "container_prewarmed_blocks",
        "Blocks of 4096 bytes that were copied up ahead of traffic",
        None,
        |c| c.counters.chain.prewarmed_blocks,
    ),
    (
        "container_syncs",
        "Syncs of data files and of journals, and synchronous journal writes",
        None,
        |c| c.counters.layer.synchronous_operations(),
    ),
];

const GAUGES: [Number; 2] = [
    (
        "container_data",
        "Data in the writable layer",
        Some(Unit::Bytes),
        |c| c.counters.top_blocks * BLOCK_SIZE,
    ),
    (
        "container_size",
        "Size of the device",
        Some(Unit::Bytes),
        |c| c.counters.virtual_size,
    ),
];

impl Collector for Containers {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let seen = self.seen.lock();
        let (containers, more) = &*seen;
        let left_out = ConstGauge::new(i64::try_from(*more).unwrap_or(i64::MAX));
        left_out.encode(encoder.encode_descriptor(
            "containers_left_out",
            "Containers that are served and have no series of their own here",
            None,
            MetricType::Gauge,
        )?)?;
        if containers.is_empty() {
            return Ok(());
        }
        for (name, help, unit, value) in COUNTERS {
            let mut metric =
                encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for container in containers {
                let counter = ConstCounter::new(value(container));
                counter.encode(metric.encode_family(&of(container))?)?;
            }
        }
        for (name, help, unit, value) in GAUGES {
            let mut metric =
                encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            for container in containers {
                let gauge = ConstGauge::new(value(container));
                gauge.encode(metric.encode_family(&of(container))?)?;
            }
        }
        read_sources(&mut encoder, containers)?;
        latencies(&mut encoder, containers)
    }
}

/// Layers are not told apart here: there may be very many. `vellum stats` does.
fn read_sources(encoder: &mut DescriptorEncoder<'_>, containers: &[Served]) -> std::fmt::Result {
    let mut metric = encoder.encode_descriptor(
        "container_read_blocks",
        "Blocks of 4096 bytes that reads got from the writable layer, from layers below, and from \
         no layer",
        None,
        MetricType::Counter,
    )?;
    for container in containers {
        let chain = &container.counters.chain;
        let below = chain.layer_read_blocks.iter().sum::<u64>() + chain.deeper_read_blocks;
        for (source, blocks) in [
            ("top", chain.top_read_blocks),
            ("below", below),
            ("zero", chain.zero_read_blocks),
        ] {
            let labels = OfSource {
                of: of(container),
                source,
            };
            ConstCounter::new(blocks).encode(metric.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn latencies(encoder: &mut DescriptorEncoder<'_>, containers: &[Served]) -> std::fmt::Result {
    let mut metric = encoder.encode_descriptor(
        "container_writes",
        "Write requests that allocated a block (touch=first) and those that did not (steady)",
        None,
        MetricType::Counter,
    )?;
    for container in containers {
        let chain = &container.counters.chain;
        for (touch, writes) in [
            ("first", chain.first_touch_writes),
            ("steady", chain.steady_writes),
        ] {
            let labels = OfTouch {
                of: of(container),
                touch,
            };
            ConstCounter::new(writes).encode(metric.encode_family(&labels)?)?;
        }
    }
    let mut metric = encoder.encode_descriptor(
        "container_write_duration",
        "Time of some of those writes, drawn at random",
        Some(&Unit::Seconds),
        MetricType::Histogram,
    )?;
    for container in containers {
        let chain = &container.counters.chain;
        for (touch, latency) in [("first", &chain.first_touch), ("steady", &chain.steady)] {
            let labels = OfTouch {
                of: of(container),
                touch,
            };
            let (sum, buckets) = buckets(latency);
            metric
                .encode_family(&labels)?
                .encode_histogram::<NoLabelSet>(sum, latency.count, &buckets, None)?;
        }
    }
    let mut metric = encoder.encode_descriptor(
        "container_flush_duration",
        "Time of flush requests",
        Some(&Unit::Seconds),
        MetricType::Histogram,
    )?;
    for container in containers {
        let latency = &container.counters.chain.flush;
        let (sum, buckets) = buckets(latency);
        metric
            .encode_family(&of(container))?
            .encode_histogram::<NoLabelSet>(sum, latency.count, &buckets, None)?;
    }
    Ok(())
}

/// The sum in seconds, and how many lie in each bucket: up to [`BOUNDS`], then the rest.
fn buckets(latency: &LatencySnapshot) -> (f64, Vec<(f64, u64)>) {
    let seconds = |nanos: u64| nanos as f64 / 1e9;
    let mut before = 0;
    let mut buckets: Vec<(f64, u64)> = BOUNDS
        .iter()
        .map(|&bound| {
            let up_to = latency.count_up_to(bound);
            let within = up_to - before;
            before = up_to;
            (seconds(bound), within)
        })
        .collect();
    buckets.push((f64::MAX, latency.count.saturating_sub(before)));
    (seconds(latency.sum_ns), buckets)
}
