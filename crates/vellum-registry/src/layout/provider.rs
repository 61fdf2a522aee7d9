//! Who keeps a bucket, where that is, and what it says: Amazon's S3 and what speaks as it does, Google, Azure.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{HttpClient, HttpConnector};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::multipart::MultipartStore;
use object_store::{ClientConfigKey, ClientOptions, ObjectStore, RetryConfig};
use reqwest::Url;
use vellum_base::error::{Error, ErrorKind, Result};

use super::super::failure::Failure;
use super::super::location::{Holder, LayoutReference};
use super::super::reference::is_local;
use super::super::session::Access;
use super::super::tls;

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);
/// Characters of a store's words that are shown.
const SHOWN: usize = 300;

/// A bucket's keeper.
pub(super) struct Provider {
    pub store: Arc<dyn ObjectStore>,
    pub parts: Arc<dyn MultipartStore>,
    /// Where it is, as a reference says it: what the environment said is in it too.
    pub settings: Vec<(String, String)>,
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Provider")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// Makes HTTP clients that trust whom registries are trusted by, and speak TLS by the same library.
#[derive(Debug)]
struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let generic =
            |error: Box<dyn std::error::Error + Send + Sync>| object_store::Error::Generic {
                store: "HTTP",
                source: error,
            };
        let plain = options.get_config_value(&ClientConfigKey::AllowHttp);
        let plain = plain.as_deref() == Some("true");
        // Of no registry in particular.
        let configs = tls::configs(&tls::Trust::of(""));
        let configs = configs.map_err(|error| generic(error.to_string().into()))?;
        let client = reqwest::Client::builder()
            .user_agent(concat!("vellum/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .https_only(!plain)
            // What a request is signed with is for whom it was made for.
            .redirect(reqwest::redirect::Policy::none())
            .tls_backend_preconfigured(configs.elsewhere)
            .build()
            .map_err(|error| generic(error.into()))?;
        Ok(HttpClient::new(client))
    }
}

/// Tries are counted where a command or the fetcher makes them.
fn once() -> RetryConfig {
    RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    }
}

/// Gets ready to speak to the keeper of a reference's bucket, with the credentials that the environment has.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for one of which too little is known, or that is not to be spoken to.
pub(super) fn open(reference: &LayoutReference, access: Access) -> Result<Provider> {
    match reference.holder {
        Holder::S3 => s3(reference, access),
        Holder::Google => google(reference, access),
        Holder::Azure => azure(reference, access),
        Holder::Directory => Err(Error::internal("a directory is no bucket")),
    }
}

fn s3(reference: &LayoutReference, access: Access) -> Result<Provider> {
    use AmazonS3ConfigKey::{DefaultRegion, Endpoint, Region, S3Endpoint};
    let mut builder = AmazonS3Builder::from_env();
    let endpoint = said(reference, "endpoint")
        .or(builder.get_config_value(&S3Endpoint))
        .or(builder.get_config_value(&Endpoint));
    let region = said(reference, "region")
        .or(builder.get_config_value(&Region))
        .or(builder.get_config_value(&DefaultRegion));
    let env = builder.get_config_value(&AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp));
    let plain = may_be_plain(endpoint.as_deref(), access, env.as_deref())?;
    if let Some(endpoint) = &endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    if let Some(region) = &region {
        builder = builder.with_region(region.clone());
    }
    let store = builder
        .with_bucket_name(reference.bucket().0)
        .with_allow_http(plain)
        .with_retry(once())
        .with_http_connector(Connector)
        .build();
    provider(
        reference,
        store,
        [("endpoint", endpoint), ("region", region)],
    )
}

