//! Why a request failed, and whether it is worth another try.

use std::time::Duration;

use reqwest::header::RETRY_AFTER;
use reqwest::{Response, StatusCode};
use serde::Deserialize;
use vellum_base::error::{Error, ErrorKind};

/// The longest pause that a registry may ask for.
const MAX_PAUSE: Duration = Duration::from_secs(300);
/// Bytes of an answer that are read for its words.
const MAX_WORDS: usize = 16 << 10;
/// What glibc says of a host that is not there, rather than not to be found for the moment (EAI_NONAME), and rustls of
/// a certificate that is not believed, ours too, and of a server that does not speak TLS. The layers between keep their kinds to
/// themselves.
const STAYS: [&str; 6] = [
    "Name or service not known",
    "invalid peer certificate",
    "received corrupt message",
    "received fatal alert: CertificateRequired",
    "received fatal alert: UnknownCA",
    "received fatal alert: BadCertificate",
];
/// How long they may take to come.
const MAX_SPEECH: Duration = Duration::from_secs(5);
/// Characters of a registry's words that are shown.
const SHOWN: usize = 300;

/// A request that failed.
#[derive(Debug)]
pub struct Failure {
    /// What a user is told, where nothing else helps.
    pub error: Error,
    /// It may go well another time.
    pub passes: bool,
    /// When the registry wants to be asked again.
    pub after: Option<Duration>,
    /// The registry has more to do than it can (429, 503).
    pub is_busy: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure {
            error,
            passes: false,
            after: None,
            is_busy: false,
        }
    }
}

impl Failure {
    /// One that passes.
    pub fn passing(error: Error) -> Self {
        Failure {
            passes: true,
            ..error.into()
        }
    }

    /// No answer came, or not all of it.
    pub(crate) fn unanswered(host: &str, doing: &str, error: &reqwest::Error) -> Self {
        let mut causes = String::new();
        let mut cause: Option<&dyn std::error::Error> = Some(error);
        while let Some(error) = cause {
            cause = error.source();
            // The innermost says what happened, those around it where.
            if cause.is_none() {
                causes = error.to_string();
            }
        }
        let advice = match error.is_connect() {
            true => {
                ": look whether the name is right, the registry runs and this host reaches it (--plain-http for one \
                 without TLS)"
            }
            false => "",
        };
        let text = format!("{doing}: no answer from {host}: {causes}{advice}");
        Failure {
            // A request that cannot be made and a redirection without an end stay what they are.
            passes: !error.is_builder()
                && !error.is_redirect()
                && !STAYS.iter().any(|words| causes.contains(words)),
            ..Error::new(ErrorKind::Io, text).into()
        }
    }

    /// The registry answered that it will not.
    pub(crate) async fn refused(host: &str, doing: &str, response: Response) -> Self {
        let status = response.status();
        let after = response.headers().get(RETRY_AFTER);
        let after = after.and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let words = words(response).await;
        let (kind, advice) = match status {
            StatusCode::UNAUTHORIZED => (
                ErrorKind::Permission,
                format!("; `vellum login {host}` gives it a name and a password"),
            ),
            StatusCode::FORBIDDEN => (
                ErrorKind::Permission,
                "; look whether the account may do that in this repository".into(),
            ),
            StatusCode::NOT_FOUND => (ErrorKind::NotFound, String::new()),
            StatusCode::RANGE_NOT_SATISFIABLE => (ErrorKind::Corrupt, String::new()),
            StatusCode::TOO_MANY_REQUESTS => (
                ErrorKind::Io,
                "; wait, or log in for a higher limit (`vellum login`)".into(),
            ),
            _ => (ErrorKind::Io, String::new()),
        };
        let text = format!("{doing}: {host} answers {status}{words}{advice}");
        Failure {
            error: Error::new(kind, text),
            passes: matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504),
            after: after.map(|seconds| Duration::from_secs(seconds).min(MAX_PAUSE)),
            is_busy: matches!(status.as_u16(), 429 | 503),
        }
    }
}

#[derive(Deserialize)]
struct Errors {
    errors: Vec<Said>,
}

#[derive(Deserialize)]
struct Said {
    code: Option<String>,
    message: Option<String>,
}

/// What a registry says of a failure, for people.
async fn words(mut response: Response) -> String {
    let mut bytes = Vec::new();
    let read = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            bytes.extend_from_slice(&chunk);
            if bytes.len() >= MAX_WORDS {
                break;
            }
        }
    };
    // Who does not come to an end has said enough.
    let _ = tokio::time::timeout(MAX_SPEECH, read).await;
    let said: Option<Errors> = serde_json::from_slice(&bytes).ok();
    let said = said.and_then(|said| said.errors.into_iter().next());
    let said: Vec<String> = said
        .into_iter()
        .flat_map(|said| [said.code, said.message])
        .flatten()
        .collect();
    if said.is_empty() {
        return String::new();
    }
    let text = said.join(": ").replace(char::is_control, " ");
    let text: String = text.chars().take(SHOWN).collect();
    format!(" ({text})")
}
