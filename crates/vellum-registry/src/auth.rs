//! What a registry wants to see before it answers: the distribution specification's "Bearer" tokens (Docker's
//! token specification) and HTTP's "Basic".

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_auth::ChallengeRef;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE};
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use super::client::Http;
use super::credentials::Credential;
use super::failure::Failure;
use vellum_base::error::{Error, ErrorKind, Result};

/// What a token server is told that we are.
const CLIENT_ID: &str = "vellum";

/// What a challenge asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
    },
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// The value of the `Authorization` header with which a registry will answer, by its challenge.
///
/// # Errors
/// [`ErrorKind::Permission`] where it wants a name and a password and there are none, or they are wrong.
pub(crate) async fn authorization(
    http: &Http,
    challenge: &str,
    scopes: &[String],
    credential: Option<&Credential>,
) -> Result<String, Failure> {
    let host = &http.host;
    match (wanted(challenge), credential) {
        (Some(Wanted::Basic), Some(Credential::Password { user, password })) => {
            Ok(basic(user, password))
        }
        (Some(Wanted::Bearer { .. }), Some(Credential::RegistryToken(token))) => {
            Ok(format!("Bearer {token}"))
        }
        (Some(Wanted::Bearer { realm, service }), credential) => {
            let url = token_url(http, &realm)?;
            let token = fetch_token(http, url, service.as_deref(), scopes, credential).await?;
            Ok(format!("Bearer {token}"))
        }
        (Some(Wanted::Basic), _) => Err(Error::new(
            ErrorKind::Permission,
            format!("{host} wants a name and a password: `vellum login {host}`"),
        )
        .into()),
        (None, _) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("{host} asks for a way to log in that is not known here: {challenge:?}"),
        )
        .into()),
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// The first challenge that can be answered.
fn wanted(challenge: &str) -> Option<Wanted> {
    let challenges = http_auth::parse_challenges(challenge).ok()?;
    challenges.iter().find_map(|challenge| {
        let scheme = challenge.scheme;
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Wanted::Basic);
        }
        let realm = parameter(challenge, "realm")?;
        scheme
            .eq_ignore_ascii_case("bearer")
            .then(|| Wanted::Bearer {
                realm,
                service: parameter(challenge, "service"),
            })
    })
}

fn parameter(challenge: &ChallengeRef<'_>, name: &str) -> Option<String> {
    let mut parameters = challenge.params.iter();
    let found = parameters.find(|(key, _)| key.eq_ignore_ascii_case(name));
    found.map(|(_, value)| value.to_unescaped())
}

/// Where tokens come from. Passwords that came to the registry by TLS go on so.
fn token_url(http: &Http, realm: &str) -> Result<Url> {
    let url = Url::parse(realm).ok();
    let url = url.filter(|url| url.scheme() == "https" || url.scheme() == "http" && !http.is_tls);
    url.ok_or_else(|| {
        Error::new(
            ErrorKind::Protocol,
            format!(
                "{} names {realm:?} as the place of tokens, which is no https address",
                http.host
            ),
        )
    })
}

async fn fetch_token(
    http: &Http,
    mut url: Url,
    service: Option<&str>,
    scopes: &[String],
    credential: Option<&Credential>,
) -> Result<String, Failure> {
    let doing = format!(
        "asking {} for a token",
        url.host_str().unwrap_or("its server")
    );
    let mut asked: Vec<(&str, &str)> = Vec::new();
    asked.extend(service.map(|service| ("service", service)));
    let request = match credential {
        Some(Credential::IdentityToken(token)) => {
            let scope = scopes.join(" ");
            asked.extend([
                ("grant_type", "refresh_token"),
                ("client_id", CLIENT_ID),
                ("refresh_token", token),
                ("scope", &scope),
            ]);
            let mut form = url.clone();
            form.set_query(None);
            form.query_pairs_mut().extend_pairs(asked);
            let body = form.query().map(str::to_owned).unwrap_or_default();
            let request = http.client.post(url);
            request
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(body)
        }
        other => {
            asked.extend(scopes.iter().map(|scope| ("scope", scope.as_str())));
            url.query_pairs_mut().extend_pairs(asked);
            let request = http.client.get(url);
            match other {
                Some(Credential::Password { user, password }) => {
                    request.header(AUTHORIZATION, basic(user, password))
                }
                _ => request,
            }
        }
    };
    let response = http.answer(&doing, request).await?;
    if !response.status().is_success() {
        let status = response.status();
        let mut failure = Failure::refused(&http.host, &doing, response).await;
        // RFC 6749, 5.2: `invalid_grant`, a refresh token that was revoked or has expired.
        if status == StatusCode::BAD_REQUEST && credential.is_some() {
            failure.error = Error::new(ErrorKind::Permission, failure.error.to_string());
        }
        return Err(failure);
    }
    let bytes = http.body(&doing, response).await?;
    let token: Option<Token> = serde_json::from_slice(&bytes).ok();
    let token = token.and_then(|token| token.token.or(token.access_token));
    token.ok_or_else(|| {
        let text = format!("{doing}: there is no token in the answer");
        Error::new(ErrorKind::Protocol, text).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_as_registries_write_them() {
        let bearer = |realm: &str, service: Option<&str>| {
            Some(Wanted::Bearer {
                realm: realm.into(),
                service: service.map(str::to_owned),
            })
        };
        for (challenge, expected) in [
            (r#"Basic realm="Registry Realm""#, Some(Wanted::Basic)),
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a:pull""#,
                bearer("https://auth.docker.io/token", Some("registry.docker.io")),
            ),
            (r#"bearer Realm="https://x/t""#, bearer("https://x/t", None)),
            (r#"Negotiate, Basic realm="x""#, Some(Wanted::Basic)),
            ("Bearer", None),
            ("", None),
        ] {
            assert_eq!(wanted(challenge), expected, "{challenge}");
        }
    }
}
