//! One command's business with one registry.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::runtime::{Builder, Runtime};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_image::{Platform, Progress, blob_name};

use super::blobs;
use super::client::{Http, Repository};
use super::credentials::{self, Credential, Keychain};
use super::document::{Descriptor, Document};
use super::failure::Failure;
use super::find::{Documents, Found, find};
use super::hosts::{self, Place};
use super::ranges;
use super::reference::{Reference, is_local};
use super::retry::{Tries, retried};
use super::source::{Seen, Source};
use super::upload;

/// Blobs that are on their way at a time.
const AT_A_TIME: usize = 4;
/// How often progress is shown, and interruption looked for.
const TICK: Duration = Duration::from_millis(100);

/// How a registry is spoken to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Access {
    /// Without TLS, though it is not this host.
    pub plain_http: bool,
}

/// A blob to be sent.
#[derive(Debug, Clone)]
pub struct Upload {
    /// `sha256:…`
    pub digest: String,
    /// In bytes.
    pub size: u64,
    /// The file that is the blob.
    pub path: PathBuf,
    /// A repository of the same registry that may have it.
    pub from: Option<String>,
}

/// What became of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was sent.
    Sent,
    /// The repository had it.
    Existed,
    /// Another repository had it.
    Mounted,
}

/// What is sent: the blobs, then the documents in order, the last one by the reference.
#[derive(Debug, Clone)]
pub struct Push {
    /// In any order.
    pub blobs: Vec<Upload>,
    /// Manifests before the index that names them.
    pub documents: Vec<Document>,
}

/// A host, and by what it knows us.
#[derive(Debug)]
struct Host {
    http: Arc<Http>,
    credential: Option<Credential>,
    /// The registry itself and no mirror: it is sent what others know for it.
    is_registry: bool,
}

impl Host {
    fn new(place: Place, registry: &str) -> Result<Self> {
        let credential = match credentials::find(&place.name) {
            Err(error) if place.name != registry => {
                tracing::warn!("{error}; it is asked without");
                None
            }
            other => other?,
        };
        Ok(Host {
            is_registry: place.name == registry,
            http: Arc::new(Http::new(place)?),
            credential,
        })
    }
}

/// A registry with its mirrors, for the time of one command. Blocks the thread that calls it, and no other is started.
#[derive(Debug)]
pub struct Session {
    runtime: Runtime,
    /// In the order in which they are asked; the registry itself, or what stands in its place, is the last one.
    hosts: Vec<Host>,
    seen: Arc<Seen>,
    reference: Reference,
    access: Access,
    deadline: Option<Instant>,
}

impl Session {
    /// Gets ready to speak to the registry of a reference. Nothing is sent yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a registry that is no host, and for a `hosts.toml`, or a file that it names, that
    /// cannot be read; [`ErrorKind::Permission`] for credentials that cannot.
    pub fn open(reference: &Reference, access: Access) -> Result<Self> {
        let registry = reference.registry();
        let places = hosts::of(registry, access.plain_http)?.into_iter();
        Ok(Session {
            runtime: runtime()?,
            hosts: places
                .map(|place| Host::new(place, registry))
                .collect::<Result<_>>()?,
            seen: Arc::default(),
            reference: reference.clone(),
            access,
            deadline: None,
        })
    }

    /// Goes by what others have seen of hosts, and lets them see.
    pub(crate) fn sharing(mut self, seen: &Arc<Seen>) -> Self {
        self.seen = Arc::clone(seen);
        self
    }

    /// Has the registry itself, and none of its mirrors, sent what a keychain knows.
    pub fn knowing(mut self, keychain: Arc<dyn Keychain>) -> Self {
        self.seen = Arc::new(Seen::knowing(keychain));
        self
    }

