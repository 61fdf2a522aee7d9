//! One registry, as HTTP shows it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, WWW_AUTHENTICATE};
use reqwest::{Client, Method, Request, RequestBuilder, Response, StatusCode, Url, redirect};
use tokio::sync::Mutex;

use super::auth::authorization;
use super::credentials::{self, Credential, Keychain};
use super::failure::Failure;
use super::hosts::{Capabilities, Place};
use super::redirects::Redirects;
use super::reference::is_local;
use super::retry::{Moved, Tries, retried, unless_stalled};
use super::tls::{self, Configs};
use vellum_base::error::{Error, ErrorKind, Result};

/// How long a pooled connection waits for its next use.
const IDLE: Duration = Duration::from_secs(30);
/// The longest document that is read whole: a manifest, a token.
const MAX_DOCUMENT: usize = 4 << 20;
/// Credentials of a keychain that are tried and not taken, before the next one is none of its.
const MAX_REFUSED: usize = 4;
/// How often a request is sent: with what was known, without, and with each credential.
const MAX_ASKED: usize = 2 * (MAX_REFUSED + 2);
/// How often a request is sent on.
const MAX_REDIRECTIONS: usize = 5;

/// By which connections a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Those of all.
    Usual,
    /// Others, which share nothing with them.
    Second,
}

/// Clients for a host, and for others that it sends us on to.
#[derive(Debug)]
struct Clients {
    own: Client,
    elsewhere: Client,
}

