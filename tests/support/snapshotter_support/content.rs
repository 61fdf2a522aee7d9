//! A content store and leases as containerd serves them, in memory, that fail on demand.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};
use vellum_snapshotter::proto::services::content::v1 as api;
use vellum_snapshotter::proto::services::leases::v1 as leases;

use api::content_server::{Content, ContentServer};
use leases::leases_server::{Leases, LeasesServer};
use sha2::{Digest, Sha256};

/// What goes wrong with a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// At so many bytes it is refused.
    Refuses(usize),
    /// At so many bytes the answers end, as when containerd is killed.
    Ends(usize),
    /// What is stored is not what was sent.
    Garbles,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blob {
    pub bytes: Vec<u8>,
    pub labels: HashMap<String, String>,
    /// Under which leases it was committed.
    pub leases: Vec<String>,
}

#[derive(Debug, Default)]
pub struct State {
    /// By namespace and digest.
    pub blobs: HashMap<(String, String), Blob>,
    /// By namespace and reference.
    pub ingests: HashMap<(String, String), Vec<u8>>,
    /// References that somebody else writes.
    pub locked: Vec<String>,
    /// By identity.
    pub leases: HashMap<String, HashMap<String, String>>,
    pub fault: Option<Fault>,
}

#[derive(Clone, Default)]
struct Service(Arc<Mutex<State>>);

pub struct FakeContainerd {
    service: Service,
    dir: tempfile::TempDir,
    _runtime: Runtime,
}

