//! Documents and blobs, fetched and checked.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use reqwest::header::{ACCEPT, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use reqwest::{Response, StatusCode, Url};
use tokio::sync::Mutex;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_image::Hasher;

use super::client::{Repository, header};
use super::document::{ACCEPTED, Descriptor, Document};
use super::failure::Failure;
use super::hosts::Capabilities;
use super::retry::{Moved, retried, unless_stalled};
use super::source::Source;

/// The manifest or index of a tag or digest, of the first host that has it. What is asked for by its digest has it, and
/// what comes by a tag has the digest that it is given here.
///
/// # Errors
/// [`ErrorKind::NotFound`] where the registry has none.
pub(crate) async fn document(source: &Source, identifier: &str) -> Result<Document, Failure> {
    let by_digest = identifier.contains(':');
    let able: fn(&Capabilities) -> bool = match by_digest {
        true => |able| able.pull,
        false => |able| able.pull && able.resolve,
    };
    let first = || async {
        let attempt = async |repository: &Repository| document_of(repository, identifier).await;
        let found = source.first(identifier, able, attempt).await;
        found.map_err(|failure| Failure {
            // What the registry itself does not have, mirrors need not be waited for.
            passes: failure.passes && failure.error.kind() != ErrorKind::NotFound,
            ..failure
        })
    };
    retried(source.tries, first).await
}

async fn document_of(repository: &Repository, identifier: &str) -> Result<Document, Failure> {
    let host = &repository.http.host;
    let name = &repository.repository;
    let doing = format!("asking {host} for {name} {identifier}");
    let url = repository.url(&format!("manifests/{identifier}"))?;
    let accept = ACCEPTED.join(", ");
    let client = &repository.http.client;
    let build = || client.get(url.clone()).header(ACCEPT, &accept);
    let response = repository.ask_once(&doing, &[], build).await?;
    let media_type = header(response.headers(), CONTENT_TYPE.as_str());
    let media_type = media_type.and_then(|kind| kind.split(';').next());
    let media_type = media_type.unwrap_or("").trim().to_owned();
    let bytes = repository.http.body(&doing, response).await?;
    let by_digest = identifier.contains(':');
    let mut hasher = match by_digest {
        true => Hasher::like(identifier)?,
        false => Hasher::sha256(),
    };
    hasher.update(&bytes);
    let digest = hasher.finish();
    if by_digest && digest != identifier {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("{host} answers with {digest} when it is asked for {identifier} of {name}: it is damaged there"),
        )
        .into());
    }
    Ok(Document {
        media_type,
        digest,
        bytes,
    })
}

/// What has come of a blob.
pub(crate) struct Part {
    pub file: File,
    pub hasher: Hasher,
    /// In bytes.
    pub len: u64,
    /// The hosts that it came from.
    from: BTreeSet<Url>,
    /// What one host has begun, no other one goes on with.
    of_one: bool,
}

impl Part {
    /// Nothing yet, of a blob that is to be that new file.
    pub fn new(path: &Path, digest: &str) -> Result<Self> {
        Ok(Part {
            file: File::create_new(path).context(|| format!("cannot make {}", path.display()))?,
            hasher: Hasher::like(digest)?,
            len: 0,
            from: BTreeSet::new(),
            of_one: false,
        })
    }

    /// Adds what came next of the blob.
    pub fn take(&mut self, digest: &str, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .context(|| format!("writing the blob {digest}"))?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Forgets what has come.
    fn restart(&mut self, digest: &str, moved: &AtomicU64) -> Result<()> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .context(|| format!("beginning the blob {digest} anew"))?;
        self.hasher = Hasher::like(digest)?;
        moved.fetch_sub(self.len, Ordering::Relaxed);
        self.len = 0;
        self.from.clear();
        Ok(())
    }
}

/// Fetches a blob into a new file. When it is done, its length and digest are right. `moved` counts its bytes. What one host
/// does not give, or gives with another digest, the next one is asked for.
pub(crate) async fn download(
    source: &Source,
    blob: &Descriptor,
    path: &Path,
    moved: &AtomicU64,
) -> Result<(), Failure> {
    let digest = &blob.digest;
    let part = Mutex::new(Part::new(path, digest)?);
    let go_on = || async {
        let mut part = part.lock().await;
        let attempt = async |repository: &Repository| {
            fetch(repository, blob, &mut part, moved).await?;
            finish(repository, blob, &mut part, moved)
        };
        source.first(digest, |able| able.pull, attempt).await
    };
    retried(source.tries, go_on).await
}

