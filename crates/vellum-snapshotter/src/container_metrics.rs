//! What copy-on-write costs each container that is served, for Prometheus.

use std::collections::HashMap;
use std::fmt::Write;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
    MetricEncoder, NoLabelSet,
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

/// What Prometheus is told of a metric.
struct Metric {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    kind: MetricType,
}

impl Metric {
    const fn new(
        name: &'static str,
        help: &'static str,
        unit: Option<Unit>,
        kind: MetricType,
    ) -> Self {
        Metric {
            name,
            help,
            unit,
            kind,
        }
    }

    /// Every container has the series in it that `series` writes.
    fn encode(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        containers: &[Served],
        series: impl Fn(&mut MetricEncoder<'_>, &Served) -> std::fmt::Result,
    ) -> std::fmt::Result {
        let mut metric =
            encoder.encode_descriptor(self.name, self.help, self.unit.as_ref(), self.kind)?;
        containers
            .iter()
            .try_for_each(|container| series(&mut metric, container))
    }
}

/// A metric of which each container has one number.
struct Number {
    metric: Metric,
    value: Value,
}

type Value = fn(&Served) -> u64;

const fn count(name: &'static str, help: &'static str, value: Value) -> Number {
    let metric = Metric::new(name, help, None, MetricType::Counter);
    Number { metric, value }
}

const fn bytes(name: &'static str, help: &'static str, value: Value) -> Number {
    let metric = Metric::new(name, help, Some(Unit::Bytes), MetricType::Counter);
    Number { metric, value }
}

/// Bytes that may become fewer.
const fn level(name: &'static str, help: &'static str, value: Value) -> Number {
    let metric = Metric::new(name, help, Some(Unit::Bytes), MetricType::Gauge);
    Number { metric, value }
}

static NUMBERS: [Number; 13] = [
    count("container_reads", "Read requests", |c| {
        c.counters.chain.reads
    }),
    bytes("container_read", "Bytes that clients read", |c| {
        c.counters.chain.read_bytes
    }),
    bytes("container_written", "Bytes that clients wrote", |c| {
        c.counters.chain.written_bytes
    }),
    bytes(
        "container_stored",
        "Bytes written to data files, copies from layers below included",
        |c| c.counters.chain.stored_bytes,
    ),
    bytes(
        "container_journal",
        "Bytes written to the journal of the writable layer",
        |c| c.counters.layer.journal_bytes,
    ),
    bytes(
        "container_copied_up",
        "Bytes that first writes to a part of a block copied from layers below",
        |c| c.counters.chain.copied_bytes,
    ),
    bytes(
        "container_discarded",
        "Bytes that clients discarded or zeroed",
        |c| c.counters.chain.discarded_bytes,
    ),
    count(
        "container_partial_copy_ups",
        "Blocks that were written in part and filled up from layers below",
        |c| c.counters.chain.partial_copy_ups,
    ),
    count(
        "container_first_touch_blocks",
        "Blocks of 4096 bytes that writes allocated",
        |c| c.counters.chain.first_touch_blocks,
    ),
    count(
        "container_prewarmed_blocks",
        "Blocks of 4096 bytes that were copied up ahead of traffic",
        |c| c.counters.chain.prewarmed_blocks,
    ),
    count(
        "container_syncs",
        "Syncs of data files and of journals, and synchronous journal writes",
        |c| c.counters.layer.synchronous_operations(),
    ),
    level("container_data", "Data in the writable layer", |c| {
        c.counters.top_blocks.saturating_mul(BLOCK_SIZE)
    }),
    level("container_size", "Size of the device", |c| {
        c.counters.virtual_size
    }),
];

/// Layers are not told apart here: there may be very many. `vellum stats` does.
const READ_BLOCKS: Metric = Metric::new(
    "container_read_blocks",
    "Blocks of 4096 bytes that reads got from the writable layer, from layers below, and from no layer",
    None,
    MetricType::Counter,
);
const WRITES: Metric = Metric::new(
    "container_writes",
    "Write requests that allocated a block (touch=first) and those that did not (steady)",
    None,
    MetricType::Counter,
);
const WRITE_DURATION: Metric = Metric::new(
    "container_write_duration",
    "Time of some of those writes, drawn at random",
    Some(Unit::Seconds),
    MetricType::Histogram,
);
const FLUSH_DURATION: Metric = Metric::new(
    "container_flush_duration",
    "Time of flush requests",
    Some(Unit::Seconds),
    MetricType::Histogram,
);

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
        for Number { metric, value } in &NUMBERS {
            metric.encode(&mut encoder, containers, |family, container| {
                let labels = of(container);
                let series = family.encode_family(&labels)?;
                match metric.kind {
                    MetricType::Gauge => ConstGauge::new(value(container)).encode(series),
                    _ => ConstCounter::new(value(container)).encode(series),
                }
            })?;
        }
        read_sources(&mut encoder, containers)?;
        latencies(&mut encoder, containers)
    }
}

fn read_sources(encoder: &mut DescriptorEncoder<'_>, containers: &[Served]) -> std::fmt::Result {
    READ_BLOCKS.encode(encoder, containers, |metric, container| {
        let chain = &container.counters.chain;
        let below = chain.layer_read_blocks.iter();
        let below = below.fold(chain.deeper_read_blocks, |sum, of| sum.saturating_add(*of));
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
        Ok(())
    })
}

fn latencies(encoder: &mut DescriptorEncoder<'_>, containers: &[Served]) -> std::fmt::Result {
    let touch = |container: &Served, touch| OfTouch {
        of: of(container),
        touch,
    };
    WRITES.encode(encoder, containers, |metric, container| {
        let chain = &container.counters.chain;
        for (which, writes) in [
            ("first", chain.first_touch_writes),
            ("steady", chain.steady_writes),
        ] {
            let labels = touch(container, which);
            ConstCounter::new(writes).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    })?;
    WRITE_DURATION.encode(encoder, containers, |metric, container| {
        let chain = &container.counters.chain;
        for (which, latency) in [("first", &chain.first_touch), ("steady", &chain.steady)] {
            histogram(metric.encode_family(&touch(container, which))?, latency)?;
        }
        Ok(())
    })?;
    FLUSH_DURATION.encode(encoder, containers, |metric, container| {
        let latency = &container.counters.chain.flush;
        histogram(metric.encode_family(&of(container))?, latency)
    })
}

fn histogram(mut metric: MetricEncoder<'_>, latency: &LatencySnapshot) -> std::fmt::Result {
    let (sum, buckets) = buckets(latency);
    metric.encode_histogram::<NoLabelSet>(sum, latency.count, &buckets, None)
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
