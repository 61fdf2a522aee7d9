//! Kubernetes' image service (CRI), handed on to containerd as it comes: of a pull it is read with which secret, of
//! everything else nothing. docs/containerd.md, "Pull secrets".
//!
//! What is handed on are HTTP/2 requests and answers, whose messages are bytes here. So methods and fields that are newer
//! than this are the business of those who know them.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::http::request::Parts;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response, Uri, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::Mutex;
use tonic::{Code, Status};

use super::authority::Connection;
use super::cri::{Removal, Wanted, answered, is_pull, is_removal};
use super::pull_secrets::PullSecrets;
use vellum_base::error::{Error, Result};

/// The longest message that is read here, as containerd's own.
const MAX_MESSAGE: usize = 16 << 20;
/// What a gRPC server says in its trailers, or in its head where there is nothing else.
const STATUS: &str = "grpc-status";

type Bytewise = UnsyncBoxBody<Bytes, hyper::Error>;
type Answer = Response<Bytewise>;

/// Serves the image service, until it is dropped. Calls under way break off then.
#[derive(Debug)]
pub struct ImageService {
    runtime: Option<Runtime>,
}

/// What hands calls on.
#[derive(Debug)]
struct Proxy {
    /// containerd's socket.
    upstream: PathBuf,
    /// The connection to it, made anew where it broke.
    connection: Mutex<Option<SendRequest<Bytewise>>>,
    secrets: Arc<PullSecrets>,
}

impl ImageService {
    /// Serves on `listener` what containerd serves on its socket `upstream`, which need not be there yet, and keeps what
    /// pulls bring in `secrets`.
    ///
    /// # Errors
    /// Where a thread or the listener fails.
    pub fn start(
        listener: std::os::unix::net::UnixListener,
        upstream: &Path,
        secrets: Arc<PullSecrets>,
    ) -> Result<Self> {
        let failed = |error| Error::io("the image service cannot be started", error);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("image service")
            .enable_all()
            .build()
            .map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let entered = runtime.enter();
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        drop(entered);
        let proxy = Arc::new(Proxy {
            upstream: upstream.to_owned(),
            connection: Mutex::default(),
            secrets,
        });
        runtime.spawn(accept(listener, proxy));
        Ok(ImageService {
            runtime: Some(runtime),
        })
    }
}

impl Drop for ImageService {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: UnixListener, proxy: Arc<Proxy>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve(stream, Arc::clone(&proxy)));
            }
            Err(error) => {
                tracing::warn!(%error, "the image service takes no connection for a moment");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

/// Serves one connection of the kubelet.
async fn serve(stream: UnixStream, proxy: Arc<Proxy>) {
    let service = service_fn(move |request| {
        let proxy = Arc::clone(&proxy);
        async move { Ok::<_, Infallible>(proxy.call(request).await) }
    });
    let stream = TokioIo::new(Connection::new(stream));
    let served = http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service);
    if let Err(error) = served.await {
        tracing::debug!(%error, "a connection to the image service broke");
    }
}

impl Proxy {
    async fn call(&self, request: Request<Incoming>) -> Answer {
        let path = request.uri().path();
        let done = if is_pull(path) {
            self.pull(request).await
        } else if is_removal(path) {
            self.remove(request).await
        } else {
            let (parts, body) = request.into_parts();
            self.forward(parts, body.boxed_unsync()).await
        };
        done.unwrap_or_else(|status| refusal(&status))
    }

    /// Hands a pull on, and keeps its secret if it goes well.
    async fn pull(&self, request: Request<Incoming>) -> Result<Answer, Status> {
        let (parts, message) = whole(request).await?;
        let Some(wanted) = Wanted::read(&message) else {
            tracing::warn!("a pull is handed on whose image and secret cannot be read here");
            return self.forward(parts, full(message)).await;
        };
        tracing::debug!(image = %wanted.image, secret = wanted.credential.is_some(), "is pulled");
        let pull = self.secrets.begin(wanted.image, wanted.credential);
        let answer = self.forward(parts, full(message)).await?;
        let (answer, message) = settled(answer).await?;
        if let Some(message) = message {
            pull.done(&answered(&message));
        }
        Ok(answer)
    }

