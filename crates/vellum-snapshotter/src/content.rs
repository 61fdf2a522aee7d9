//! containerd's content store, of which this is a client: a blob goes there as it is made.
//!
//! What was written and never committed is nobody's: containerd collects it. So whatever ends in the
//! middle, a blob is there whole or not at all.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status, Streaming};
use uuid::Uuid;

use super::failure::{Failure, Result, containerd};
use super::proto::services::content::v1 as api;
use super::proto::services::leases::v1 as leases;
use api::content_client::ContentClient;
use leases::leases_client::LeasesClient;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind};
use vellum_image::LayerBlob;

/// Where containerd listens by default.
pub const DEFAULT_CONTAINERD: &str = "/run/containerd/containerd.sock";
/// The label that says what is in a compressed layer: the digest of its tar.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// The label of a lease that says when it ends.
const EXPIRE: &str = "containerd.io/gc.expire";
/// How long a blob is kept that its client has not named yet.
const KEPT: Duration = Duration::from_secs(60 * 60);
/// How long containerd may take for one answer: a commit syncs the blob.
const PATIENCE: Duration = Duration::from_secs(120);
/// Bytes in one message: containerd takes up to 16 MiB.
const CHUNK: usize = 1 << 20;

/// For whom something is done in containerd.
#[derive(Debug, Clone)]
pub struct Owner {
    /// One of containerd's namespaces.
    pub namespace: AsciiMetadataValue,
    /// What keeps a blob until something names it, where the client has such a lease and says so.
    pub lease: Option<AsciiMetadataValue>,
}

/// What a blob is stored as.
#[derive(Debug, Clone)]
pub struct Naming {
    /// What the blob is known by while it is written; empty for one that nobody asks after.
    pub reference: String,
    /// Labels of the blob.
    pub labels: BTreeMap<String, String>,
}

/// The content store of the containerd that listens at a socket.
#[derive(Debug, Clone)]
pub struct ContentStore {
    address: PathBuf,
}

impl ContentStore {
    /// That of the containerd at `address`. Nobody connects yet.
    pub fn new(address: &Path) -> Self {
        ContentStore {
            address: address.to_owned(),
        }
    }

    /// Stores the blob that `write` writes. One that is there already is as good. Only where a runtime is
    /// and may be waited for: in `spawn_blocking`.
    ///
    /// # Errors
    /// What `write` fails with; [`Failure::Containerd`] with containerd's own code, UNAVAILABLE where it does
    /// not answer.
    pub(super) fn put(
        &self,
        owner: &Owner,
        naming: &Naming,
        write: impl FnOnce(&mut Upload) -> vellum_base::Result<LayerBlob>,
    ) -> Result<LayerBlob> {
        let mut calls = Calls::connect(&self.address, owner)?;
        let own_lease = match &calls.owner.lease {
            Some(_) => None,
            None => Some(calls.make_lease()?),
        };
        let stored = calls.put(naming, write);
        if let (Err(_), Some(lease)) = (&stored, own_lease) {
            calls.end_lease(lease);
        }
        stored
    }
}

/// A connection to containerd, and in whose name it is used.
struct Calls {
    content: ContentClient<Channel>,
    leases: LeasesClient<Channel>,
    owner: Owner,
}

/// Waits for an answer, in the words of `doing` where none comes.
fn wait<T>(doing: &str, answer: impl Future<Output = std::result::Result<T, Status>>) -> Result<T> {
    let late = |_| Status::deadline_exceeded(format!("no answer for {} s", PATIENCE.as_secs()));
    let answer = async { tokio::time::timeout(PATIENCE, answer).await.map_err(late)? };
    Handle::current().block_on(answer).map_err(|status| {
        let text = format!("containerd, {doing}: {}", status.message());
        containerd(status.code(), text)
    })
}

