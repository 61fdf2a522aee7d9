//! Parts of blobs from a registry that fails: each failure is told from the others, by whether it passes and when, and what
//! is not exactly the bytes that were asked for is never given out.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use vellum_base::ErrorKind;
use vellum_registry::{Access, Failure, Ranges, Reference};

use crate::fake::{Answer, Request, answer, digest, serve, serve_with_tokens, some_bytes};

fn ranges(host: &str) -> Ranges {
    let reference = Reference::parse(&format!("{host}/team/web:1")).unwrap();
    Ranges::open(&reference, Access::default(), &Arc::default()).unwrap()
}

/// The part of the bytes that a request asks for.
pub fn part(request: &Request, bytes: &[u8]) -> Answer {
    let range = request.header("range").expect("a range is asked for");
    let (from, last) = range
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'))
        .unwrap();
    let (from, last): (usize, usize) = (from.parse().unwrap(), last.parse().unwrap());
    let header = format!("Content-Range: bytes {from}-{last}/{}", bytes.len());
    answer("206 Partial Content", &[&header], &bytes[from..=last])
}

/// What comes of asking for bytes 1000 to 1999 of a server whose first answers are these.
fn asked(first: Vec<Answer>) -> (Result<Vec<u8>, Failure>, Vec<u8>) {
    let bytes = some_bytes();
    let served = bytes.clone();
    let first = Mutex::new(first.into_iter());
    let (host, _) = serve(
        |_, _| 0,
        move |request, _| match first.lock().unwrap().next() {
            Some(answer) => answer,
            None => part(request, &served),
        },
    );
    let got = ranges(&host).get(&digest(&bytes), 1000..2000);
    (got.map(|part| part.to_vec()), bytes[1000..2000].to_vec())
}

#[test]
fn exactly_the_bytes_that_were_asked_for_come() {
    let (got, wanted) = asked(vec![]);
    assert_eq!(got.unwrap(), wanted);
}

#[test]
fn a_busy_registry_passes_and_says_when() {
    let busy = answer("429 Too Many Requests", &["Retry-After: 7"], b"{}");
    let failure = asked(vec![busy]).0.unwrap_err();
    assert!(failure.passes);
    assert_eq!(failure.after, Some(Duration::from_secs(7)));
    for status in [
        "500 Oh",
        "502 Bad Gateway",
        "503 Busy",
        "504 Late",
        "408 Late",
    ] {
        let failure = asked(vec![answer(status, &[], b"busy")]).0.unwrap_err();
        assert!(failure.passes && failure.after.is_none(), "{status}");
    }
}

#[test]
fn what_the_registry_has_not_or_will_not_give_stays() {
    for (status, kind) in [
        ("404 Not Found", ErrorKind::NotFound),
        ("403 Forbidden", ErrorKind::Permission),
        ("416 Range Not Satisfiable", ErrorKind::Corrupt),
    ] {
        let failure = asked(vec![answer(status, &[], b"{}")]).0.unwrap_err();
        assert!(!failure.passes, "{status}");
        assert_eq!(failure.error.kind(), kind, "{status}");
    }
}

#[test]
fn other_bytes_than_those_are_refused_however_they_are_called() {
    let bytes = some_bytes();
    let whole = answer("200 OK", &[], &bytes);
    let header = format!("Content-Range: bytes 0-999/{}", bytes.len());
    let other = answer("206 Partial Content", &[&header], &bytes[..1000]);
    for wrong in [whole, other] {
        let failure = asked(vec![wrong]).0.unwrap_err();
        assert_eq!(failure.error.kind(), ErrorKind::Unsupported);
        assert!(failure.passes, "a cache on the way may have done that");
    }
}

#[test]
fn too_few_and_too_many_bytes_pass_and_are_not_given_out() {
    let bytes = some_bytes();
    let header = format!("Content-Range: bytes 1000-1999/{}", bytes.len());
    for (what, body) in [("few", &bytes[1000..1500]), ("many", &bytes[1000..2500])] {
        let wrong = answer("206 Partial Content", &[&header], body);
        let failure = asked(vec![wrong]).0.unwrap_err();
        assert!(failure.passes, "{what}");
        assert_eq!(failure.error.kind(), ErrorKind::Corrupt, "{what}");
    }
    // It breaks off: more was announced.
    let cut = ["Content-Length: 1000", &header];
    let wrong = answer("206 Partial Content", &cut, &bytes[1000..1300]);
    assert!(asked(vec![wrong]).0.unwrap_err().passes);
}

#[test]
fn a_token_that_has_expired_is_fetched_anew() {
    let bytes = some_bytes();
    let served = bytes.clone();
    let (host, seen) = serve_with_tokens(move |request, token, number| match (token, number) {
        // The first token is good for one request, the second for all that follow.
        ("t1", 2) | ("t4", _) => Some(part(request, &served)),
        _ => None,
    });
    let (ranges, digest) = (ranges(&host), digest(&bytes));
    for start in [0, 5000, 9000] {
        let got = ranges.get(&digest, start..start + 100).unwrap();
        assert_eq!(*got, bytes[start as usize..start as usize + 100]);
    }
    let seen = seen.lock().unwrap();
    let tokens = seen.iter().filter(|one| one.path.starts_with("/token"));
    assert_eq!(tokens.count(), 2);
}

#[test]
fn an_address_that_has_expired_passes_and_the_next_one_is_asked_for() {
    let bytes = some_bytes();
    let served = bytes.clone();
    let (store, seen) = serve(
        |_, _| 0,
        move |request, _| match request.path.contains("signature=2") {
            true => part(request, &served),
            false => answer("403 Forbidden", &[], b"Request has expired"),
        },
    );
    let (host, _) = serve(
        |_, _| 0,
        move |_, number| {
            let to = format!("Location: http://{store}/blob?signature={}", number + 1);
            answer("307 Temporary Redirect", &[&to], b"")
        },
    );
    let (ranges, digest) = (ranges(&host), digest(&bytes));
    let failure = ranges.get(&digest, 10..20).unwrap_err();
    assert!(failure.passes, "{}", failure.error);
    assert_eq!(*ranges.get(&digest, 10..20).unwrap(), bytes[10..20]);
    // What was promised to the registry is not said to others.
    assert!(
        seen.lock()
            .unwrap()
            .iter()
            .all(|one| one.header("authorization").is_none())
    );
}

#[test]
fn a_registry_that_stands_still_is_given_up_and_passes() {
    let bytes = some_bytes();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let failure = ranges(&host).get(&digest(&bytes), 0..100).unwrap_err();
    assert!(failure.passes);
    assert_eq!(failure.error.kind(), ErrorKind::Timeout);
    assert!(
        failure.error.to_string().contains("nothing has moved"),
        "{}",
        failure.error
    );
}