impl FakeContainerd {
    pub fn start() -> FakeContainerd {
        let dir = tempfile::tempdir().unwrap();
        let service = Service::default();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let _entered = runtime.enter();
        let listener = UnixListener::bind(dir.path().join("containerd.sock")).unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(ContentServer::new(service.clone()).max_decoding_message_size(16 << 20))
            .add_service(LeasesServer::new(service.clone()))
            .serve_with_incoming(UnixListenerStream::new(listener));
        runtime.spawn(server);
        drop(_entered);
        FakeContainerd {
            service,
            dir,
            _runtime: runtime,
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("containerd.sock")
    }

    /// What has a snapshotter use it.
    pub fn config(&self) -> String {
        format!("[diff]\ncontainerd = '{}'\n", self.socket().display())
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.service.0.lock().unwrap()
    }

    pub fn blob(&self, namespace: &str, digest: &str) -> Option<Blob> {
        let key = (namespace.to_owned(), digest.to_owned());
        self.state().blobs.get(&key).cloned()
    }
}

pub fn digest(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn field<T>(request: &Request<T>, name: &str) -> String {
    let value = request.metadata().get(name);
    value.map_or_else(String::new, |value| value.to_str().unwrap().to_owned())
}

fn namespace<T>(request: &Request<T>) -> Result<String, Status> {
    match field(request, "containerd-namespace") {
        none if none.is_empty() => Err(Status::failed_precondition("namespace is required")),
        namespace => Ok(namespace),
    }
}

impl State {
    /// One message of a write, as containerd's content server takes it; `None` where the answers end.
    fn write(
        &mut self,
        (namespace, reference, lease): &(String, String, String),
        request: api::WriteContentRequest,
    ) -> Result<Option<api::WriteContentResponse>, Status> {
        let key = (namespace.clone(), reference.clone());
        let fault = self.fault;
        let ingest = self.ingests.entry(key.clone()).or_default();
        let action = request.action();
        if action != api::WriteAction::Stat {
            if request.offset > 0 && request.offset != ingest.len() as i64 {
                return Err(Status::out_of_range("write at another offset"));
            }
            if request.offset == 0 {
                ingest.clear();
            }
            ingest.extend(&request.data);
        }
        match fault {
            Some(Fault::Refuses(at)) if ingest.len() >= at => {
                return Err(Status::resource_exhausted("no space left on device"));
            }
            Some(Fault::Ends(at)) if ingest.len() >= at => return Ok(None),
            Some(Fault::Garbles) if ingest.len() > 10 => ingest[10] ^= 1,
            _ => {}
        }
        let mut answer = api::WriteContentResponse {
            action: request.action,
            offset: ingest.len() as i64,
            digest: digest(ingest),
            ..api::WriteContentResponse::default()
        };
        if action == api::WriteAction::Commit {
            let bytes = self.ingests.remove(&key).unwrap();
            answer.total = bytes.len() as i64;
            if request.total != answer.total {
                return Err(Status::failed_precondition("unexpected commit size"));
            }
            let there = self.blobs.entry((key.0, answer.digest.clone()));
            let is_new = matches!(there, std::collections::hash_map::Entry::Vacant(_));
            let blob = there.or_insert(Blob {
                bytes,
                labels: request.labels,
                ..Blob::default()
            });
            blob.leases.push(lease.clone());
            if !is_new {
                return Err(Status::already_exists("content: already exists"));
            }
        }
        Ok(Some(answer))
    }
}

#[tonic::async_trait]
impl Content for Service {
    async fn info(
        &self,
        request: Request<api::InfoRequest>,
    ) -> Result<Response<api::InfoResponse>, Status> {
        let namespace = namespace(&request)?;
        let digest = request.into_inner().digest;
        let state = self.0.lock().unwrap();
        let blob = state.blobs.get(&(namespace, digest.clone()));
        let blob = blob.ok_or_else(|| Status::not_found("content: not found"))?;
        let info = Some(api::Info {
            digest,
            size: blob.bytes.len() as i64,
            labels: blob.labels.clone(),
            ..api::Info::default()
        });
        Ok(Response::new(api::InfoResponse { info }))
    }

    async fn update(
        &self,
        request: Request<api::UpdateRequest>,
    ) -> Result<Response<api::UpdateResponse>, Status> {
        let namespace = namespace(&request)?;
        let request = request.into_inner();
        let info = request.info.unwrap();
        let mut state = self.0.lock().unwrap();
        let blob = state.blobs.get_mut(&(namespace, info.digest.clone()));
        let blob = blob.ok_or_else(|| Status::not_found("content: not found"))?;
        for path in request.update_mask.unwrap().paths {
            let label = path.strip_prefix("labels.").unwrap().to_owned();
            let value = info.labels[&label].clone();
            blob.labels.insert(label, value);
        }
        Ok(Response::new(api::UpdateResponse { info: Some(info) }))
    }

    type WriteStream = ReceiverStream<Result<api::WriteContentResponse, Status>>;

    async fn write(
        &self,
        request: Request<Streaming<api::WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let namespace = namespace(&request)?;
        let lease = field(&request, "containerd-lease");
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let mut next = first.ok_or_else(|| Status::invalid_argument("no message"))?;
        let of = (namespace, next.r#ref.clone(), lease);
        {
            let mut state = self.0.lock().unwrap();
            if state.locked.contains(&of.1) {
                return Err(Status::unavailable(format!("ref {} locked", of.1)));
            }
            state.locked.push(of.1.clone());
        }
        let (sender, answers) = mpsc::channel(1);
        let service = self.clone();
        tokio::spawn(async move {
            loop {
                let last = next.action() == api::WriteAction::Commit;
                let answer = service.0.lock().unwrap().write(&of, next).transpose();
                let Some(answer) = answer else { break };
                let failed = answer.is_err();
                if sender.send(answer).await.is_err() || failed || last {
                    break;
                }
                match requests.message().await {
                    Ok(Some(message)) => next = message,
                    _ => break,
                }
            }
            service
                .0
                .lock()
                .unwrap()
                .locked
                .retain(|reference| *reference != of.1);
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn abort(&self, request: Request<api::AbortRequest>) -> Result<Response<()>, Status> {
        let key = (namespace(&request)?, request.into_inner().r#ref);
        self.0.lock().unwrap().ingests.remove(&key);
        Ok(Response::new(()))
    }
}

#[tonic::async_trait]
impl Leases for Service {
    async fn create(
        &self,
        request: Request<leases::CreateRequest>,
    ) -> Result<Response<leases::CreateResponse>, Status> {
        namespace(&request)?;
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        state.leases.insert(request.id, request.labels);
        Ok(Response::new(leases::CreateResponse::default()))
    }

    async fn delete(
        &self,
        request: Request<leases::DeleteRequest>,
    ) -> Result<Response<()>, Status> {
        namespace(&request)?;
        self.0
            .lock()
            .unwrap()
            .leases
            .remove(&request.into_inner().id);
        Ok(Response::new(()))
    }
}