    /// For one who can do without, and waits no longer than until `deadline`: what fails is not tried again.
    pub fn within(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Ends it without waiting for what still is under way, such as a name server that does not answer.
    pub fn leave(self) {
        self.runtime.shutdown_background();
    }

    /// The registry and the repository that it is about.
    pub fn place(&self) -> (&str, &str) {
        (self.reference.registry(), self.reference.repository())
    }

    /// What [`super::Ranges`] need to go on where this is: the reference, and how it was spoken to.
    pub fn whereabouts(&self) -> (String, Access) {
        (self.reference.to_string(), self.access)
    }

    /// What its requests are driven by; threads may drive them at once.
    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Makes sure that the registry gives parts of blobs, none of which is empty.
    ///
    /// # Errors
    /// As [`Session::find`]; [`ErrorKind::Unsupported`] where it gives all of one or nothing.
    pub fn try_ranges(&self, blobs: &[Descriptor]) -> Result<()> {
        let source = self.to_pull();
        let work = async {
            let each = blobs.iter().map(|blob| {
                let first = || async {
                    let answer = ranges::from_first(&source, &blob.digest, 0..1).await;
                    answer.map_err(|failure| Failure {
                        // Now is the time to say so.
                        passes: failure.passes && failure.error.kind() != ErrorKind::Unsupported,
                        ..failure
                    })
                };
                retried(source.tries, first)
            });
            several(each).await
        };
        self.drive(&AtomicU64::new(0), None, work)
    }

    fn repository(&self, host: &Host, scopes: Vec<String>) -> Repository {
        let name = self.reference.repository();
        let mut repository =
            Repository::new(host.http.clone(), name, scopes, host.credential.clone());
        repository.tries = self.tries();
        let keychain = self.seen.keychain.clone();
        repository.keychain = keychain
            // To do without TLS was the wish of who pulled a layer first, and of no pod.
            .filter(|_| {
                let is_open = self.access.plain_http && !host.http.is_tls;
                host.is_registry && (!is_open || is_local(&host.http.host))
            })
            .map(|keychain| (keychain, self.reference.registry().to_owned()));
        repository
    }

    fn tries(&self) -> Tries {
        match self.deadline {
            Some(_) => Tries::One,
            None => Tries::Several,
        }
    }

    /// The hosts that may have what the reference is about.
    pub(crate) fn to_pull(&self) -> Source {
        let scope = format!("repository:{}:pull", self.reference.repository());
        let hosts = self.hosts.iter();
        let hosts = hosts.map(|host| self.repository(host, vec![scope.clone()]));
        Source::new(hosts.collect(), self.tries(), Arc::clone(&self.seen))
    }

    /// The host that is pushed to.
    fn to_push(&self, scopes: Vec<String>) -> Result<Repository> {
        let mut hosts = self.hosts.iter();
        let host = hosts.find(|host| host.http.capabilities.push);
        let host = host.ok_or_else(|| {
            let registry = self.reference.registry();
            let text = format!(
                "no host of {registry} may be pushed to: the capabilities in its hosts.toml name push for none"
            );
            Error::new(ErrorKind::Unsupported, text)
        })?;
        Ok(self.repository(host, scopes))
    }

    /// What the reference names, for a platform: an image, its block layers, or both.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] without such an image; [`ErrorKind::Permission`]; [`ErrorKind::Corrupt`];
    /// [`ErrorKind::Io`] where the registry cannot be reached.
    pub fn find(&self, platform: &Platform) -> Result<Found> {
        let source = self.to_pull();
        let asked = Asked {
            session: self,
            source: &source,
        };
        let shown = self.reference.to_string();
        let found = find(&asked, self.reference.identifier(), &shown, platform);
        self.drive(&AtomicU64::new(0), None, found)
    }

    /// Makes sure that the registry answers, and takes what is known of who asks.
    ///
    /// # Errors
    /// As [`Session::find`].
    pub fn try_push(&self) -> Result<()> {
        let name = self.reference.repository();
        let repository = self.to_push(vec![format!("repository:{name}:pull,push")])?;
        let http = &repository.http;
        let doing = format!("asking {} whether it takes {name}", http.host);
        let url = http.url("")?;
        let work = async {
            let build = || http.client.get(url.clone());
            repository.ask_again(&doing, &[], build).await.map(drop)
        };
        self.drive(&AtomicU64::new(0), None, work)
    }

    /// Fetches blobs into an OCI layout's directory of blobs, several at a time, each checked.
    ///
    /// # Errors
    /// As [`Session::find`]; [`ErrorKind::Corrupt`] for a blob that is not what it is to be.
    pub fn fetch(
        &self,
        wanted: &[Descriptor],
        layout: &Path,
        progress: Option<Progress<'static>>,
    ) -> Result<()> {
        let source = self.to_pull();
        let moved = AtomicU64::new(0);
        let places = places(wanted, layout)?;
        let each = places
            .iter()
            .map(|(blob, path)| blobs::download(&source, blob, path, &moved));
        self.drive(&moved, progress, several(each))
    }

    /// Sends blobs, several at a time, and then documents. `done` hears of each blob.
    ///
    /// # Errors
    /// As [`Session::find`]. What was sent stays in the registry, and no tag names it.
    pub fn push(
        &self,
        push: &Push,
        progress: Option<Progress<'static>>,
        done: &dyn Fn(&Upload, Outcome),
    ) -> Result<()> {
        let name = self.reference.repository();
        let mut scopes = vec![format!("repository:{name}:pull,push")];
        let from: BTreeSet<&String> = push
            .blobs
            .iter()
            .filter_map(|blob| blob.from.as_ref())
            .collect();
        scopes.extend(
            from.into_iter()
                .map(|from| format!("repository:{from}:pull")),
        );
        let repository = self.to_push(scopes)?;
        let moved = Arc::new(AtomicU64::new(0));
        let each = push.blobs.iter().map(|blob| async {
            let outcome = upload::upload(&repository, blob, &moved).await?;
            done(blob, outcome);
            Ok::<(), Failure>(())
        });
        let work = async {
            several(each).await?;
            let last = push.documents.len().saturating_sub(1);
            for (index, document) in push.documents.iter().enumerate() {
                let identifier = match index == last {
                    true => self.reference.identifier(),
                    false => &document.digest,
                };
                upload::put_document(&repository, document, identifier).await?;
            }
            Ok(())
        };
        self.drive(&moved, progress, work)
    }

    /// Makes sure that a registry takes a name and a password.
    ///
    /// # Errors
    /// [`ErrorKind::Permission`] where it does not; as [`Session::find`].
    pub fn try_login(registry: &str, access: Access, user: &str, password: &str) -> Result<()> {
        let credential = Credential::Password {
            user: user.to_owned(),
            password: password.to_owned(),
        };
        let place = hosts::of(registry, access.plain_http)?.pop();
        let place = place.ok_or_else(|| Error::internal("a registry without a host"))?;
        if place.name != registry {
            let text = format!(
                "a hosts.toml puts {} in the place of {registry}, which would be sent the password of another: log in to \
                 the one that is asked (`vellum login {}`)",
                place.name, place.name
            );
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        let http = Arc::new(Http::new(place)?);
        let url = http.url("")?;
        let repository = Repository::new(http.clone(), "", Vec::new(), Some(credential));
        let doing = format!("logging in to {registry}");
        let work = async {
            let build = || http.client.get(url.clone());
            repository.ask_again(&doing, &[], build).await.map(drop)
        };
        drive(&runtime()?, &AtomicU64::new(0), None, work)
    }

    fn drive<T>(
        &self,
        moved: &AtomicU64,
        progress: Option<Progress<'static>>,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T> {
        let work = async {
            let Some(deadline) = self.deadline else {
                return work.await;
            };
            let done = tokio::time::timeout_at(deadline.into(), work).await;
            done.unwrap_or_else(|_| {
                let text = format!("{} took too long to answer", self.reference.registry());
                Err(Error::new(ErrorKind::Timeout, text).into())
            })
        };
        drive(&self.runtime, moved, progress, work)
    }
}

/// Where in an OCI layout blobs are to lie, each once.
pub(crate) fn places<'a>(
    wanted: &'a [Descriptor],
    layout: &Path,
) -> Result<Vec<(&'a Descriptor, PathBuf)>> {
    let mut seen = BTreeSet::new();
    let mut places = Vec::new();
    for blob in wanted.iter().filter(|blob| seen.insert(&blob.digest)) {
        let path = layout.join(blob_name(&blob.digest)?);
        let dir = path.parent().unwrap_or(layout);
        std::fs::create_dir_all(dir).context(|| format!("cannot make {}", dir.display()))?;
        places.push((blob, path));
    }
    Ok(places)
}

/// Does all of these, a few at a time, in any order.
///
/// # Errors
/// The first that comes; the others are left.
pub(crate) async fn several<T>(
    each: impl Iterator<Item = impl Future<Output = Result<T, Failure>>>,
) -> Result<(), Failure> {
    let all = stream::iter(each).buffer_unordered(AT_A_TIME);
    all.map_ok(drop).try_collect().await
}

/// The registry of a session with its mirrors, which are asked for documents.
struct Asked<'a> {
    session: &'a Session,
    source: &'a Source,
}

