//! One registry, as HTTP shows it.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, WWW_AUTHENTICATE};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::Mutex;

use super::auth::authorization;
use super::credentials::Credential;
use super::failure::Failure;
use super::reference::{host_of, is_local};
use super::retry::{Moved, Tries, retried, unless_stalled};
use super::tls;
use vellum_base::error::{Error, ErrorKind, Result};

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a pooled connection waits for its next use.
const IDLE: Duration = Duration::from_secs(30);
/// The longest document that is read whole: a manifest, a token.
const MAX_DOCUMENT: usize = 4 << 20;

/// A client for one host.
#[derive(Debug)]
pub(crate) struct Http {
    pub client: Client,
    /// What users call the registry.
    pub host: String,
    pub is_tls: bool,
    base: Url,
}

impl Http {
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a registry that is no host.
    pub fn new(registry: &str, plain: bool) -> Result<Self> {
        let local = is_local(registry);
        let is_tls = !local && !plain;
        let scheme = if is_tls { "https" } else { "http" };
        let base = format!("{scheme}://{}/v2/", host_of(registry));
        let base = Url::parse(&base).map_err(|error| {
            let text = format!("{registry:?} is not the name of a registry: write HOST[:PORT]");
            Error::with_source(ErrorKind::InvalidInput, text, error)
        })?;
        let mut builder = Client::builder()
            .user_agent(concat!("vellum/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .pool_idle_timeout(IDLE)
            .tls_backend_preconfigured(tls::config(registry)?);
        if local {
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|error| {
            Error::with_source(ErrorKind::Io, "an HTTP client cannot be made", error)
        })?;
        Ok(Http {
            client,
            host: registry.to_owned(),
            is_tls,
            base,
        })
    }

    /// The address of something below `/v2/`.
    pub fn url(&self, path: &str) -> Result<Url> {
        self.base.join(path).map_err(|error| {
            let text = format!("{path:?} is no part of an address");
            Error::with_source(ErrorKind::InvalidInput, text, error)
        })
    }

    /// Sends a request without a body to speak of, and waits for the answer, whatever that is.
    pub async fn answer(&self, doing: &str, request: RequestBuilder) -> Result<Response, Failure> {
        self.answer_to_body(doing, request, &Moved::none()).await
    }

    /// As [`Http::answer`], for a request whose body counts its bytes in `moved`.
    async fn answer_to_body(
        &self,
        doing: &str,
        request: RequestBuilder,
        moved: &Moved,
    ) -> Result<Response, Failure> {
        let answer = async {
            let sent = request.send().await;
            sent.map_err(|error| Failure::unanswered(&self.host, doing, &error))
        };
        unless_stalled(doing, moved, answer).await
    }

    /// Whether an address is one of this registry: only such ones may know who asks.
    pub fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
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
        let own = url.host_str() == self.base.host_str()
            && url.set_scheme("https").is_ok()
            && url.set_port(self.base.port()).is_ok();
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

/// A repository of a registry, with the right to it.
#[derive(Debug)]
pub(crate) struct Repository {
    pub http: Arc<Http>,
    pub repository: String,
    pub tries: Tries,
    scopes: Vec<String>,
    credential: Option<Credential>,
    /// What the registry takes for the moment.
    authorization: Mutex<Option<String>>,
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
            scopes,
            credential,
            authorization: Mutex::new(None),
        }
    }

    /// The address of something in the repository.
    pub fn url(&self, path: &str) -> Result<Url> {
        self.http.url(&format!("{}/{path}", self.repository))
    }

    /// Sends a request, a second time with what the registry asks for. Its body, if it has one, counts its bytes in
    /// `moved`. What the registry says of it is an answer, if it is not that it wants to know who asks.
    pub async fn ask(
        &self,
        doing: &str,
        moved: &Moved,
        build: impl Fn() -> RequestBuilder,
    ) -> Result<Response, Failure> {
        let mut known = self.authorization.lock().await.clone();
        for last in [false, true] {
            let request = self
                .with_authorization(build(), known.as_deref())
                .map_err(|error| Failure::unanswered(&self.http.host, doing, &error))?;
            let response = self.http.answer_to_body(doing, request, moved).await?;
            let heeded = !last && self.http.is_own(response.url());
            let Some(challenge) = challenge(&response).filter(|_| heeded) else {
                return self.not_unauthorized(doing, response).await;
            };
            known = Some(self.authorize(&challenge, known).await?);
        }
        Err(Error::internal("a request was sent twice and is not answered").into())
    }

    /// Says who asks, but to the registry alone: an upload may go elsewhere.
    fn with_authorization(
        &self,
        request: RequestBuilder,
        known: Option<&str>,
    ) -> reqwest::Result<RequestBuilder> {
        let (client, request) = request.build_split();
        let request = request?;
        let own = self.http.is_own(request.url());
        let request = RequestBuilder::from_parts(client, request);
        Ok(match known.filter(|_| own) {
            Some(known) => request.header(AUTHORIZATION, known),
            None => request,
        })
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
        let mut held = self.authorization.lock().await;
        if let Some(newer) = held.clone().filter(|held| tried.as_ref() != Some(held)) {
            return Ok(newer);
        }
        let credential = self.credential.as_ref();
        let found = authorization(&self.http, challenge, &self.scopes, credential).await?;
        *held = Some(found.clone());
        Ok(found)
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
        retried(self.tries, || async {
            let response = self.ask(doing, &Moved::none(), &build).await?;
            let status = response.status();
            match status.is_success() || others.contains(&status) {
                true => Ok(response),
                false => Err(Failure::refused(&self.http.host, doing, response).await),
            }
        })
        .await
    }
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
