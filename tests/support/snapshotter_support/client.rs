//! A client of the snapshots API: real gRPC over the real socket, each call on a connection of
//! its own, so that it also works across a snapshotter that is killed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use h2::client;
use prost::Message;
use vellum_snapshotter::proto::services::diff::v1 as diff;
use vellum_snapshotter::proto::services::snapshots::v1 as api;
use vellum_snapshotter::proto::types::{Descriptor, Mount};

/// gRPC's codes, as far as the tests look at them.
pub const NOT_FOUND: i32 = 5;
pub const ALREADY_EXISTS: i32 = 6;
pub const INVALID_ARGUMENT: i32 = 3;
pub const RESOURCE_EXHAUSTED: i32 = 8;
pub const DATA_LOSS: i32 = 15;
pub const FAILED_PRECONDITION: i32 = 9;
pub const UNIMPLEMENTED: i32 = 12;
pub const UNAVAILABLE: i32 = 14;

const SNAPSHOTS: &str = "containerd.services.snapshots.v1.Snapshots";
const DIFF: &str = "containerd.services.diff.v1.Diff";

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The server said so.
    Status(i32, String),
    /// The connection ended before the answer.
    Broken(String),
}

impl Failure {
    pub fn code(&self) -> Option<i32> {
        match self {
            Failure::Status(code, _) => Some(*code),
            Failure::Broken(_) => None,
        }
    }
}

pub type Labels<'a> = &'a [(&'a str, &'a str)];

fn labels(labels: Labels<'_>) -> HashMap<String, String> {
    labels
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// Calls go to this socket.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: impl AsRef<Path>) -> Client {
        Client {
            socket: socket.as_ref().to_owned(),
        }
    }

    /// The messages that the server answered with.
    fn call<T: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<Vec<T>, Failure> {
        self.call_of(SNAPSHOTS, method, &[], request)
    }

    /// As [`Client::call`], of any service, with these fields in its head.
    pub fn call_of<T: Message + Default>(
        &self,
        service: &str,
        method: &str,
        fields: &[(&str, &str)],
        request: &impl Message,
    ) -> Result<Vec<T>, Failure> {
        let bytes = self.bytes_of(service, method, fields, request.encode_to_vec())?;
        let mut rest = &bytes[..];
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let len = u32::from_be_bytes(rest[1..5].try_into().unwrap()) as usize;
            messages.push(T::decode(&rest[5..5 + len]).unwrap());
            rest = &rest[5 + len..];
        }
        Ok(messages)
    }

    /// As [`Client::call_of`], of a message of bytes; the messages of the answer as they came.
    pub fn bytes_of(
        &self,
        service: &str,
        method: &str,
        fields: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Result<Vec<u8>, Failure> {
        let method = format!("{service}/{method}");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (status, text, bytes) = runtime
            .block_on(exchange(&self.socket, &method, fields, body))
            .map_err(Failure::Broken)?;
        if status != 0 {
            return Err(Failure::Status(status, text));
        }
        Ok(bytes)
    }

    fn one<T: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<T, Failure> {
        Ok(self
            .call(method, request)?
            .into_iter()
            .next()
            .unwrap_or_default())
    }

    pub fn prepare(&self, key: &str, parent: &str, with: Labels<'_>) -> Result<Mount, Failure> {
        let request = api::PrepareSnapshotRequest {
            snapshotter: "vellum".into(),
            key: key.into(),
            parent: parent.into(),
            labels: labels(with),
        };
        let answer: api::PrepareSnapshotResponse = self.one("Prepare", &request)?;
        Ok(answer.mounts.into_iter().next().unwrap())
    }

    pub fn view(&self, key: &str, parent: &str, with: Labels<'_>) -> Result<Mount, Failure> {
        let request = api::ViewSnapshotRequest {
            snapshotter: "vellum".into(),
            key: key.into(),
            parent: parent.into(),
            labels: labels(with),
        };
        let answer: api::ViewSnapshotResponse = self.one("View", &request)?;
        Ok(answer.mounts.into_iter().next().unwrap())
    }

    pub fn mounts(&self, key: &str) -> Result<Mount, Failure> {
        let request = api::MountsRequest {
            snapshotter: "vellum".into(),
            key: key.into(),
        };
        let answer: api::MountsResponse = self.one("Mounts", &request)?;
        Ok(answer.mounts.into_iter().next().unwrap())
    }

    pub fn commit(&self, name: &str, key: &str, with: Labels<'_>) -> Result<(), Failure> {
        let request = api::CommitSnapshotRequest {
            snapshotter: "vellum".into(),
            name: name.into(),
            key: key.into(),
            labels: labels(with),
            ..api::CommitSnapshotRequest::default()
        };
        self.one("Commit", &request)
    }

    pub fn remove(&self, key: &str) -> Result<(), Failure> {
        let request = api::RemoveSnapshotRequest {
            snapshotter: "vellum".into(),
            key: key.into(),
        };
        self.one("Remove", &request)
    }

    pub fn stat(&self, key: &str) -> Result<api::Info, Failure> {
        let request = api::StatSnapshotRequest {
            snapshotter: "vellum".into(),
            key: key.into(),
        };
        let answer: api::StatSnapshotResponse = self.one("Stat", &request)?;
        Ok(answer.info.unwrap())
    }

    /// Replaces all labels.
    pub fn update(&self, key: &str, with: Labels<'_>) -> Result<api::Info, Failure> {
        let request = api::UpdateSnapshotRequest {
            snapshotter: "vellum".into(),
            info: Some(api::Info {
                name: key.into(),
                labels: labels(with),
                ..api::Info::default()
            }),
            ..api::UpdateSnapshotRequest::default()
        };
        let answer: api::UpdateSnapshotResponse = self.one("Update", &request)?;
        Ok(answer.info.unwrap())
    }

    pub fn list(&self, filters: &[&str]) -> Result<Vec<api::Info>, Failure> {
        let request = api::ListSnapshotsRequest {
            snapshotter: "vellum".into(),
            filters: filters.iter().map(|filter| (*filter).to_owned()).collect(),
        };
        let messages: Vec<api::ListSnapshotsResponse> = self.call("List", &request)?;
        Ok(messages
            .into_iter()
            .flat_map(|message| message.info)
            .collect())
    }

    pub fn usage(&self, key: &str) -> Result<api::UsageResponse, Failure> {
        let request = api::UsageRequest {
            snapshotter: "vellum".into(),
            key: key.into(),
        };
        self.one("Usage", &request)
    }

    /// Compares with these fields in the request's head.
    pub fn diff(
        &self,
        fields: &[(&str, &str)],
        request: &diff::DiffRequest,
    ) -> Result<Descriptor, Failure> {
        let answers: Vec<diff::DiffResponse> = self.call_of(DIFF, "Diff", fields, request)?;
        Ok(answers.into_iter().next().unwrap().diff.unwrap())
    }

    pub fn apply(&self) -> Result<Vec<diff::ApplyResponse>, Failure> {
        self.call_of(DIFF, "Apply", &[], &diff::ApplyRequest::default())
    }

    pub fn cleanup(&self) -> Result<(), Failure> {
        let request = api::CleanupRequest {
            snapshotter: "vellum".into(),
        };
        self.one("Cleanup", &request)
    }
}