/// Makes sure that what came is the blob.
fn finish(
    repository: &Repository,
    blob: &Descriptor,
    part: &mut Part,
    moved: &AtomicU64,
) -> Result<(), Failure> {
    let digest = &blob.digest;
    let hasher = std::mem::replace(&mut part.hasher, Hasher::like(digest)?);
    let actual = hasher.finish();
    if actual == *digest {
        return Ok(());
    }
    let mixed = part.from.len() > 1;
    part.restart(digest, moved)?;
    part.of_one |= mixed;
    let failure = damaged(
        repository,
        digest,
        &format!("its bytes have the digest {actual}"),
    );
    Err(Failure {
        // Nobody knows whose bytes were wrong.
        passes: mixed,
        ..failure
    })
}

fn damaged(repository: &Repository, digest: &str, why: &str) -> Failure {
    let (host, name) = (&repository.http.host, &repository.repository);
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "the blob {digest} of {name} in {host} is damaged: {why}. Nothing of it is used; have it pushed again \
             after it was removed there, or try another copy of the image"
        ),
    )
    .into()
}

/// Goes on with a blob to its end.
async fn fetch(
    repository: &Repository,
    blob: &Descriptor,
    part: &mut Part,
    moved: &AtomicU64,
) -> Result<(), Failure> {
    let digest = &blob.digest;
    let host = &repository.http.host;
    let doing = format!("fetching the blob {digest} from {host}");
    if part.of_one && !part.from.contains(repository.http.base()) {
        part.restart(digest, moved)?;
    }
    if part.len == blob.size && blob.size > 0 {
        return Ok(());
    }
    let url = repository.url(&format!("blobs/{digest}"))?;
    let from = part.len;
    let build = || {
        let request = repository.http.client.get(url.clone());
        match from {
            0 => request,
            from => request.header(RANGE, format!("bytes={from}-")),
        }
    };
    let own = Moved::none();
    let response = repository.ask(&doing, &own, build).await?;
    match response.status() {
        StatusCode::OK => part.restart(digest, moved)?,
        StatusCode::PARTIAL_CONTENT if begins_at(&response, from) => {}
        StatusCode::RANGE_NOT_SATISFIABLE => {
            let why = format!("there are {from} bytes of {}", blob.size);
            part.restart(digest, moved)?;
            return Err(damaged(repository, digest, &why));
        }
        _ => return Err(Failure::refused(host, &doing, response).await),
    }
    part.from.insert(repository.http.base().clone());
    let received = receive(repository, blob, part, response, (&own, moved));
    unless_stalled(&doing, &own, received).await
}

/// Whether an answer begins at that byte of a blob.
pub(crate) fn begins_at(response: &Response, from: u64) -> bool {
    let range = header(response.headers(), CONTENT_RANGE.as_str());
    range.is_some_and(|range| range.starts_with(&format!("bytes {from}-")))
}

async fn receive(
    repository: &Repository,
    blob: &Descriptor,
    part: &mut Part,
    mut response: Response,
    (own, moved): (&Moved, &AtomicU64),
) -> Result<(), Failure> {
    let host = &repository.http.host;
    let digest = &blob.digest;
    let doing = format!("fetching the blob {digest} from {host}");
    loop {
        let chunk = response.chunk().await;
        let chunk = chunk.map_err(|error| Failure::unanswered(host, &doing, &error))?;
        let Some(chunk) = chunk else { break };
        let len = chunk.len() as u64;
        if part.len + len > blob.size {
            let why = format!("there are more than {} bytes", blob.size);
            part.restart(digest, moved)?;
            return Err(damaged(repository, digest, &why));
        }
        part.take(digest, &chunk)?;
        own.counter().fetch_add(len, Ordering::Relaxed);
        moved.fetch_add(len, Ordering::Relaxed);
    }
    if part.len < blob.size {
        let text = format!(
            "{doing}: it is cut off after {} of {} bytes",
            part.len, blob.size
        );
        return Err(Failure::passing(Error::new(ErrorKind::Corrupt, text)));
    }
    Ok(())
}
