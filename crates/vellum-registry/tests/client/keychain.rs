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
    fn find(&self, _: &str, repository: &str) -> Option<Credential> {
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
