//! gRPC: containerd's messages to operations and back.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::net::UnixListener;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Request, Response, Status};

use super::authority::Connection;
use super::content::ContentStore;
use super::filter::Filters;
use super::metrics;
use super::operations::MountSpec;
use super::proto::services::diff::v1::diff_server::DiffServer;
use super::proto::services::snapshots::v1 as api;
use super::proto::types::Mount;
use super::{Failure, Snapshotter};
use api::snapshots_server::{Snapshots, SnapshotsServer};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_store::{SnapshotKind, SnapshotRecord};

/// Snapshots in one message of a list.
const LIST_CHUNK: usize = 100;

/// Serves, with layers going to `content`, until `stop` is done and the calls under way are answered.
///
/// # Errors
/// Where the runtime or the listener fails.
pub fn serve(
    snapshotter: &Arc<Snapshotter>,
    listener: std::os::unix::net::UnixListener,
    metrics: Option<std::net::TcpListener>,
    content: &ContentStore,
    ready: impl FnOnce(),
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::io("the gRPC server cannot be started", error))?;
    runtime.block_on(async {
        let failed = |error| Error::io("the gRPC server cannot be started", error);
        listener.set_nonblocking(true).map_err(failed)?;
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        let stop = stop_signal().map_err(failed)?;
        if let Some(listener) = metrics {
            metrics::serve(listener, Arc::downgrade(snapshotter)).map_err(failed)?;
        }
        ready();
        let service = Service {
            snapshotter: Arc::clone(snapshotter),
            content: content.clone(),
        };
        let connections = UnixListenerStream::new(listener);
        let connections = connections.map(|stream| stream.map(Connection::new));
        tonic::transport::Server::builder()
            .add_service(DiffServer::new(service.clone()))
            .add_service(SnapshotsServer::new(service))
            .serve_with_incoming_shutdown(connections, stop)
            .await
            .map_err(|error| Error::with_source(ErrorKind::Io, "the gRPC server failed", error))
    })
}

/// Done at SIGTERM or SIGINT.
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        let terminate = std::pin::pin!(terminate.recv());
        let interrupt = std::pin::pin!(interrupt.recv());
        first(terminate, interrupt).await;
        tracing::info!("told to stop");
    })
}

