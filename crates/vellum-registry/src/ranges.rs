//! Parts of blobs: what lazy layers are made of. docs/lazy.md.

use std::future::Future;
use std::ops::{Deref, Range};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use parking_lot::Mutex;
use reqwest::header::RANGE;
use reqwest::{Response, StatusCode, Url};
use vellum_base::error::{Error, ErrorKind, Result};

use super::blobs::begins_at;
use super::client::{Lane, Repository};
use super::failure::Failure;
use super::hedge::Pace;
use super::hosts::Capabilities;
use super::reference::Reference;
use super::retry::Moved;
use super::session::{Access, Session};
use super::source::{Seen, Source};

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

/// Parts of the blobs of one repository, from its registry or a mirror. Threads may ask at once; whoever does waits.
#[derive(Debug)]
pub struct Ranges {
    session: Session,
    source: Source,
}

/// Bytes that came.
#[derive(Debug)]
pub struct Part {
    bytes: Vec<u8>,
    /// The host, where there may be several.
    from: Option<Url>,
}

impl From<Vec<u8>> for Part {
    fn from(bytes: Vec<u8>) -> Self {
        Part { bytes, from: None }
    }
}

impl Deref for Part {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Ranges {
    /// Gets ready to ask the repository of a reference. Nothing is sent yet. What requests show of hosts is kept in `seen`.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub fn open(reference: &Reference, access: Access, seen: &Arc<Seen>) -> Result<Self> {
        let session = Session::open(reference, access)?.sharing(seen);
        let source = session.to_pull();
        Ok(Ranges { session, source })
    }

    /// Those bytes of a blob, exactly as many, of which nothing is checked but their number. Each host is tried once; where
    /// nothing moves for long, the next one too, or the same by another connection.
    ///
    /// # Errors
    /// What the hosts say, and whether it is worth another try.
    pub fn get(&self, digest: &str, range: Range<u64>) -> Result<Part, Failure> {
        let hedged = hedged(&self.source, digest, range);
        self.session.runtime().block_on(hedged)
    }

    /// Bytes of a blob are not what they should be: another host is asked first for a while, if there is one.
    pub fn distrust(&self, digest: &str, part: &Part, why: &Failure) {
        let hosts = self.source.order(digest, |_| true);
        for host in hosts
            .into_iter()
            .filter(|host| Some(host.http.base()) == part.from.as_ref())
        {
            host.redirects.forget(digest);
            self.source.seen.failed(host, digest, why);
        }
    }

    /// Hands out the bytes of a blob from the first of `range` on as they come, in one request, until `each` wants no
    /// more. The range ends where the blob does. Nothing is checked but that number. Tries each host until something has
    /// come. Other threads do not ask meanwhile.
    ///
    /// # Errors
    /// As [`Ranges::get`]; those of `each`.
    pub fn stream(
        &self,
        digest: &str,
        range: Range<u64>,
        mut each: impl FnMut(&[u8]) -> Result<Flow, Failure>,
    ) -> Result<(), Failure> {
        let streamed = self.source.first(digest, can_pull, async |repository| {
            let mut came = false;
            let each = |bytes: &[u8]| {
                came = true;
                each(bytes)
            };
            let streamed = stream(repository, digest, range.clone(), each).await;
            match streamed {
                // Whoever asked goes on behind what came.
                Err(failure) if came => {
                    self.source.seen.failed(repository, digest, &failure);
                    Ok(Err(failure))
                }
                other => other.map(Ok),
            }
        });
        self.session.runtime().block_on(streamed)?
    }
}

fn can_pull(able: &Capabilities) -> bool {
    able.pull
}

/// How a request goes on.
struct Progress {
    pace: Pace,
    /// The host that is asked.
    at: Mutex<Option<Url>>,
}

impl Progress {
    fn new() -> Self {
        Progress {
            pace: Pace::new(),
            at: Mutex::new(None),
        }
    }
}

/// As [`Ranges::get`], without second requests.
pub(crate) async fn from_first(
    source: &Source,
    digest: &str,
    range: Range<u64>,
) -> Result<Part, Failure> {
    from_each(source, digest, range, &Progress::new()).await
}

async fn from_each(
    source: &Source,
    digest: &str,
    range: Range<u64>,
    progress: &Progress,
) -> Result<Part, Failure> {
    let attempt = async |repository: &Repository| {
        *progress.at.lock() = Some(repository.http.base().clone());
        attempt(
            repository,
            Lane::Usual,
            digest,
            range.clone(),
            &progress.pace,
        )
        .await
    };
    source.first(digest, can_pull, attempt).await
}