fn google(reference: &LayoutReference, access: Access) -> Result<Provider> {
    let mut builder = GoogleCloudStorageBuilder::from_env();
    let endpoint =
        said(reference, "endpoint").or(builder.get_config_value(&GoogleConfigKey::BaseUrl));
    let env = builder.get_config_value(&GoogleConfigKey::Client(ClientConfigKey::AllowHttp));
    let plain = may_be_plain(endpoint.as_deref(), access, env.as_deref())?;
    if let Some(endpoint) = &endpoint {
        builder = builder.with_config(GoogleConfigKey::BaseUrl, endpoint);
    }
    let store = builder
        .with_bucket_name(reference.bucket().0)
        .with_config(
            GoogleConfigKey::Client(ClientConfigKey::AllowHttp),
            plain.to_string(),
        )
        .with_retry(once())
        .with_http_connector(Connector)
        .build();
    provider(reference, store, [("endpoint", endpoint)])
}

fn azure(reference: &LayoutReference, access: Access) -> Result<Provider> {
    let mut builder = MicrosoftAzureBuilder::from_env();
    let endpoint =
        said(reference, "endpoint").or(builder.get_config_value(&AzureConfigKey::Endpoint));
    let account =
        said(reference, "account").or(builder.get_config_value(&AzureConfigKey::AccountName));
    let env = builder.get_config_value(&AzureConfigKey::Client(ClientConfigKey::AllowHttp));
    let plain = may_be_plain(endpoint.as_deref(), access, env.as_deref())?;
    if let Some(endpoint) = &endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    if let Some(account) = &account {
        builder = builder.with_account(account);
    }
    let store = builder
        .with_container_name(reference.bucket().0)
        .with_allow_http(plain)
        .with_retry(once())
        .with_http_connector(Connector)
        .build();
    provider(
        reference,
        store,
        [("account", account), ("endpoint", endpoint)],
    )
}

fn said(reference: &LayoutReference, name: &str) -> Option<String> {
    reference.setting(name).map(str::to_owned)
}

/// What was made for a reference, and what is noted of where it is.
fn provider<S: ObjectStore + MultipartStore, const N: usize>(
    reference: &LayoutReference,
    store: object_store::Result<S>,
    known: [(&str, Option<String>); N],
) -> Result<Provider> {
    let store = Arc::new(store.map_err(|error| unusable(reference, &error))?);
    let known = known.into_iter();
    Ok(Provider {
        store: store.clone(),
        parts: store,
        settings: known
            .filter_map(|(name, value)| Some((name.to_owned(), value?)))
            .collect(),
    })
}