/// Done when either is.
async fn first<T>(
    mut a: std::pin::Pin<&mut impl Future<Output = T>>,
    mut b: std::pin::Pin<&mut impl Future<Output = T>>,
) {
    std::future::poll_fn(|context| {
        if a.as_mut().poll(context).is_ready() || b.as_mut().poll(context).is_ready() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}

/// What answers the calls of all services.
#[derive(Debug, Clone)]
pub(super) struct Service {
    snapshotter: Arc<Snapshotter>,
    /// Where layers are stored.
    pub(super) content: ContentStore,
}

impl Service {
    /// Carries out an operation where it may block, and says what became of it.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        what: &'static str,
        key: &str,
        operation: impl FnOnce(&Snapshotter) -> std::result::Result<T, Failure> + Send + 'static,
    ) -> std::result::Result<Response<T>, Status> {
        let snapshotter = Arc::clone(&self.snapshotter);
        let begin = std::time::Instant::now();
        let done = tokio::task::spawn_blocking(move || operation(&snapshotter)).await;
        let took = begin.elapsed();
        let answer = match done {
            Ok(Ok(answer)) => {
                let micros = took.as_micros() as u64;
                tracing::debug!(what, key, micros, "done");
                Ok(Response::new(answer))
            }
            Ok(Err(failure)) => Err(status(what, key, &failure)),
            Err(error) => {
                tracing::error!(what, key, %error, "the operation broke off");
                Err(Status::internal(format!(
                    "{what} {key:?} broke off: {error}"
                )))
            }
        };
        let code = answer
            .as_ref()
            .map_or_else(|status| status.code(), |_| Code::Ok);
        self.snapshotter.metrics().request(what, code, took);
        answer
    }
}

/// A failure as containerd understands it.
fn status(what: &str, key: &str, failure: &Failure) -> Status {
    let (code, error) = match failure {
        Failure::Request(error) => {
            tracing::debug!(what, key, %error, "refused");
            let code = match error.kind() {
                ErrorKind::AlreadyExists => Code::AlreadyExists,
                ErrorKind::NotFound => Code::NotFound,
                ErrorKind::InvalidInput => Code::InvalidArgument,
                ErrorKind::InUse => Code::FailedPrecondition,
                // Of several plugins for one thing containerd asks the next.
                ErrorKind::Unsupported => Code::Unimplemented,
                _ => Code::Unknown,
            };
            (code, error)
        }
        Failure::Host(error) => {
            tracing::error!(what, key, %error, "failed");
            let code = match error.kind() {
                ErrorKind::NoSpace => Code::ResourceExhausted,
                ErrorKind::Timeout => Code::DeadlineExceeded,
                ErrorKind::InUse => Code::FailedPrecondition,
                ErrorKind::Corrupt => Code::DataLoss,
                // Never NOT_FOUND or ALREADY_EXISTS: those are about the snapshot.
                _ => Code::Internal,
            };
            (code, error)
        }
        Failure::Containerd(code, error) => {
            tracing::error!(what, key, %error, "failed");
            (*code, error)
        }
    };
    Status::new(code, error.to_string())
}

fn sorted(labels: HashMap<String, String>) -> BTreeMap<String, String> {
    labels.into_iter().collect()
}

fn mount(spec: MountSpec) -> Vec<Mount> {
    let mode = if spec.read_only { "ro" } else { "rw" };
    let mut options = vec![mode.to_owned()];
    let kind = if spec.device {
        let more = vellum_fs::ext4::MountOptions {
            read_only: spec.read_only,
            ..Default::default()
        };
        // As everywhere: docs/operations.md says why.
        options.push("noatime".into());
        options.extend(more.data().split(',').map(str::to_owned));
        "ext4"
    } else {
        options.push("rbind".into());
        "bind"
    };
    vec![Mount {
        r#type: kind.into(),
        source: spec.source.to_string_lossy().into_owned(),
        target: String::new(),
        options,
    }]
}

fn info(record: SnapshotRecord) -> api::Info {
    let kind = match record.kind {
        SnapshotKind::View => api::Kind::View,
        SnapshotKind::Active => api::Kind::Active,
        SnapshotKind::Committed => api::Kind::Committed,
    };
    api::Info {
        name: record.key,
        parent: record.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(timestamp(record.created)),
        updated_at: Some(timestamp(record.updated)),
        labels: record.labels.into_iter().collect(),
    }
}

fn timestamp(time: SystemTime) -> prost_types::Timestamp {
    prost_types::Timestamp::from(time)
}

type Answer<T> = std::result::Result<Response<T>, Status>;

#[tonic::async_trait]
impl Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<api::PrepareSnapshotRequest>,
    ) -> Answer<api::PrepareSnapshotResponse> {
        let request = request.into_inner();
        let key = request.key.clone();
        self.run("prepare", &key, move |snapshotter| {
            let labels = sorted(request.labels);
            let kind = SnapshotKind::Active;
            let spec = snapshotter.prepare(&request.key, &request.parent, labels, kind)?;
            let mounts = mount(spec);
            Ok(api::PrepareSnapshotResponse { mounts })
        })
        .await
    }

    async fn view(
        &self,
        request: Request<api::ViewSnapshotRequest>,
    ) -> Answer<api::ViewSnapshotResponse> {
        let request = request.into_inner();
        let key = request.key.clone();
        self.run("view", &key, move |snapshotter| {
            let labels = sorted(request.labels);
            let kind = SnapshotKind::View;
            let spec = snapshotter.prepare(&request.key, &request.parent, labels, kind)?;
            let mounts = mount(spec);
            Ok(api::ViewSnapshotResponse { mounts })
        })
        .await
    }

    async fn mounts(&self, request: Request<api::MountsRequest>) -> Answer<api::MountsResponse> {
        let key = request.into_inner().key;
        self.run("mounts", &key.clone(), move |snapshotter| {
            let mounts = mount(snapshotter.mounts(&key)?);
            Ok(api::MountsResponse { mounts })
        })
        .await
    }

    async fn commit(&self, request: Request<api::CommitSnapshotRequest>) -> Answer<()> {
        let request = request.into_inner();
        let key = request.key.clone();
        self.run("commit", &key, move |snapshotter| {
            let labels = sorted(request.labels);
            if !request.parent.is_empty() {
                let parent = snapshotter.stat(&request.key)?.parent;
                if parent.as_ref() != Some(&request.parent) {
                    return Err(Failure::Request(Error::new(
                        ErrorKind::InvalidInput,
                        "a block layer fits its own parent alone: it cannot be put on another",
                    )));
                }
            }
            snapshotter.commit(&request.name, &request.key, labels)
        })
        .await
    }

    async fn remove(&self, request: Request<api::RemoveSnapshotRequest>) -> Answer<()> {
        let key = request.into_inner().key;
        self.run("remove", &key.clone(), move |snapshotter| {
            snapshotter.remove(&key)
        })
        .await
    }

    async fn stat(
        &self,
        request: Request<api::StatSnapshotRequest>,
    ) -> Answer<api::StatSnapshotResponse> {
        let key = request.into_inner().key;
        self.run("stat", &key.clone(), move |snapshotter| {
            let info = Some(info(snapshotter.stat(&key)?));
            Ok(api::StatSnapshotResponse { info })
        })
        .await
    }

    async fn update(
        &self,
        request: Request<api::UpdateSnapshotRequest>,
    ) -> Answer<api::UpdateSnapshotResponse> {
        let request = request.into_inner();
        let wanted = request.info.unwrap_or_default();
        let paths = request.update_mask.map(|mask| mask.paths);
        let paths = paths.unwrap_or_default();
        self.run("update", &wanted.name.clone(), move |snapshotter| {
            let labels = sorted(wanted.labels);
            let record = snapshotter.update(&wanted.name, &labels, &paths)?;
            let info = Some(info(record));
            Ok(api::UpdateSnapshotResponse { info })
        })
        .await
    }

    type ListStream = tokio_stream::Iter<
        std::vec::IntoIter<std::result::Result<api::ListSnapshotsResponse, Status>>,
    >;

    async fn list(&self, request: Request<api::ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let filters = request.into_inner().filters;
        self.run("list", "", move |snapshotter| {
            let filters = Filters::parse(&filters).map_err(Failure::Request)?;
            let chosen = snapshotter.list().into_iter();
            let chosen: Vec<api::Info> = chosen
                .filter(|record| filters.matches(record))
                .map(info)
                .collect();
            let messages: Vec<_> = chosen
                .chunks(LIST_CHUNK)
                .map(|chunk| {
                    let info = chunk.to_vec();
                    Ok(api::ListSnapshotsResponse { info })
                })
                .collect();
            Ok(tokio_stream::iter(messages))
        })
        .await
    }

    async fn usage(&self, request: Request<api::UsageRequest>) -> Answer<api::UsageResponse> {
        let key = request.into_inner().key;
        self.run("usage", &key.clone(), move |snapshotter| {
            let usage = snapshotter.usage(&key)?;
            Ok(api::UsageResponse {
                size: i64::try_from(usage.bytes).unwrap_or(i64::MAX),
                inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
            })
        })
        .await
    }

    async fn cleanup(&self, _: Request<api::CleanupRequest>) -> Answer<()> {
        self.run("cleanup", "", |snapshotter| {
            snapshotter.cleanup();
            Ok(())
        })
        .await
    }
}