impl Documents for Asked<'_> {
    async fn document(&self, identifier: &str) -> Result<Document, Failure> {
        blobs::document(self.source, identifier).await
    }

    fn absent(&self, identifier: &str, why: &Error) -> Error {
        let (host, name) = self.session.place();
        let asked = match self.session.hosts.len() {
            1 => String::new(),
            _ => format!(" ({why})"),
        };
        let text = format!(
            "{host} has no {identifier} in the repository {name}: look whether the name and the tag are right, and whether \
             it has to be logged in to (`vellum login {host}`){asked}"
        );
        Error::new(ErrorKind::NotFound, text)
    }
}

pub(crate) fn runtime() -> Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "a runtime for network connections cannot be made")
}

/// Works in this thread until it is done or a signal asks for an end, and shows what has moved.
pub(crate) fn drive<T>(
    runtime: &Runtime,
    moved: &AtomicU64,
    mut progress: Option<Progress<'static>>,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T> {
    runtime.block_on(async {
        let mut work = std::pin::pin!(work);
        let mut shown = 0;
        loop {
            let done = tokio::time::timeout(TICK, work.as_mut()).await;
            let now = moved.load(Ordering::Relaxed);
            if let Some(progress) = &mut progress {
                progress(now.saturating_sub(shown));
            }
            shown = shown.max(now);
            if let Ok(done) = done {
                return done.map_err(|failure| failure.error);
            }
            interrupt::check()?;
        }
    })
}