    /// Hands the removal of an image on, and forgets its secret with it.
    async fn remove(&self, request: Request<Incoming>) -> Result<Answer, Status> {
        let (parts, message) = whole(request).await?;
        let removal = Removal::read(&message);
        let answer = self.forward(parts, full(message)).await?;
        let (answer, done) = settled(answer).await?;
        if let (Some(removal), Some(_)) = (removal, done) {
            self.secrets.removed(&removal.image);
        }
        Ok(answer)
    }

    /// containerd's answer.
    async fn forward(&self, mut parts: Parts, body: Bytewise) -> Result<Answer, Status> {
        // The name means nothing on a unix socket.
        let uri = Uri::builder().scheme("http").authority("localhost");
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let uri = uri.path_and_query(path).build();
        parts.uri = uri.map_err(|error| Status::invalid_argument(error.to_string()))?;
        parts.version = Version::HTTP_2;
        let mut connection = self.connection().await?;
        let answer = connection.send_request(Request::from_parts(parts, body));
        let answer = answer.await.map_err(|error| self.gone(&error))?;
        Ok(answer.map(|body| body.boxed_unsync()))
    }

    /// A connection to containerd that takes a request.
    async fn connection(&self) -> Result<SendRequest<Bytewise>, Status> {
        let mut held = self.connection.lock().await;
        if let Some(connection) = held.as_mut()
            && connection.ready().await.is_ok()
        {
            return Ok(connection.clone());
        }
        let stream = UnixStream::connect(&self.upstream).await;
        let stream = TokioIo::new(stream.map_err(|error| self.gone(&error))?);
        let made = handshake(TokioExecutor::new(), stream).await;
        let (connection, driven) = made.map_err(|error| self.gone(&error))?;
        tokio::spawn(async move {
            if let Err(error) = driven.await {
                tracing::debug!(%error, "the connection to containerd broke");
            }
        });
        *held = Some(connection.clone());
        Ok(connection)
    }

    fn gone(&self, error: &dyn std::error::Error) -> Status {
        let mut innermost = error;
        while let Some(source) = innermost.source() {
            innermost = source;
        }
        Status::unavailable(format!(
            "containerd does not answer at {}: {innermost}: its socket is named by `upstream` in the section [cri] of \
             /etc/vellum/config.toml",
            self.upstream.display()
        ))
    }
}

/// The whole message of a request, as it came.
async fn whole(request: Request<Incoming>) -> Result<(Parts, Bytes), Status> {
    let (parts, body) = request.into_parts();
    let read = Limited::new(body, MAX_MESSAGE).collect().await;
    let read = read.map_err(|error| {
        Status::resource_exhausted(format!(
            "the request does not come, or is longer than {MAX_MESSAGE} bytes: {error}"
        ))
    })?;
    Ok((parts, read.to_bytes()))
}

/// Waits for the end of an answer, and says what it was where it is a success.
async fn settled(answer: Answer) -> Result<(Answer, Option<Bytes>), Status> {
    let (parts, body) = answer.into_parts();
    let read = Limited::new(body, MAX_MESSAGE).collect().await;
    let read = read
        .map_err(|error| Status::unavailable(format!("containerd's answer broke off: {error}")))?;
    let trailers = read.trailers().cloned();
    let is_zero = |headers: &HeaderMap| headers.get(STATUS).is_some_and(|status| status == "0");
    let done = is_zero(trailers.as_ref().unwrap_or(&parts.headers));
    let message = read.to_bytes();
    let kept = done.then(|| message.clone());
    let body = with_trailers(message, trailers);
    Ok((Response::from_parts(parts, body), kept))
}

fn full(message: Bytes) -> Bytewise {
    with_trailers(message, None)
}

fn with_trailers(message: Bytes, trailers: Option<HeaderMap>) -> Bytewise {
    let body = match message.is_empty() && trailers.is_none() {
        // The head is all of it.
        true => return Empty::new().map_err(never).boxed_unsync(),
        false => Full::new(message),
    };
    let trailers = async move { trailers.map(Ok) };
    body.with_trailers(trailers).map_err(never).boxed_unsync()
}

fn never<E>(never: Infallible) -> E {
    match never {}
}

/// An answer of our own.
fn refusal(status: &Status) -> Answer {
    tracing::warn!(code = ?status.code(), "image service: {}", status.message());
    let mut answer = Response::new(Empty::new().map_err(never).boxed_unsync());
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    if status.add_header(headers).is_err() {
        let code = HeaderValue::from(Code::Unavailable as i32);
        headers.insert(STATUS, code);
    }
    answer
}