/// One unary or streaming call: (status, message, body).
async fn exchange(
    socket: &Path,
    method: &str,
    fields: &[(&str, &str)],
    message: Vec<u8>,
) -> Result<(i32, String, Vec<u8>), String> {
    let broken = |error: &dyn std::fmt::Display| error.to_string();
    let stream = tokio::net::UnixStream::connect(socket)
        .await
        .map_err(|error| broken(&error))?;
    let (sender, connection) = client::handshake(stream)
        .await
        .map_err(|error| broken(&error))?;
    let driver = tokio::spawn(connection);
    let mut sender = sender.ready().await.map_err(|error| broken(&error))?;
    let mut request = http::Request::builder()
        .method("POST")
        .uri(format!("http://localhost/{method}"));
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    let request = request
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let (response, mut body) = sender
        .send_request(request, false)
        .map_err(|error| broken(&error))?;
    let mut frame = vec![0];
    frame.extend_from_slice(&(message.len() as u32).to_be_bytes());
    frame.extend_from_slice(&message);
    body.send_data(frame.into(), true)
        .map_err(|error| broken(&error))?;
    let response = response.await.map_err(|error| broken(&error))?;
    let (parts, mut answer) = response.into_parts();
    let mut bytes = Vec::new();
    while let Some(data) = answer.data().await {
        let data = data.map_err(|error| broken(&error))?;
        let _ = answer.flow_control().release_capacity(data.len());
        bytes.extend_from_slice(&data);
    }
    let trailers = answer.trailers().await.map_err(|error| broken(&error))?;
    // A failure comes in the headers alone.
    let fields = trailers.unwrap_or(parts.headers);
    let field = |name: &str| {
        let value = fields.get(name).map(|value| value.as_bytes().to_vec());
        value.map(|value| String::from_utf8_lossy(&value).into_owned())
    };
    let status = field("grpc-status").ok_or("no status came")?;
    driver.abort();
    Ok((
        status.parse().unwrap(),
        percent_decoded(&field("grpc-message").unwrap_or_default()),
        bytes,
    ))
}

fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%')
            .then(|| text.get(at + 1..at + 3))
            .flatten();
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
