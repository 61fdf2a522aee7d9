//! What Prometheus can ask: calls, snapshots, devices, space. In the OpenMetrics text format.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use tokio::net::TcpListener;
use tonic::Code;

use super::Snapshotter;
use super::container_metrics::Containers;
use vellum_export::device::Status;
use vellum_store::SnapshotKind;

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Whoever has not sent its request by then is gone.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    method: &'static str,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfMethod {
    method: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfState {
    state: &'static str,
}

/// The counters of one snapshotter.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<Answer, Counter<u64, AtomicU64>>,
    seconds: Family<OfMethod, Histogram, fn() -> Histogram>,
    frozen: Histogram,
    snapshots: Family<OfKind, Gauge>,
    bytes: Family<OfKind, Gauge>,
    devices: Family<OfState, Gauge>,
    read_only: Gauge,
    store_size: Gauge,
    store_free: Gauge,
    backlog: Gauge,
    containers: Arc<Containers>,
}

/// From 250 microseconds to 16 seconds.
fn durations() -> Histogram {
    Histogram::new(exponential_buckets(0.000_25, 2.0, 17))
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Metrics {
            registry: Registry::with_prefix("vellum"),
            requests: Family::default(),
            seconds: Family::new_with_constructor(durations),
            frozen: Histogram::new(exponential_buckets(0.001, 2.0, 12)),
            snapshots: Family::default(),
            bytes: Family::default(),
            devices: Family::default(),
            read_only: Gauge::default(),
            store_size: Gauge::default(),
            store_free: Gauge::default(),
            backlog: Gauge::default(),
            containers: Arc::default(),
        };
        metrics.register_calls();
        metrics.register_store();
        let containers = Arc::clone(&metrics.containers);
        metrics.registry.register_collector(Box::new(containers));
        metrics
    }
}

impl Metrics {
    /// Names what calls are counted in.
    fn register_calls(&mut self) {
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        self.registry
            .register("build", "The program that answers", build);
        self.registry.register(
            "requests",
            "Calls of the snapshots API by method and gRPC code",
            Family::clone(&self.requests),
        );
        self.registry.register_with_unit(
            "request_duration",
            "Time from a call to its answer",
            Unit::Seconds,
            Family::clone(&self.seconds),
        );
        self.registry.register_with_unit(
            "commit_frozen",
            "Time for which writers waited while a mounted snapshot was committed",
            Unit::Seconds,
            self.frozen.clone(),
        );
    }

    /// Names what is there and how it is.
    fn register_store(&mut self) {
        self.registry.register(
            "snapshots",
            "Snapshots by kind",
            Family::clone(&self.snapshots),
        );
        self.registry.register_with_unit(
            "snapshot_data",
            "Data in the layers of snapshots by kind; shared layers count each time",
            Unit::Bytes,
            Family::clone(&self.bytes),
        );
        self.registry.register(
            "devices",
            "Devices of active snapshots and views by state",
            Family::clone(&self.devices),
        );
        self.registry.register(
            "snapshots_read_only",
            "Active snapshots whose file system met an error and takes no writes any more",
            self.read_only.clone(),
        );
        self.registry.register_with_unit(
            "store_size",
            "Size of the file system of the store",
            Unit::Bytes,
            self.store_size.clone(),
        );
        self.registry.register_with_unit(
            "store_free",
            "Free space in the file system of the store",
            Unit::Bytes,
            self.store_free.clone(),
        );
        self.registry.register(
            "backlog",
            "Removed or committed snapshots whose devices and layers are not cleared away yet",
            self.backlog.clone(),
        );
    }

    /// Counts a call that was answered.
    pub fn request(&self, method: &'static str, code: Code, took: Duration) {
        let code = format!("{code:?}");
        self.requests.get_or_create(&Answer { method, code }).inc();
        let seconds = self.seconds.get_or_create(&OfMethod { method });
        seconds.observe(took.as_secs_f64());
    }

    /// Counts a commit of a mounted snapshot, whose writers waited for so long.
    pub fn frozen(&self, waited: Duration) {
        self.frozen.observe(waited.as_secs_f64());
    }

