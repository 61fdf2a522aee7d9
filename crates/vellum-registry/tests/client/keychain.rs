//! Credentials that others know: they are asked for whenever the registry asks who it is, and a refusal passes where
//! better ones may come.

use std::sync::{Arc, Mutex};

use vellum_base::ErrorKind;
use vellum_registry::{Access, Credential, Keychain, Ranges, Reference, Seen};

use crate::fake::{answer, digest, serve, serve_with_tokens, some_bytes};
use crate::ranges::part;

/// What is known now, and what to do where that is not enough.
#[derive(Debug, Default)]
struct Knows {
    credential: Mutex<Option<Credential>>,
    advice: Option<String>,
}

impl Keychain for Knows {
    fn find(&self, _: &str, repository: &str, _: &[Credential]) -> Option<Credential> {
        assert_eq!(repository, "team/web");
        self.credential.lock().unwrap().clone()
    }

    fn advice(&self) -> Option<&str> {
        self.advice.as_deref()
    }
}

fn ranges(host: &str, keychain: &Arc<Knows>) -> Ranges {
    let reference = Reference::parse(&format!("{host}/team/web:1")).unwrap();
    let seen = Arc::new(Seen::knowing(keychain.clone()));
    Ranges::open(&reference, Access::default(), &seen).unwrap()
}

#[test]
fn a_refusal_passes_until_the_credential_becomes_known_which_is_used_at_once() {
    let bytes = some_bytes();
    let served = bytes.clone();
    let (host, _) = serve_with_tokens(move |request, token, _| {
        (token == "good").then(|| part(request, &served))
    });
    let keychain = Arc::new(Knows {
        advice: Some("pull it again".into()),
        ..Knows::default()
    });
    let ranges = ranges(&host, &keychain);
    let get = || ranges.get(&digest(&bytes), 1000..2000);
    for known in [None, Some("bad"), None] {
        let credential = known.map(|token| Credential::RegistryToken(token.into()));
        *keychain.credential.lock().unwrap() = credential;
        let failure = get().unwrap_err();
        assert!(failure.passes, "{failure:?}");
        assert_eq!(failure.error.kind(), ErrorKind::Permission);
        let text = failure.error.to_string();
        assert!(text.ends_with("; or pull it again"), "{text}");
    }
    let good = Credential::RegistryToken("good".into());
    *keychain.credential.lock().unwrap() = Some(good);
    assert_eq!(&*get().unwrap(), &bytes[1000..2000]);
}

#[test]
fn a_registry_that_forbids_without_asking_is_told_anew_who_it_is_the_next_time() {
    let bytes = some_bytes();
    let served = bytes.clone();
    // As some do for who is not known: a token for everybody, which opens nothing.
    let (host, _) = serve_with_tokens(move |request, token, _| match token {
        "none" => None,
        "good" => Some(part(request, &served)),
        _ => Some(answer("403 Forbidden", &[], b"{}")),
    });
    let keychain = Arc::new(Knows {
        advice: Some("pull it again".into()),
        ..Knows::default()
    });
    let ranges = ranges(&host, &keychain);
    let get = || ranges.get(&digest(&bytes), 0..10);
    let failure = get().unwrap_err();
    assert!(failure.passes, "{failure:?}");
    let good = Credential::RegistryToken("good".into());
    *keychain.credential.lock().unwrap() = Some(good);
    assert_eq!(&*get().unwrap(), &bytes[..10]);
}

#[test]
fn a_refusal_stays_one_where_nothing_better_can_come() {
    let challenge = "WWW-Authenticate: Basic realm=\"here\"";
    let (host, seen) = serve(
        |_, _| 0,
        move |_, _| answer("401 Unauthorized", &[challenge], b"{}"),
    );
    let password = Credential::Password {
        user: "user".into(),
        password: "secret".into(),
    };
    let keychain = Arc::new(Knows {
        credential: Mutex::new(Some(password)),
        advice: None,
    });
    let failure = ranges(&host, &keychain).get(&digest(b""), 0..10);
    let failure = failure.unwrap_err();
    assert!(!failure.passes, "{failure:?}");
    assert_eq!(failure.error.kind(), ErrorKind::Permission);
    let seen = seen.lock().unwrap();
    let sent = seen.last().unwrap().header("authorization");
    assert_eq!(sent, Some("Basic dXNlcjpzZWNyZXQ="));
}