impl Clients {
    fn new(place: &Place, configs: &Configs) -> Result<Self> {
        let make = |config: &rustls::ClientConfig| {
            let mut builder = Client::builder()
                .user_agent(concat!("vellum/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(place.connect)
                .pool_idle_timeout(IDLE)
                // Those of one host are not for another: `Http::execute` follows.
                .redirect(redirect::Policy::none())
                .tls_backend_preconfigured(config.clone());
            if let Some(proxy) = &place.proxy {
                builder = builder.proxy(reqwest::Proxy::all(proxy.clone())?);
            } else if is_local(&place.name) {
                builder = builder.no_proxy();
            }
            builder.build()
        };
        let make = |config| {
            make(config).map_err(|error| {
                Error::with_source(ErrorKind::Io, "an HTTP client cannot be made", error)
            })
        };
        Ok(Clients {
            own: make(&configs.own)?,
            elsewhere: make(&configs.elsewhere)?,
        })
    }
}

/// A client for one host.
#[derive(Debug)]
pub(crate) struct Http {
    /// With which requests are built; [`Http::execute`] chooses by which they go.
    pub client: Client,
    /// What users call the host.
    pub host: String,
    pub is_tls: bool,
    pub capabilities: Capabilities,
    usual: Clients,
    second: OnceLock<Clients>,
    place: Place,
    configs: Configs,
}

impl Http {
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for files of certificates that cannot be read.
    pub fn new(place: Place) -> Result<Self> {
        let configs = tls::configs(&place.trust)?;
        let usual = Clients::new(&place, &configs)?;
        Ok(Http {
            client: usual.own.clone(),
            host: place.name.clone(),
            is_tls: place.base.scheme() == "https",
            capabilities: place.capabilities,
            usual,
            second: OnceLock::new(),
            place,
            configs,
        })
    }

    /// The address of its API: one host is asked in one way.
    pub fn base(&self) -> &Url {
        &self.place.base
    }

    /// The clients of a lane; those of all where no others can be made.
    fn clients(&self, lane: Lane) -> &Clients {
        if lane == Lane::Usual {
            return &self.usual;
        }
        if self.second.get().is_none()
            && let Ok(clients) = Clients::new(&self.place, &self.configs)
        {
            // Another thread may have been first.
            let _ = self.second.set(clients);
        }
        self.second.get().unwrap_or(&self.usual)
    }

    /// Sends a request, and goes where it is sent on to. What says who asks stays with the host that it is for.
    async fn execute(
        &self,
        lane: Lane,
        mut request: Request,
        authorization: Option<&str>,
    ) -> reqwest::Result<Response> {
        let clients = self.clients(lane);
        if self.is_own(request.url()) {
            for (name, value) in &self.place.headers {
                request.headers_mut().append(name, value.clone());
            }
            let known = authorization.and_then(|known| HeaderValue::from_str(known).ok());
            if let Some(mut known) = known {
                known.set_sensitive(true);
                request.headers_mut().insert(AUTHORIZATION, known);
            }
        }
        let mut left = MAX_REDIRECTIONS;
        loop {
            let again = request.try_clone();
            let client = match self.is_own(request.url()) {
                true => &clients.own,
                false => &clients.elsewhere,
            };
            let response = client.execute(request).await?;
            let next = again.filter(|_| left > 0);
            let Some(next) = next.and_then(|again| self.sent_on(&response, again)) else {
                return Ok(response);
            };
            left -= 1;
            request = next;
        }
    }

    /// The request that follows an answer, if it is one that sends on: a read goes anywhere, others stay on the host.
    fn sent_on(&self, response: &Response, mut request: Request) -> Option<Request> {
        let reads = matches!(*request.method(), Method::GET | Method::HEAD);
        let sends_on = match response.status().as_u16() {
            307 | 308 => true,
            301..=303 => reads,
            _ => false,
        };
        let url = header(response.headers(), LOCATION.as_str())?;
        let url = response.url().join(url).ok()?;
        let stays = url.origin() == request.url().origin();
        let is_web = matches!(url.scheme(), "http" | "https");
        // Who is on the way could answer in the registry's place, and a tag has no digest to compare.
        let loses_tls = response.url().scheme() == "https" && url.scheme() != "https";
        if !sends_on || !is_web || loses_tls || !(reads || stays) {
            return None;
        }
        if !stays {
            request.headers_mut().remove(AUTHORIZATION);
            for name in self.place.headers.keys() {
                request.headers_mut().remove(name);
            }
        }
        *request.url_mut() = url;
        Some(request)
    }

    /// The address of something below `/v2/`.
    pub fn url(&self, path: &str) -> Result<Url> {
        let mut url = self.place.base.join(path).map_err(|error| {
            let text = format!("{path:?} is no part of an address");
            Error::with_source(ErrorKind::InvalidInput, text, error)
        })?;
        if let Some(registry) = &self.place.namespace {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        Ok(url)
    }

    /// Sends a request without a body to speak of, and waits for the answer, whatever that is.
    pub async fn answer(&self, doing: &str, request: RequestBuilder) -> Result<Response, Failure> {
        self.answer_to_body(doing, (Lane::Usual, request), &Moved::none(), None)
            .await
    }

    /// As [`Http::answer`], for a request whose body counts its bytes in `moved`, and of one who is known.
    async fn answer_to_body(
        &self,
        doing: &str,
        (lane, request): (Lane, RequestBuilder),
        moved: &Moved,
        authorization: Option<&str>,
    ) -> Result<Response, Failure> {
        let answer = async {
            let sent = async { self.execute(lane, request.build()?, authorization).await };
            let sent = sent.await;
            sent.map_err(|error| Failure::unanswered(&self.host, doing, &error))
        };
        unless_stalled(doing, moved, answer).await
    }

    /// Whether an address is one of this registry: only such ones may know who asks.
    pub fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.place.base.origin()
    }

    /// An address that the registry names for what comes next. One that it calls plain http by mistake, as behind a
    /// proxy that has the TLS, is asked as the registry is.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] for one without TLS on another host, where the registry has it.
    pub fn secure(&self, mut url: Url) -> Result<Url> {
        if !self.is_tls || url.scheme() == "https" {
            return Ok(url);
        }
        let base = &self.place.base;
        let own = url.host_str() == base.host_str()
            && url.set_scheme("https").is_ok()
            && url.set_port(base.port()).is_ok();
        match own {
            true => Ok(url),
            false => Err(Error::new(
                ErrorKind::Protocol,
                format!(
                    "{} sends us on to {url}, which has no TLS: nothing is sent there",
                    self.host
                ),
            )),
        }
    }

    /// The whole body of a short answer.
    pub async fn body(&self, doing: &str, mut response: Response) -> Result<Vec<u8>, Failure> {
        let moved = Moved::none();
        let read = async {
            let mut bytes = Vec::new();
            loop {
                let chunk = response.chunk().await;
                let chunk =
                    chunk.map_err(|error| Failure::unanswered(&self.host, doing, &error))?;
                let Some(chunk) = chunk else {
                    return Ok(bytes);
                };
                if bytes.len() + chunk.len() > MAX_DOCUMENT {
                    let text = format!("{doing}: the answer has more than {MAX_DOCUMENT} bytes");
                    return Err(Error::new(ErrorKind::Protocol, text).into());
                }
                bytes.extend_from_slice(&chunk);
            }
        };
        unless_stalled(doing, &moved, read).await
    }
}

/// Who asks, as a registry takes it for the moment.
#[derive(Debug, Default)]
struct Asker {
    authorization: Option<String>,
    /// That is for who gave no credential.
    is_nobody: bool,
    /// What it came from, if that was the keychain's.
    lent: Option<Credential>,
    /// What the keychain has and the registry did not take, as long as it takes something else.
    refused: Vec<Credential>,
}

/// A repository of a registry, with the right to it.
#[derive(Debug)]
pub(crate) struct Repository {
    pub http: Arc<Http>,
    pub repository: String,
    pub tries: Tries,
    /// Where its blobs were found to be.
    pub redirects: Redirects,
    scopes: Vec<String>,
    credential: Option<Credential>,
    /// Who knows what goes before that, and what is asked for there: the registry.
    pub keychain: Option<(Arc<dyn Keychain>, String)>,
    asker: Mutex<Asker>,
}

impl Repository {
    pub fn new(
        http: Arc<Http>,
        repository: &str,
        scopes: Vec<String>,
        credential: Option<Credential>,
    ) -> Self {
        Repository {
            http,
            repository: repository.to_owned(),
            tries: Tries::Several,
            redirects: Redirects::default(),
            scopes,
            credential,
            keychain: None,
            asker: Mutex::default(),
        }
    }

    /// The address of something in the repository.
    pub fn url(&self, path: &str) -> Result<Url> {
        self.http.url(&format!("{}/{path}", self.repository))
    }

    /// Sends a request, again with what the registry asks for, and with another credential where it does not take a
    /// keychain's. Its body, if it has one, counts its bytes in
    /// `moved`. What the registry says of it is an answer, if it is not that it wants to know who asks.
    pub async fn ask(
        &self,
        doing: &str,
        moved: &Moved,
        build: impl Fn() -> RequestBuilder,
    ) -> Result<Response, Failure> {
        self.ask_by(Lane::Usual, doing, moved, build).await
    }

    /// As [`Repository::ask`], by the connections of a lane.
    pub async fn ask_by(
        &self,
        lane: Lane,
        doing: &str,
        moved: &Moved,
        build: impl Fn() -> RequestBuilder,
    ) -> Result<Response, Failure> {
        let mut known = self.asker.lock().await.authorization.clone();
        let mut fresh = false;
        for _ in 0..MAX_ASKED {
            let request = (lane, build());
            let answer = self
                .http
                .answer_to_body(doing, request, moved, known.as_deref());
            let response = answer.await?;
            let is_denied = self.http.is_own(response.url()) && denies(&response);
            let challenge = challenge(&response).filter(|_| is_denied && !fresh);
            if let Some(challenge) = challenge {
                let found = self.authorize(&challenge, known).await;
                known = Some(found.map_err(|failure| self.until_known(failure))?);
                fresh = true;
            } else if is_denied && self.is_another_known(known.as_deref()).await? {
                known = None;
                fresh = false;
            } else {
                let answer = self.not_unauthorized(doing, response).await;
                return answer.map_err(|failure| self.until_known(failure));
            }
        }
        let text = format!(
            "{doing}: {} takes none of what is known for it",
            self.http.host
        );
        Err(self.until_known(Error::new(ErrorKind::Permission, text).into()))
    }

    async fn not_unauthorized(&self, doing: &str, response: Response) -> Result<Response, Failure> {
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let failure = Failure::refused(&self.http.host, doing, response).await;
        if self.credential.is_none() {
            return Err(failure);
        }
        let host = &self.http.host;
        let text = format!(
            "{doing}: {host} does not take the name and password that are known for it: `vellum login {host}` again"
        );
        Err(Error::new(ErrorKind::Permission, text).into())
    }

    /// Gets what the registry asks for; another request may have got it meanwhile.
    async fn authorize(&self, challenge: &str, tried: Option<String>) -> Result<String, Failure> {
        let mut held = self.asker.lock().await;
        if let Some(newer) = held.authorization.clone()
            && tried.as_ref() != Some(&newer)
        {
            return Ok(newer);
        }
        let mut refusal = None;
        loop {
            let lent = self.ask_keychain(&held.refused).await?;
            let credential = match (&lent, held.refused.is_empty()) {
                (Some(lent), _) => Some(lent.clone()),
                (None, true) => self.credential.clone(),
                (None, false) => self.own_anew().await?,
            };
            if credential.is_none()
                && let Some(refusal) = refusal
            {
                held.refused.clear();
                return Err(refusal);
            }
            let found =
                authorization(&self.http, challenge, &self.scopes, credential.as_ref()).await;
            match (found, lent) {
                (Ok(found), lent) => {
                    held.authorization = Some(found.clone());
                    held.is_nobody = credential.is_none();
                    held.lent = lent;
                    return Ok(found);
                }
                (Err(failure), Some(lent))
                    if failure.error.kind() == ErrorKind::Permission
                        && held.refused.len() < MAX_REFUSED =>
                {
                    held.refused.push(lent);
                    refusal = Some(failure);
                }
                (Err(failure), _) => {
                    held.refused.clear();
                    return Err(failure);
                }
            }
        }
    }

    /// The registry does not take what it was asked with. Whether something else is known then, which is used from
    /// now on; where nothing is, all counts anew, as a refusal need not be for ever.
    async fn is_another_known(&self, tried: Option<&str>) -> Result<bool> {
        if self.keychain.is_none() {
            return Ok(false);
        }
        let mut held = self.asker.lock().await;
        if tried.is_some() && held.authorization.as_deref() != tried {
            return Ok(true);
        }
        held.authorization = None;
        if let Some(lent) = held.lent.take()
            && held.refused.len() < MAX_REFUSED
        {
            held.refused.push(lent);
            if self.ask_keychain(&held.refused).await?.is_some() || self.own_anew().await?.is_some()
            {
                return Ok(true);
            }
        }
        held.refused.clear();
        Ok(false)
    }

    /// What the keychain has but for what was refused, asked where it holds up nobody else.
    async fn ask_keychain(&self, refused: &[Credential]) -> Result<Option<Credential>> {
        let Some((keychain, registry)) = self.keychain.clone() else {
            return Ok(None);
        };
        let (repository, refused) = (self.repository.clone(), refused.to_vec());
        elsewhere(move || {
            let found = keychain.find(&registry, &repository, &refused);
            found.filter(|found| !refused.contains(found))
        })
        .await
    }

    /// What docker's files have by now: a helper's token may be newer than the one that was found first.
    async fn own_anew(&self) -> Result<Option<Credential>> {
        let host = self.http.host.clone();
        let found = elsewhere(move || credentials::find(&host)).await?;
        Ok(found.unwrap_or_else(|error| {
            tracing::warn!("{error}; what was known before is used");
            self.credential.clone()
        }))
    }

    /// A refusal passes where another credential may become known.
    fn until_known(&self, failure: Failure) -> Failure {
        match failure.error.kind() {
            ErrorKind::Permission => self.until_another(failure),
            _ => failure,
        }
    }

    /// What fails for want of another credential passes where that may become known.
    fn until_another(&self, failure: Failure) -> Failure {
        let keychain = self.keychain.as_ref();
        match keychain.and_then(|(keychain, _)| keychain.advice()) {
            Some(advice) => Failure {
                error: Error::new(
                    failure.error.kind(),
                    format!("{}; or {advice}", failure.error),
                ),
                passes: true,
                ..failure
            },
            None => failure,
        }
    }

    /// As [`Failure::refused`], for a host that may let another in: who asks is not known any more then. Some say to
    /// who is nobody that there is nothing.
    pub async fn refused(&self, doing: &str, response: Response) -> Failure {
        let is_absent = response.status() == StatusCode::NOT_FOUND;
        let failure = Failure::refused(&self.http.host, doing, response).await;
        let mut held = self.asker.lock().await;
        let is_hidden = is_absent && held.is_nobody && held.authorization.is_some();
        if is_hidden || failure.error.kind() == ErrorKind::Permission {
            held.authorization = None;
            held.lent = None;
        }
        match is_hidden {
            true => self.until_another(failure),
            false => self.until_known(failure),
        }
    }

    /// As [`Repository::ask`], again where it fails in a way that passes; for requests without a body to speak of.
    ///
    /// # Errors
    /// Also for an answer that is neither a success nor one of `others`.
    pub async fn ask_again(
        &self,
        doing: &str,
        others: &[StatusCode],
        build: impl Fn() -> RequestBuilder,
    ) -> Result<Response, Failure> {
        retried(self.tries, || self.ask_once(doing, others, &build)).await
    }

    /// As [`Repository::ask_again`], once.
    ///
    /// # Errors
    /// As that.
    pub async fn ask_once(
        &self,
        doing: &str,
        others: &[StatusCode],
        build: impl Fn() -> RequestBuilder,
    ) -> Result<Response, Failure> {
        let response = self.ask(doing, &Moved::none(), build).await?;
        let status = response.status();
        match status.is_success() || others.contains(&status) {
            true => Ok(response),
            false => Err(Failure::refused(&self.http.host, doing, response).await),
        }
    }
}

/// Does what may block for a moment.
async fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::internal(format!("asking for credentials broke off: {error}")))
}

fn denies(response: &Response) -> bool {
    matches!(
        response.status(),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN
    )
}

/// What a registry wants to see first.
fn challenge(response: &Response) -> Option<String> {
    if response.status() != StatusCode::UNAUTHORIZED {
        return None;
    }
    header(response.headers(), WWW_AUTHENTICATE.as_str()).map(str::to_owned)
}

/// A header that is text.
pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}