impl Calls {
    fn connect(address: &Path, owner: &Owner) -> Result<Self> {
        let path = address.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The name means nothing on a unix socket.
        let endpoint = Endpoint::from_static("http://containerd").connect_timeout(PATIENCE);
        let connected = Handle::current().block_on(endpoint.connect_with_connector(connector));
        let channel = connected.map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            let text = format!(
                "containerd does not answer at {}: {}: its socket is named by `containerd` in the section \
                 [diff] of /etc/vellum/config.toml",
                address.display(),
                cause.unwrap_or_else(|| error.to_string())
            );
            containerd(Code::Unavailable, text)
        })?;
        Ok(Calls {
            content: ContentClient::new(channel.clone()),
            leases: LeasesClient::new(channel),
            owner: owner.clone(),
        })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert("containerd-namespace", self.owner.namespace.clone());
        if let Some(lease) = &self.owner.lease {
            metadata.insert("containerd-lease", lease.clone());
        }
        request
    }

    /// Keeps what is made from now on for a while. Of its client's lease containerd says nothing to a proxy
    /// plugin, and without one it could collect the blob before the client has named it.
    fn make_lease(&mut self) -> Result<String> {
        let id = format!("vellum-diff-{}", Uuid::new_v4());
        let until = prost_types::Timestamp::from(SystemTime::now() + KEPT);
        let until = prost_types::Timestamp { nanos: 0, ..until };
        let request = self.request(leases::CreateRequest {
            id: id.clone(),
            labels: HashMap::from([(EXPIRE.to_owned(), until.to_string())]),
        });
        wait("making a lease", self.leases.create(request))?;
        let value = AsciiMetadataValue::try_from(id.as_str());
        self.owner.lease =
            Some(value.map_err(|error| Error::internal(format!("lease {id}: {error}")))?);
        Ok(id)
    }

    fn end_lease(&mut self, id: String) {
        self.owner.lease = None;
        let request = self.request(leases::DeleteRequest { id, sync: false });
        let ended = wait("ending a lease", self.leases.delete(request));
        if let Err(failure) = ended {
            tracing::debug!(error = %failure, "a lease of ours stays until it expires");
        }
    }

    fn put(
        &mut self,
        naming: &Naming,
        write: impl FnOnce(&mut Upload) -> vellum_base::Result<LayerBlob>,
    ) -> Result<LayerBlob> {
        let is_ours = naming.reference.is_empty();
        let reference = match is_ours {
            true => format!("vellum-diff-{}", Uuid::new_v4()),
            false => naming.reference.clone(),
        };
        let done = self.write(&reference, naming, write);
        if done.is_err() && is_ours {
            let request = self.request(api::AbortRequest { r#ref: reference });
            let aborted = wait("dropping a blob", self.content.abort(request));
            if let Err(failure) = aborted {
                tracing::debug!(error = %failure, "what was written of a layer is left to containerd");
            }
        }
        done
    }

    fn write(
        &mut self,
        reference: &str,
        naming: &Naming,
        write: impl FnOnce(&mut Upload) -> vellum_base::Result<LayerBlob>,
    ) -> Result<LayerBlob> {
        let mut upload = self.begin(reference)?;
        crash_point::here("diff: begun");
        let done = match write(&mut upload) {
            Ok(blob) => self.commit(&mut upload, naming, blob),
            // What the store said is the reason; of the tar it is only that it could not be written.
            Err(error) => Err(upload.failure.take().unwrap_or(Failure::Host(error))),
        };
        upload.end();
        done
    }

    /// Takes the reference, and nobody else's writing with it: from its start again.
    fn begin(&mut self, reference: &str) -> Result<Upload> {
        let (requests, receiver) = mpsc::channel(1);
        let first = api::WriteContentRequest {
            action: api::WriteAction::Stat.into(),
            r#ref: reference.to_owned(),
            ..api::WriteContentRequest::default()
        };
        let doing = format!("writing {reference:?}");
        let request = self.request(ReceiverStream::new(receiver));
        let begun = async {
            let sent = requests.send(first).await;
            sent.map_err(|_| Status::unavailable("the connection ended"))?;
            let mut answers = self.content.write(request).await?.into_inner();
            next(&mut answers).await?;
            Ok(answers)
        };
        let answers = wait(&doing, begun)?;
        Ok(Upload {
            doing,
            requests,
            answers,
            buffer: Vec::with_capacity(CHUNK),
            written: 0,
            digest: String::new(),
            failure: None,
        })
    }

    fn commit(
        &mut self,
        upload: &mut Upload,
        naming: &Naming,
        blob: LayerBlob,
    ) -> Result<LayerBlob> {
        let digest = format!("sha256:{}", blob.digest);
        let diff_id = format!("sha256:{}", blob.diff_id);
        let mut labels: HashMap<String, String> = naming.labels.clone().into_iter().collect();
        let compressed = digest != diff_id;
        if compressed {
            labels.insert(UNCOMPRESSED.to_owned(), diff_id.clone());
        }
        upload.flush_buffer()?;
        crash_point::here("diff: written");
        upload.commit(&digest, labels)?;
        crash_point::here("diff: committed");
        let request = self.request(api::InfoRequest { digest });
        let doing = "asking for the new layer";
        let info = wait(doing, self.content.info(request))?.into_inner();
        let nothing = || containerd(Code::DataLoss, "containerd says nothing of the new layer");
        let mut info = info.info.ok_or_else(nothing)?;
        if u64::try_from(info.size) != Ok(blob.size) {
            let text = format!(
                "containerd's content store has {} bytes of {}, which has {}",
                info.size, info.digest, blob.size
            );
            return Err(containerd(Code::DataLoss, text));
        }
        // It may have been there before, from somebody who did not say what is in it.
        if compressed && !info.labels.contains_key(UNCOMPRESSED) {
            info.labels.insert(UNCOMPRESSED.to_owned(), diff_id);
            let request = self.request(api::UpdateRequest {
                info: Some(info),
                update_mask: Some(prost_types::FieldMask {
                    paths: vec![format!("labels.{UNCOMPRESSED}")],
                }),
            });
            wait("labelling the layer", self.content.update(request))?;
        }
        Ok(blob)
    }
}

async fn next(
    answers: &mut Streaming<api::WriteContentResponse>,
) -> std::result::Result<api::WriteContentResponse, Status> {
    let answer = answers.message().await?;
    answer.ok_or_else(|| Status::unavailable("the answers ended"))
}

/// A blob that is being written.
pub(super) struct Upload {
    doing: String,
    requests: mpsc::Sender<api::WriteContentRequest>,
    answers: Streaming<api::WriteContentResponse>,
    buffer: Vec<u8>,
    /// Bytes that containerd has.
    written: u64,
    /// Of those, as containerd sees them.
    digest: String,
    failure: Option<Failure>,
}

impl Upload {
    /// One message, and its answer: so no more is on the way than one has in memory.
    fn exchange(&mut self, request: api::WriteContentRequest) -> Result<api::WriteContentResponse> {
        let Upload {
            requests, answers, ..
        } = self;
        let exchanged = async {
            let sent = requests.send(request).await.is_ok();
            // A stream that ended says why.
            match (next(answers).await, sent) {
                (Ok(_), false) => Err(Status::unavailable("the connection ended")),
                (answer, _) => answer,
            }
        };
        wait(&self.doing, exchanged)
    }

    fn flush_buffer(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let data = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        let written = self.written + data.len() as u64;
        // At offset 0 it is cut to nothing first: an earlier attempt may have left something.
        let answer = self.exchange(api::WriteContentRequest {
            action: api::WriteAction::Write.into(),
            offset: signed(self.written)?,
            data,
            ..api::WriteContentRequest::default()
        })?;
        if u64::try_from(answer.offset) != Ok(written) {
            let text = format!(
                "containerd, {}: it has {} bytes and was given {written}",
                self.doing, answer.offset
            );
            return Err(containerd(Code::DataLoss, text));
        }
        self.written = written;
        self.digest = answer.digest;
        Ok(())
    }

    /// Makes a blob of it. That the digest is right is seen here, where containerd says it: told to expect
    /// one, it would not put a blob that is there already under our lease.
    fn commit(&mut self, digest: &str, labels: HashMap<String, String>) -> Result<()> {
        let expected = match self.digest.as_str() {
            "" => digest.to_owned(),
            seen if seen == digest => String::new(),
            seen => {
                let text = format!("containerd, {}: it has {seen}, not {digest}", self.doing);
                return Err(containerd(Code::DataLoss, text));
            }
        };
        let committed = self.exchange(api::WriteContentRequest {
            action: api::WriteAction::Commit.into(),
            offset: signed(self.written)?,
            total: signed(self.written)?,
            expected,
            labels,
            ..api::WriteContentRequest::default()
        });
        match committed {
            Err(Failure::Containerd(Code::AlreadyExists, _)) => Ok(()),
            committed => committed.map(drop),
        }
    }

    /// Gives the reference up, and waits until containerd has seen that: the next who writes under it, such
    /// as another differ, would find it locked.
    fn end(self) {
        let Upload {
            doing,
            requests,
            mut answers,
            ..
        } = self;
        drop(requests);
        let ended = async {
            while answers.message().await?.is_some() {}
            Ok(())
        };
        if let Err(failure) = wait(&doing, ended) {
            tracing::debug!(error = %failure, "a blob's writing ended");
        }
    }
}

impl io::Write for Upload {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let count = data.len().min(CHUNK - self.buffer.len());
        let (now, _) = data.split_at(count);
        self.buffer.extend_from_slice(now);
        if self.buffer.len() == CHUNK {
            self.flush_buffer().map_err(|failure| {
                let text = failure.to_string();
                self.failure = Some(failure);
                io::Error::other(text)
            })?;
        }
        Ok(count)
    }

    /// Nothing has to be there before the commit.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A number of bytes as it is in messages.
pub(super) fn signed(bytes: u64) -> Result<i64> {
    let too_large = |_| Error::new(ErrorKind::NoSpace, format!("a layer of {bytes} bytes"));
    Ok(i64::try_from(bytes).map_err(too_large)?)
}