/// What the child of [`an_expired_credential_of_a_keychain_gives_place_to_the_nodes`] is told by.
const CHILD: &str = "VELLUM_TEST_NODES_CREDENTIALS";

/// A registry whose blobs are for the token `good` alone, which its token server gives for a name and a password. Who
/// is nobody gets another, for which there is nothing; refresh tokens are revoked.
fn serve_hiding(bytes: Vec<u8>) -> (String, Arc<Mutex<Vec<crate::fake::Request>>>) {
    serve(
        |_, _| 0,
        move |request, _| {
            let sent = request.header("authorization").unwrap_or("none");
            if request.path.starts_with("/token") {
                return match (request.method.as_str(), sent.starts_with("Basic ")) {
                    ("POST", _) => answer("400 Bad Request", &[], br#"{"error":"invalid_grant"}"#),
                    (_, true) => answer("200 OK", &[], br#"{"token":"good"}"#),
                    (_, false) => answer("200 OK", &[], br#"{"token":"nobody"}"#),
                };
            }
            match sent {
                "Bearer good" => part(request, &bytes),
                "Bearer nobody" => answer("404 Not Found", &[], b"{}"),
                "Bearer forbidden" => answer("403 Forbidden", &[], b"{}"),
                _ => {
                    let host = request.header("host").unwrap();
                    let challenge =
                        format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\"");
                    answer("401 Unauthorized", &[&challenge], b"{}")
                }
            }
        },
    )
}

#[test]
fn an_expired_credential_of_a_keychain_gives_place_to_the_nodes() {
    // The node's are where the environment says, which is the same for all of a process.
    if std::env::var_os(CHILD).is_none() {
        let dir = tempfile::tempdir().unwrap();
        let test = "keychain::an_expired_credential_of_a_keychain_gives_place_to_the_nodes";
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test])
            .env("DOCKER_CONFIG", dir.path())
            .env(CHILD, "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let bytes = some_bytes();
    for lent in [
        Credential::RegistryToken("expired".into()),
        Credential::RegistryToken("forbidden".into()),
        Credential::IdentityToken("revoked".into()),
    ] {
        let (host, seen) = serve_hiding(bytes.clone());
        let config = format!(r#"{{"auths":{{"{host}":{{"auth":"dXNlcjpzZWNyZXQ="}}}}}}"#);
        let dir = std::env::var("DOCKER_CONFIG").unwrap();
        std::fs::write(format!("{dir}/config.json"), config).unwrap();
        let keychain = Arc::new(Knows {
            credential: Mutex::new(Some(lent)),
            advice: Some("pull it again".into()),
        });
        let ranges = ranges(&host, &keychain);
        for from in [0, 1000] {
            let got = ranges.get(&digest(&bytes), from..from + 10).unwrap();
            assert_eq!(&*got, &bytes[from as usize..][..10]);
        }
        // It is not tried again with every request.
        assert!(seen.lock().unwrap().len() <= 6);
    }
}

#[test]
fn a_revoked_token_and_a_repository_that_is_hidden_from_nobody_wait_for_a_better_credential() {
    let bytes = some_bytes();
    let (host, _) = serve_hiding(bytes.clone());
    let keychain = Arc::new(Knows {
        advice: Some("pull it again".into()),
        ..Knows::default()
    });
    let ranges = ranges(&host, &keychain);
    let get = || ranges.get(&digest(&bytes), 0..10);
    for known in [
        None,
        Some(Credential::IdentityToken("revoked".into())),
        None,
    ] {
        *keychain.credential.lock().unwrap() = known;
        let failure = get().unwrap_err();
        assert!(failure.passes, "{failure:?}");
        let text = failure.error.to_string();
        assert!(text.ends_with("; or pull it again"), "{text}");
    }
    let good = Credential::RegistryToken("good".into());
    *keychain.credential.lock().unwrap() = Some(good);
    assert_eq!(&*get().unwrap(), &bytes[..10]);
}
