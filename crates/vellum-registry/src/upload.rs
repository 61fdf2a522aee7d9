//! Blobs and documents, sent: the distribution specification 1.1, "Push".

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::stream;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use reqwest::{Body, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::Mutex;
use vellum_base::error::{Error, ErrorKind, Result};

use super::client::{Repository, header};
use super::document::Document;
use super::failure::Failure;
use super::retry::{Moved, retried};
use super::session::{Outcome, Upload};

/// Bytes of a file that are sent at a time.
const PIECE: usize = 128 << 10;
/// What a registry may say of another repository that is gone or not ours: the hint that led there was old.
const NO_MOUNT: [StatusCode; 4] = [
    StatusCode::BAD_REQUEST,
    StatusCode::FORBIDDEN,
    StatusCode::NOT_FOUND,
    StatusCode::METHOD_NOT_ALLOWED,
];

/// Has the registry have a blob. `moved` counts its bytes.
pub(crate) async fn upload(
    repository: &Repository,
    blob: &Upload,
    moved: &Arc<AtomicU64>,
) -> Result<Outcome, Failure> {
    if is_there(repository, blob).await? {
        moved.fetch_add(blob.size, Ordering::Relaxed);
        return Ok(Outcome::Existed);
    }
    let begun = match begin(repository, blob).await? {
        Begun::Mounted => {
            moved.fetch_add(blob.size, Ordering::Relaxed);
            return Ok(Outcome::Mounted);
        }
        Begun::At(place) => place,
    };
    let place = Mutex::new(Some(begun));
    retried(repository.tries, || async {
        let mut place = place.lock().await;
        send(repository, blob, &mut place, moved).await
    })
    .await?;
    Ok(Outcome::Sent)
}

/// Whether the registry has a blob.
async fn is_there(repository: &Repository, blob: &Upload) -> Result<bool, Failure> {
    let digest = &blob.digest;
    let doing = format!("asking {} for the blob {digest}", repository.http.host);
    let url = repository.url(&format!("blobs/{digest}"))?;
    let build = || repository.http.client.head(url.clone());
    let there = repository
        .ask_again(&doing, &[StatusCode::NOT_FOUND], build)
        .await?;
    Ok(there.status().is_success())
}

/// How an upload begins.
enum Begun {
    /// It is done: another repository had the blob.
    Mounted,
    /// The bytes go there.
    At(Url),
}

async fn begin(repository: &Repository, blob: &Upload) -> Result<Begun, Failure> {
    if let Some(from) = &blob.from {
        let (doing, response) = ask_to_begin(repository, blob, Some(from), &NO_MOUNT).await?;
        match response.status() {
            StatusCode::CREATED => return Ok(Begun::Mounted),
            status if status.is_success() => {
                return Ok(Begun::At(location(repository, &doing, &response)?));
            }
            status => tracing::info!("{status}: nothing is mounted from {from}"),
        }
    }
    let (doing, response) = ask_to_begin(repository, blob, None, &[]).await?;
    Ok(Begun::At(location(repository, &doing, &response)?))
}

/// Asks for an upload to begin. Returns what was done too, for messages.
async fn ask_to_begin(
    repository: &Repository,
    blob: &Upload,
    from: Option<&str>,
    others: &[StatusCode],
) -> Result<(String, Response), Failure> {
    let host = &repository.http.host;
    let digest = &blob.digest;
    let doing = format!("beginning to send the blob {digest} to {host}");
    let mut url = repository.url("blobs/uploads/")?;
    if let Some(from) = from {
        url.query_pairs_mut()
            .extend_pairs([("mount", digest.as_str()), ("from", from)]);
    }
    let build = || {
        repository
            .http
            .client
            .post(url.clone())
            .header(CONTENT_LENGTH, 0)
    };
    let response = repository.ask_again(&doing, others, build).await?;
    Ok((doing, response))
}

/// Where the registry wants the next part.
fn location(repository: &Repository, doing: &str, response: &Response) -> Result<Url> {
    let named = header(response.headers(), LOCATION.as_str());
    let url = named.and_then(|named| response.url().join(named).ok());
    let url = url.ok_or_else(|| {
        let host = &repository.http.host;
        let text = format!("{doing}: {host} does not say where the bytes go");
        Error::new(ErrorKind::Protocol, text)
    })?;
    repository.http.secure(url)
}

/// Sends a blob, and what the registry lacks of it where that fails in a way that passes.
async fn send(
    repository: &Repository,
    blob: &Upload,
    place: &mut Option<Url>,
    moved: &Arc<AtomicU64>,
) -> Result<(), Failure> {
    let host = &repository.http.host;
    let doing = format!("sending the blob {} to {host}", blob.digest);
    let at = match place.take() {
        Some(fresh) => fresh,
        // A registry that took too long to say so may have all of it.
        None if is_there(repository, blob).await? => {
            moved.fetch_add(blob.size, Ordering::Relaxed);
            return Ok(());
        }
        None => match begin(repository, blob).await? {
            Begun::Mounted => return Ok(()),
            Begun::At(at) => at,
        },
    };
    let sent = send_from(repository, blob, &doing, at.clone(), 0, moved).await;
    let Err(failure) = sent else { return Ok(()) };
    if !failure.passes {
        return Err(failure);
    }
    // A registry that does not say how far it came gets it from the start, by the next attempt.
    match progress(repository, &at, blob.size).await {
        Some((next, have)) if have > 0 => {
            tracing::warn!("{}; going on after {have} bytes", failure.error);
            let rest = send_from(repository, blob, &doing, next, have, moved).await;
            // What does not go on may still go well from the start.
            rest.map_err(|failure| Failure {
                passes: true,
                ..failure
            })
        }
        _ => Err(failure),
    }
}

/// Where an upload goes on, and how many bytes the registry has.
async fn progress(repository: &Repository, at: &Url, size: u64) -> Option<(Url, u64)> {
    let build = || repository.http.client.get(at.clone());
    let doing = "asking how far an upload came";
    let asked = repository.ask(doing, &Moved::none(), build).await;
    let response = asked.ok()?;
    if !response.status().is_success() {
        return None;
    }
    let range = header(response.headers(), RANGE.as_str())?;
    let last: u64 = range
        .trim_start_matches("bytes=")
        .strip_prefix("0-")?
        .parse()
        .ok()?;
    // `0-0` is what some say of nothing.
    let have = last
        .checked_add(1)
        .filter(|have| *have > 1 && *have <= size)?;
    Some((
        location(repository, doing, &response).unwrap_or_else(|_| at.clone()),
        have,
    ))
}

/// Sends the bytes from an offset on, before which the registry has them: at first all of them in the request that
/// closes the upload, later the rest as a part of it.
async fn send_from(
    repository: &Repository,
    blob: &Upload,
    doing: &str,
    mut at: Url,
    from: u64,
    moved: &Arc<AtomicU64>,
) -> Result<(), Failure> {
    let client = &repository.http.client;
    if from > 0 && from < blob.size {
        let range = format!("{from}-{}", blob.size - 1);
        let patch = |own: &Arc<AtomicU64>| {
            let request = client.patch(at.clone()).header(CONTENT_RANGE, &range);
            with_body(request, blob, from, own, moved)
        };
        let response = transfer(repository, doing, moved, blob.size - from, patch).await?;
        at = location(repository, doing, &response)?;
    }
    at.query_pairs_mut().append_pair("digest", &blob.digest);
    let put = |own: &Arc<AtomicU64>| match from {
        0 => with_body(client.put(at.clone()), blob, 0, own, moved),
        _ => client.put(at.clone()).header(CONTENT_LENGTH, 0),
    };
    let len = if from == 0 { blob.size } else { 0 };
    transfer(repository, doing, moved, len, put).await.map(drop)
}

/// Makes one request with `len` bytes of a blob. What a failed one has sent does not count.
async fn transfer(
    repository: &Repository,
    doing: &str,
    moved: &AtomicU64,
    len: u64,
    build: impl Fn(&Arc<AtomicU64>) -> RequestBuilder,
) -> Result<Response, Failure> {
    let own = Moved::sending(len);
    let asked = repository.ask(doing, &own, || build(own.counter())).await;
    let failed = match asked {
        Ok(response) if response.status().is_success() => return Ok(response),
        Ok(response) => Failure::refused(&repository.http.host, doing, response).await,
        Err(failure) => failure,
    };
    moved.fetch_sub(own.get(), Ordering::Relaxed);
    Err(failed)
}

/// Gives a request the bytes of a blob from an offset on. They are read as they go, and counted twice: for this
/// request and for all.
fn with_body(
    request: RequestBuilder,
    blob: &Upload,
    from: u64,
    own: &Arc<AtomicU64>,
    moved: &Arc<AtomicU64>,
) -> RequestBuilder {
    let (path, own, moved) = (blob.path.clone(), own.clone(), moved.clone());
    let pieces = stream::try_unfold(None, move |file| {
        let next = next_piece(file, &path, from);
        if let Ok(Some((piece, _))) = &next {
            own.fetch_add(piece.len() as u64, Ordering::Relaxed);
            moved.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        std::future::ready(next)
    });
    request
        .header(CONTENT_TYPE, "application/octet-stream")
        .header(CONTENT_LENGTH, blob.size - from)
        .body(Body::wrap_stream(pieces))
}

fn next_piece(
    file: Option<File>,
    path: &Path,
    from: u64,
) -> io::Result<Option<(Vec<u8>, Option<File>)>> {
    let mut file = match file {
        Some(file) => file,
        None => {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(from))?;
            file
        }
    };
    let mut piece = Vec::with_capacity(PIECE);
    (&mut file).take(PIECE as u64).read_to_end(&mut piece)?;
    Ok((!piece.is_empty()).then_some((piece, Some(file))))
}

/// Has the registry have a manifest or index, under its digest or a tag.
pub(crate) async fn put_document(
    repository: &Repository,
    document: &Document,
    identifier: &str,
) -> Result<(), Failure> {
    let host = &repository.http.host;
    let name = &repository.repository;
    let doing = format!("giving {name} {identifier} to {host}");
    let url = repository.url(&format!("manifests/{identifier}"))?;
    let build = || {
        let request = repository.http.client.put(url.clone());
        let request = request.header(CONTENT_TYPE, &document.media_type);
        request.body(document.bytes.clone())
    };
    repository.ask_again(&doing, &[], build).await.map(drop)
}