/// As [`Ranges::get`].
async fn hedged(source: &Source, digest: &str, range: Range<u64>) -> Result<Part, Failure> {
    let hedging = &source.seen.hedging;
    let progress = Progress::new();
    let patience = hedging.begin();
    let first = pin!(from_each(source, digest, range.clone(), &progress));
    let silence = pin!(progress.pace.stands_still_for(patience));
    let first = match select(first, silence).await {
        Either::Left((answer, _)) => {
            hedging.done(progress.pace.longest());
            return answer;
        }
        Either::Right(((), first)) => first,
    };
    let at = progress.at.lock().clone();
    let other = other(source, digest, at.as_ref()).filter(|_| hedging.may_ask_again());
    let Some((repository, lane)) = other else {
        let answer = first.await;
        hedging.done(progress.pace.longest());
        return answer;
    };
    tracing::info!(
        "nothing of the blob {digest} has moved for {patience:?}: {} is asked besides",
        repository.http.host
    );
    let pace = Pace::new();
    let second = pin!(attempt(repository, lane, digest, range, &pace));
    let answer = match select(first, second).await {
        Either::Left((Err(failure), second)) => second.await.map_err(|other| {
            source.seen.failed(repository, digest, &other);
            failure
        }),
        Either::Left((answer, _)) => answer,
        Either::Right((Ok(part), _)) => {
            hedging.won();
            Ok(part)
        }
        Either::Right((Err(failure), first)) => {
            source.seen.failed(repository, digest, &failure);
            first.await
        }
    };
    hedging.done(progress.pace.longest());
    answer
}

/// Whom to ask besides, and how: the next host that has not failed lately, or the same by other connections.
fn other<'a>(source: &'a Source, digest: &str, at: Option<&Url>) -> Option<(&'a Repository, Lane)> {
    let hosts = source.order(digest, can_pull);
    let is_at = |host: &&&Repository| Some(host.http.base()) == at;
    let mut well = hosts.iter().filter(|host| !source.seen.rests(host, digest));
    if let Some(another) = well.find(|host| !is_at(host)) {
        return Some((another, Lane::Usual));
    }
    let same = hosts.iter().find(is_at)?;
    Some((same, Lane::Second))
}

/// Asks for what follows `from` in a blob, up to the byte `last` where one is named.
async fn ask(
    repository: &Repository,
    lane: Lane,
    doing: &str,
    digest: &str,
    (from, last): (u64, Option<u64>),
) -> Result<Response, Failure> {
    let host = &repository.http.host;
    let get = |url: &Url| {
        let request = repository.http.client.get(url.clone());
        match (from, last) {
            (0, None) => request,
            (from, None) => request.header(RANGE, format!("bytes={from}-")),
            (from, Some(last)) => request.header(RANGE, format!("bytes={from}-{last}")),
        }
    };
    let is_it = |response: &Response| match response.status() {
        StatusCode::PARTIAL_CONTENT => begins_at(response, from),
        StatusCode::OK => (from, last) == (0, None),
        _ => false,
    };
    let moved = Moved::none();
    if let Some(url) = repository.redirects.get(digest) {
        let asked = repository.ask_by(lane, doing, &moved, || get(&url));
        let response = patiently(doing, asked).await.and_then(|answer| answer);
        if let Ok(response) = response
            && is_it(&response)
        {
            return Ok(response);
        }
        // Whatever it said: the registry knows better.
        repository.redirects.forget(digest);
    }
    let url = repository.url(&format!("blobs/{digest}"))?;
    let asked = repository.ask_by(lane, doing, &moved, || get(&url));
    let response = patiently(doing, asked).await??;
    if is_it(&response) {
        if !repository.http.is_own(response.url()) {
            repository.redirects.keep(digest, response.url());
        }
        return Ok(response);
    }
    match response.status() {
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
        _ => Err(repository.refused(doing, response).await),
    }
}

/// As [`Ranges::get`], of one host.
async fn attempt(
    repository: &Repository,
    lane: Lane,
    digest: &str,
    range: Range<u64>,
    pace: &Pace,
) -> Result<Part, Failure> {
    let host = &repository.http.host;
    let (from, last) = (range.start, range.end.saturating_sub(1));
    let doing = format!("fetching bytes {from} to {last} of the blob {digest} from {host}");
    let response = ask(repository, lane, &doing, digest, (from, Some(last))).await?;
    pace.moved();
    let bytes = body(host, &doing, response, range, pace).await;
    let bytes = bytes.inspect_err(|_| repository.redirects.forget(digest))?;
    Ok(Part {
        bytes,
        from: Some(repository.http.base().clone()),
    })
}

/// The bytes of an answer, exactly as many as were asked for.
async fn body(
    host: &str,
    doing: &str,
    mut response: Response,
    range: Range<u64>,
    pace: &Pace,
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
        pace.moved();
    }
    match bytes.len() == len {
        true => Ok(bytes),
        false => Err(cut(bytes.len())),
    }
}

/// As [`Ranges::stream`], of one host.
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
    let mut response = ask(repository, Lane::Usual, &doing, digest, (range.start, None)).await?;
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