/// Whether a store is spoken to without TLS: on this host, or where somebody says so.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for an address of plain http elsewhere, of which nobody says so.
fn may_be_plain(endpoint: Option<&str>, access: Access, env: Option<&str>) -> Result<bool> {
    let Some(endpoint) = endpoint else {
        return Ok(access.plain_http);
    };
    let bad = |why: &str| {
        let text = format!("the object store's address {endpoint:?} {why}");
        Error::new(ErrorKind::InvalidInput, text)
    };
    let url = Url::parse(endpoint);
    let url = url.map_err(|error| bad(&format!("is none: {error}; write https://HOST[:PORT]")))?;
    // It is noted beside layers, as a part of a reference.
    if !url.username().is_empty()
        || url.password().is_some()
        || url.query().is_some()
        || url.fragment().is_some()
    {
        let text = "the object store's address holds a name, a password, a query or a fragment: write https://HOST[:PORT], \
                    and give credentials as docs/object-stores.md has it";
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    match url.scheme() {
        "https" => Ok(access.plain_http),
        "http" => {
            let host = url.host_str().unwrap_or("");
            match is_local(host) || access.plain_http || env == Some("true") {
                true => Ok(true),
                false => Err(bad(
                    "has no TLS, and is not this host: write https://, or give --plain-http",
                )),
            }
        }
        _ => Err(bad("is neither http:// nor https://")),
    }
}

fn unusable(reference: &LayoutReference, error: &object_store::Error) -> Error {
    let text = format!(
        "{} cannot be used: {}; see docs/object-stores.md for what its provider needs to know",
        reference.layout(),
        innermost(error)
    );
    Error::new(ErrorKind::InvalidInput, text)
}

/// Whether what is not there is the bucket itself.
pub(super) fn no_bucket(error: &object_store::Error) -> bool {
    let text = error.to_string();
    let known = [
        "NoSuchBucket",
        "ContainerNotFound",
        "specified bucket does not exist",
    ];
    known.iter().any(|words| text.contains(words))
}

/// What a store says, as a user is told it.
pub(super) fn failure(doing: &str, error: &object_store::Error) -> Failure {
    use object_store::Error as Store;
    let text = error.to_string();
    let (kind, advice) = match error {
        Store::NotFound { .. } if no_bucket(error) => (
            ErrorKind::NotFound,
            "; make the bucket first: it is not made by a push",
        ),
        Store::NotFound { .. } => (ErrorKind::NotFound, ""),
        Store::PermissionDenied { .. } | Store::Unauthenticated { .. } => (
            ErrorKind::Permission,
            "; look whether the credentials in the environment are right, and may do that with this bucket",
        ),
        // Where object_store looks when it was told of none.
        _ if text.contains("169.254.169.254") => (
            ErrorKind::Permission,
            "; there are no credentials in the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for example",
        ),
        _ => (ErrorKind::Io, ""),
    };
    let passes = kind == ErrorKind::Io && matches!(error, Store::Generic { .. }) && passes(&text);
    let text = format!("{doing}: {}{advice}", innermost(error));
    Failure {
        passes,
        ..Error::new(kind, text).into()
    }
}

/// Whether it may go well another time: no answer, or one that says so.
fn passes(text: &str) -> bool {
    let Some((_, status)) = text.split_once("status code: ") else {
        return !text.contains("invalid peer certificate");
    };
    let known = ["408", "429", "500", "502", "503", "504"];
    known.iter().any(|known| status.starts_with(known))
}

/// The cause of an error that says the most: what the store said, else what happened to the connection.
fn innermost(error: &object_store::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let text = cause.to_string();
    let tagged = |tag: &str| {
        let (_, rest) = text.split_once(&format!("<{tag}>"))?;
        let (said, _) = rest.split_once(&format!("</{tag}>"))?;
        Some(said.to_owned())
    };
    let said = match (tagged("Code"), tagged("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        _ => text,
    };
    let said = said.replace(char::is_control, " ");
    said.chars().take(SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_spoken_to_without_tls_unless_somebody_says_so() {
        let said = Access { plain_http: true };
        let not = Access::default();
        for (endpoint, access, env, plain) in [
            (None, not, None, Some(false)),
            (Some("https://s3.example"), not, None, Some(false)),
            (Some("http://127.0.0.1:8333"), not, None, Some(true)),
            (Some("http://s3.example"), not, None, None),
            (Some("http://s3.example"), said, None, Some(true)),
            (Some("http://s3.example"), not, Some("true"), Some(true)),
            (Some("ftp://127.0.0.1"), not, None, None),
            (Some("127.0.0.1:8333"), not, None, None),
        ] {
            let decided = may_be_plain(endpoint, access, env).ok();
            assert_eq!(decided, plain, "{endpoint:?} {access:?} {env:?}");
        }
    }

    #[test]
    fn what_a_store_says_comes_without_its_markup_and_passes_as_it_should() {
        let generic = |text: &str| object_store::Error::Generic {
            store: "S3",
            source: text.to_owned().into(),
        };
        let slow = failure(
            "reading",
            &generic(
                "non-2xx status code: 503 Slow: <Code>SlowDown</Code><Message>later</Message>",
            ),
        );
        assert!(slow.passes);
        assert_eq!(slow.error.to_string(), "reading: SlowDown: later");
        assert!(failure("reading", &generic("connection refused")).passes);
        assert!(!failure("reading", &generic("status code: 400 Bad Request: ")).passes);
    }
}