    /// Looks at the snapshots, devices and the store as they are now.
    fn look(&self, snapshotter: &Snapshotter) {
        let kinds = [
            ("view", SnapshotKind::View),
            ("active", SnapshotKind::Active),
            ("committed", SnapshotKind::Committed),
        ];
        let records = snapshotter.list();
        let asked = self.containers.look(snapshotter.store(), &records);
        let top_blocks = asked.unwrap_or_else(|error| {
            tracing::warn!(%error, "the containers' counters are those of before");
            HashMap::new()
        });
        for (name, kind) in kinds {
            let of_kind = records.iter().filter(|record| record.kind == kind);
            let bytes: u64 = of_kind
                .clone()
                .filter_map(|record| match top_blocks.get(&record.id) {
                    // No server is asked twice.
                    Some(blocks) => snapshotter.bytes_of(record, Some(*blocks)).ok(),
                    // One that is removed meanwhile takes nothing.
                    None => snapshotter.usage(&record.key).ok().map(|usage| usage.bytes),
                })
                .sum();
            let label = OfKind { kind: name };
            self.snapshots
                .get_or_create(&label)
                .set(of_kind.count() as i64);
            self.bytes.get_or_create(&label).set(signed(bytes));
        }
        let given_up = |record: &&vellum_store::SnapshotRecord| {
            snapshotter.devices().has_given_up(record).unwrap_or(false)
        };
        let read_only = records.iter().filter(given_up).count();
        self.read_only.set(read_only as i64);
        let states = ["serving", "restarting", "failed", "detached"];
        let mut counts = [0i64; 4];
        for record in records.iter().filter(|r| r.kind != SnapshotKind::Committed) {
            let status = snapshotter
                .devices()
                .device_status(record.id)
                .ok()
                .flatten();
            let state = match status {
                None => "detached",
                Some(status) if !status.alive => "failed",
                Some(status) => match status.state.status {
                    Status::Serving => "serving",
                    Status::Starting | Status::Restarting => "restarting",
                    Status::Failed => "failed",
                    Status::Ended => "detached",
                },
            };
            for (name, count) in states.iter().zip(&mut counts) {
                *count += i64::from(*name == state);
            }
        }
        for (state, count) in states.into_iter().zip(counts) {
            self.devices.get_or_create(&OfState { state }).set(count);
        }
        if let Ok(stat) = nix::sys::statvfs::statvfs(snapshotter.store().root()) {
            let unit = stat.fragment_size();
            self.store_size.set(signed(stat.blocks() * unit));
            self.store_free.set(signed(stat.blocks_available() * unit));
        }
        self.backlog.set(snapshotter.backlog() as i64);
    }

    /// All of it as text.
    ///
    /// # Errors
    /// Where a number cannot be formatted.
    pub fn text(&self, snapshotter: &Snapshotter) -> Result<String, std::fmt::Error> {
        self.look(snapshotter);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Answers `GET /metrics` in the present runtime, as long as the snapshotter is there.
///
/// # Errors
/// Where the listener cannot be used.
pub fn serve(
    listener: std::net::TcpListener,
    snapshotter: Weak<Snapshotter>,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    tracing::info!(address = ?listener.local_addr().ok(), "answers Prometheus");
    tokio::spawn(async move {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection for metrics was not accepted");
                    // Out of descriptors, most likely: not again at once.
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            };
            let snapshotter = Weak::clone(&snapshotter);
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request| {
                    answer(request, Weak::clone(&snapshotter))
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                if let Err(error) = served {
                    tracing::debug!(%error, "a connection for metrics");
                }
            });
        }
    });
    Ok(())
}

async fn answer(
    request: Request<Incoming>,
    snapshotter: Weak<Snapshotter>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let say = |status: StatusCode, kind: &'static str, text: String| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        let kind = header::HeaderValue::from_static(kind);
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        Ok(response)
    };
    if request.uri().path() != "/metrics" {
        return say(
            StatusCode::NOT_FOUND,
            "text/plain",
            "it is at /metrics\n".into(),
        );
    }
    if request.method() != Method::GET {
        return say(
            StatusCode::METHOD_NOT_ALLOWED,
            "text/plain",
            "GET alone\n".into(),
        );
    }
    let text = tokio::task::spawn_blocking(move || {
        let snapshotter: Arc<Snapshotter> = snapshotter.upgrade()?;
        snapshotter.metrics().text(&snapshotter).ok()
    })
    .await;
    match text {
        Ok(Some(text)) => say(StatusCode::OK, CONTENT_TYPE, text),
        _ => say(
            StatusCode::SERVICE_UNAVAILABLE,
            "text/plain",
            "ending\n".into(),
        ),
    }
}
