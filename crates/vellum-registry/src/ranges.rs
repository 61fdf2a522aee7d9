//! Parts of blobs: what lazy layers are made of. docs/lazy.md.

use std::future::Future;
use std::ops::Range;
use std::time::Duration;

use reqwest::header::RANGE;
use reqwest::{Response, StatusCode};
use vellum_base::error::{Error, ErrorKind, Result};

use super::blobs::begins_at;
use super::client::Repository;
use super::failure::Failure;
use super::reference::Reference;
use super::retry::Moved;
use super::session::{Access, Session};

/// How long a registry may take to begin with an answer, and how long that may stand still.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether a blob that comes is wanted further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// More of it.
    Go,
    /// That was enough.
    Stop,
}

/// Parts of the blobs of one repository. Threads may ask at once; whoever does waits.
#[derive(Debug)]
pub struct Ranges {
    session: Session,
    repository: Repository,
}

impl Ranges {
    /// Gets ready to ask the repository of a reference. Nothing is sent yet.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub fn open(reference: &Reference, access: Access) -> Result<Self> {
        let session = Session::open(reference, access)?;
        let repository = session.to_pull();
        Ok(Ranges {
            session,
            repository,
        })
    }

    /// Those bytes of a blob, exactly as many, of which nothing is checked but their number. Tries once.
    ///
    /// # Errors
    /// What the registry says, and whether it is worth another try.
    pub fn get(&self, digest: &str, range: Range<u64>) -> Result<Vec<u8>, Failure> {
        let attempt = attempt(&self.repository, digest, range);
        self.session.runtime().block_on(attempt)
    }

    /// Hands out the bytes of a blob from the first of `range` on as they come, in one request, until `each` wants no
    /// more. The range ends where the blob does. Nothing is checked but that number. Tries once. Other threads do not ask
    /// meanwhile.
    ///
    /// # Errors
    /// As [`Ranges::get`]; those of `each`.
    pub fn stream(
        &self,
        digest: &str,
        range: Range<u64>,
        each: impl FnMut(&[u8]) -> Result<Flow, Failure>,
    ) -> Result<(), Failure> {
        let streamed = stream(&self.repository, digest, range, each);
        self.session.runtime().block_on(streamed)
    }
}

/// Asks for what follows `from` in a blob, up to the byte `last` where one is named.
async fn ask(
    repository: &Repository,
    doing: &str,
    digest: &str,
    (from, last): (u64, Option<u64>),
) -> Result<Response, Failure> {
    let host = &repository.http.host;
    let url = repository.url(&format!("blobs/{digest}"))?;
    let build = || {
        let request = repository.http.client.get(url.clone());
        match (from, last) {
            (0, None) => request,
            (from, None) => request.header(RANGE, format!("bytes={from}-")),
            (from, Some(last)) => request.header(RANGE, format!("bytes={from}-{last}")),
        }
    };
    let moved = Moved::none();
    let asked = repository.ask(doing, &moved, build);
    let response = patiently(doing, asked).await??;
    match response.status() {
        StatusCode::PARTIAL_CONTENT if begins_at(&response, from) => Ok(response),
        StatusCode::OK if (from, last) == (0, None) => Ok(response),
        StatusCode::PARTIAL_CONTENT | StatusCode::OK => {
            let text = format!(
                "{doing}: it sends other bytes than those: such a registry cannot be pulled from lazily, \
                 `vellum pull` fetches the image whole"
            );
            // It may be a cache on the way, which had not all of it.
            Err(Failure::passing(Error::new(ErrorKind::Unsupported, text)))
        }
        // The address that it sent us to was good for a while only.
        StatusCode::FORBIDDEN if !repository.http.is_own(response.url()) => {
            let failure = Failure::refused(host, doing, response).await;
            Err(Failure::passing(failure.error))
        }
        _ => Err(Failure::refused(host, doing, response).await),
    }
}

/// As [`Ranges::get`].
pub(crate) async fn attempt(
    repository: &Repository,
    digest: &str,
    range: Range<u64>,
) -> Result<Vec<u8>, Failure> {
    let host = &repository.http.host;
    let (from, last) = (range.start, range.end.saturating_sub(1));
    let doing = format!("fetching bytes {from} to {last} of the blob {digest} from {host}");
    let response = ask(repository, &doing, digest, (from, Some(last))).await?;
    body(host, &doing, response, range).await
}

/// The bytes of an answer, exactly as many as were asked for.
async fn body(
    host: &str,
    doing: &str,
    mut response: Response,
    range: Range<u64>,
) -> Result<Vec<u8>, Failure> {
    let len = (range.end - range.start) as usize;
    let cut = |there: usize| {
        let text = format!("{doing}: {there} bytes came instead of {len}");
        Failure::passing(Error::new(ErrorKind::Corrupt, text))
    };
    let mut bytes = Vec::with_capacity(len);
    loop {
        let chunk = patiently(doing, response.chunk()).await?;
        let chunk = chunk.map_err(|error| Failure::unanswered(host, doing, &error))?;
        let Some(chunk) = chunk else { break };
        if bytes.len() + chunk.len() > len {
            return Err(cut(bytes.len() + chunk.len()));
        }
        bytes.extend_from_slice(&chunk);
    }
    match bytes.len() == len {
        true => Ok(bytes),
        false => Err(cut(bytes.len())),
    }
}

/// As [`Ranges::stream`].
async fn stream(
    repository: &Repository,
    digest: &str,
    range: Range<u64>,
    mut each: impl FnMut(&[u8]) -> Result<Flow, Failure>,
) -> Result<(), Failure> {
    let host = &repository.http.host;
    let doing = format!(
        "fetching the blob {digest} from its byte {} from {host}",
        range.start
    );
    let mut response = ask(repository, &doing, digest, (range.start, None)).await?;
    let mut left = range.end.saturating_sub(range.start);
    loop {
        let chunk = patiently(&doing, response.chunk()).await?;
        let chunk = chunk.map_err(|error| Failure::unanswered(host, &doing, &error))?;
        let Some(chunk) = chunk else { break };
        let Some(rest) = left.checked_sub(chunk.len() as u64) else {
            let text = format!("{doing}: there are more than {} bytes", range.end);
            return Err(Error::new(ErrorKind::Corrupt, text).into());
        };
        left = rest;
        if each(&chunk)? == Flow::Stop {
            return Ok(());
        }
    }
    match left {
        0 => Ok(()),
        left => {
            let text = format!("{doing}: it is cut off, {left} bytes before its end");
            Err(Failure::passing(Error::new(ErrorKind::Corrupt, text)))
        }
    }
}

/// Waits for something that should come soon.
pub(crate) async fn patiently<T>(doing: &str, work: impl Future<Output = T>) -> Result<T, Failure> {
    tokio::time::timeout(PATIENCE, work).await.map_err(|_| {
        let seconds = PATIENCE.as_secs();
        let text = format!("{doing}: nothing has moved for {seconds} seconds");
        Failure::passing(Error::new(ErrorKind::Timeout, text))
    })
}
