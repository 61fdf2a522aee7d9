//! A registry that fails in every way that passes: what is sent and fetched is whole all the same.

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vellum_base::ErrorKind;
use vellum_registry::{Descriptor, Outcome, Push, Upload};

use crate::fake::{Request, answer, digest, serve, serve_with_tokens, session, some_bytes};

fn wanted(bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: None,
        artifact_type: None,
        digest: digest(bytes),
        size: bytes.len() as u64,
        annotations: None,
        platform: None,
    }
}

fn fetch(host: &str, bytes: &[u8]) -> vellum_base::Result<()> {
    let dir = tempfile::tempdir().unwrap();
    session(host).fetch(&[wanted(bytes)], dir.path(), None)?;
    let name = digest(bytes).replacen(':', "/", 1);
    assert_eq!(
        fs::read(dir.path().join("blobs").join(name)).unwrap(),
        bytes
    );
    Ok(())
}

#[test]
fn a_download_goes_on_where_it_broke_off() {
    let bytes = some_bytes();
    let served = bytes.clone();
    let (host, seen) = serve(
        |_, _| 0,
        move |request, _| {
            let range = request.header("range").map(str::to_owned);
            let from: usize = range.map_or(0, |range| {
                let from = range
                    .strip_prefix("bytes=")
                    .unwrap()
                    .strip_suffix('-')
                    .unwrap();
                from.parse().unwrap()
            });
            let to = (from + 400_000).min(served.len());
            // The length of all that is left, and less than that.
            let length = format!("Content-Length: {}", served.len() - from);
            let range = format!(
                "Content-Range: bytes {from}-{}/{}",
                served.len() - 1,
                served.len()
            );
            let status = if from == 0 {
                "200 OK"
            } else {
                "206 Partial Content"
            };
            answer(status, &[&length, &range], &served[from..to])
        },
    );
    fetch(&host, &bytes).unwrap();
    let ranges: Vec<_> = seen
        .lock()
        .unwrap()
        .iter()
        .map(|request| request.header("range").map(str::to_owned))
        .collect();
    assert!(
        ranges.len() >= 3 && ranges[0].is_none() && ranges[1].is_some(),
        "{ranges:?}"
    );
}

#[test]
fn a_server_that_knows_no_ranges_is_asked_for_all_of_it_again() {
    let bytes = some_bytes();
    let served = bytes.clone();
    let (host, _) = serve(
        |_, _| 0,
        move |_, number| {
            let to = if number == 0 { 300_000 } else { served.len() };
            let length = format!("Content-Length: {}", served.len());
            answer("200 OK", &[&length], &served[..to])
        },
    );
    fetch(&host, &bytes).unwrap();
}

#[test]
fn a_short_body_that_ends_in_order_is_no_blob() {
    let bytes = some_bytes();
    let served = bytes.clone();
    let (host, _) = serve(
        |_, _| 0,
        move |request, _| match request.header("range") {
            None => answer("200 OK", &[], &served[..1000]),
            Some(_) => answer("416 Range Not Satisfiable", &[], b""),
        },
    );
    let error = fetch(&host, &bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(
        error
            .to_string()
            .contains("there are 1000 bytes of 1000000"),
        "{error}"
    );
}

#[test]
fn a_registry_that_is_busy_is_asked_again_when_it_says() {
    let bytes = some_bytes();
    let served = bytes.clone();
    let (host, _) = serve(
        |_, _| 0,
        move |_, number| match number {
            0 => answer("429 Too Many Requests", &["Retry-After: 2"], b"{}"),
            1 => answer("503 Service Unavailable", &[], b"busy"),
            _ => answer("200 OK", &[], &served),
        },
    );
    let since = Instant::now();
    fetch(&host, &bytes).unwrap();
    assert!(since.elapsed() >= Duration::from_secs(2));
}

fn push(host: &str, bytes: &[u8]) -> vellum_base::Result<Vec<Outcome>> {
    push_from(host, bytes, None)
}

/// A push of what another repository may have.
fn push_from(host: &str, bytes: &[u8], from: Option<&str>) -> vellum_base::Result<Vec<Outcome>> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    let push = Push {
        blobs: vec![Upload {
            digest: digest(bytes),
            size: bytes.len() as u64,
            path: file.path().to_owned(),
            from: from.map(str::to_owned),
        }],
        documents: Vec::new(),
    };
    let outcomes = std::cell::RefCell::new(Vec::new());
    session(host).push(&push, None, &|_, outcome| {
        outcomes.borrow_mut().push(outcome)
    })?;
    Ok(outcomes.into_inner())
}

/// A registry that takes uploads, and says of the first one, after 300,000 bytes, that it has a problem.
fn uploads(how_far: Option<&'static str>) -> (String, Arc<Mutex<Vec<Request>>>) {
    serve(
        |request, number| match (request.method.as_str(), number) {
            ("PUT", 2) => 300_000,
            _ => usize::MAX,
        },
        move |request, number| match (request.method.as_str(), number) {
            ("HEAD", _) => answer("404 Not Found", &[], b""),
            ("POST", _) => answer(
                "202 Accepted",
                &["Location: /v2/team/web/blobs/uploads/u?state=1"],
                b"",
            ),
            ("PUT", 2) => answer("503 Service Unavailable", &[], b""),
            ("GET", _) => match how_far {
                Some(range) => {
                    let location = "Location: /v2/team/web/blobs/uploads/u?state=2";
                    answer("204 No Content", &[location, range], b"")
                }
                None => answer("404 Not Found", &[], b""),
            },
            ("PATCH", _) => answer(
                "202 Accepted",
                &["Location: /v2/team/web/blobs/uploads/u?state=3"],
                b"",
            ),
            _ => answer("201 Created", &[], b""),
        },
    )
}

#[test]
fn an_upload_goes_on_where_the_registry_says() {
    let bytes = some_bytes();
    let (host, seen) = uploads(Some("Range: 0-299999"));
    assert_eq!(push(&host, &bytes).unwrap(), [Outcome::Sent]);
    let seen = seen.lock().unwrap();
    let patch = seen
        .iter()
        .find(|request| request.method == "PATCH")
        .unwrap();
    assert_eq!(patch.header("content-range"), Some("300000-999999"));
    assert_eq!(patch.body, bytes[300_000..]);
    assert!(patch.path.contains("state=2"), "{}", patch.path);
    let last = seen.last().unwrap();
    assert_eq!((last.method.as_str(), last.body.len()), ("PUT", 0));
    assert!(
        last.path.contains("state=3") && last.path.contains("digest=sha256"),
        "{}",
        last.path
    );
}

#[test]
fn an_upload_begins_anew_where_the_registry_does_not_say_how_far_it_came() {
    let bytes = some_bytes();
    // The second is what some say of nothing.
    for how_far in [None, Some("Range: 0-0")] {
        let (host, seen) = uploads(how_far);
        assert_eq!(push(&host, &bytes).unwrap(), [Outcome::Sent]);
        let seen = seen.lock().unwrap();
        let methods: Vec<_> = seen.iter().map(|request| request.method.as_str()).collect();
        assert_eq!(
            methods,
            ["HEAD", "POST", "PUT", "GET", "HEAD", "POST", "PUT"]
        );
        assert_eq!(seen.last().unwrap().body, bytes);
    }
}

#[test]
fn what_another_repository_is_said_to_have_and_has_not_is_sent() {
    let bytes = some_bytes();
    let (host, seen) = serve(
        |_, _| usize::MAX,
        |request, _| match request.method.as_str() {
            "POST" if request.path.contains("mount=") => answer("404 Not Found", &[], b""),
            "POST" => answer("202 Accepted", &["Location: /v2/team/web/u"], b""),
            "HEAD" => answer("404 Not Found", &[], b""),
            _ => answer("201 Created", &[], b""),
        },
    );
    let outcomes = push_from(&host, &bytes, Some("team/gone")).unwrap();
    assert_eq!(outcomes, [Outcome::Sent]);
    assert_eq!(seen.lock().unwrap().last().unwrap().body, bytes);
}

#[test]
fn who_asks_is_said_to_the_registry_alone() {
    let bytes = some_bytes();
    let (elsewhere, there) = serve(|_, _| usize::MAX, |_, _| answer("201 Created", &[], b""));
    let address = Arc::new(Mutex::new(String::new()));
    let own = address.clone();
    let (host, seen) = serve(
        |_, _| usize::MAX,
        move |request, _| {
            if request.path.starts_with("/token") {
                return answer("200 OK", &[], br#"{"token":"secret"}"#);
            }
            let realm = own.lock().unwrap().clone();
            let challenge = format!(r#"WWW-Authenticate: Bearer realm="http://{realm}/token""#);
            let location = format!("Location: http://{elsewhere}/upload");
            match (request.header("authorization"), request.method.as_str()) {
                (None, _) => answer("401 Unauthorized", &[&challenge], b"{}"),
                (_, "HEAD") => answer("404 Not Found", &[], b""),
                _ => answer("202 Accepted", &[&location], b""),
            }
        },
    );
    address.lock().unwrap().clone_from(&host);
    assert_eq!(push(&host, &bytes).unwrap(), [Outcome::Sent]);
    let asked = seen.lock().unwrap();
    let posted = asked.last().unwrap();
    assert_eq!(posted.header("authorization"), Some("Bearer secret"));
    let there = there.lock().unwrap();
    assert_eq!(there[0].body, bytes);
    assert_eq!(
        there[0].header("authorization"),
        None,
        "{:?}",
        there[0].headers
    );
}

#[test]
fn an_index_leads_by_digests_alone() {
    let index = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[
        {"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"latest","size":2}]}"#;
    let (host, seen) = serve(
        |_, _| 0,
        move |_, _| {
            let kind = "Content-Type: application/vnd.oci.image.index.v1+json";
            answer("200 OK", &[kind], index.as_bytes())
        },
    );
    let error = session(&host)
        .find(&vellum_image::Platform::host())
        .unwrap_err();
    assert!(error.to_string().contains("latest"), "{error}");
    assert_eq!(seen.lock().unwrap().len(), 1);
}

#[test]
fn tokens_are_fetched_for_all_that_is_done_and_anew_when_they_have_expired() {
    let bytes = some_bytes();
    let served = bytes.clone();
    let (host, seen) = serve_with_tokens(move |_, token, number| match (token, number) {
        // The first token does for one request.
        ("t1", 2) => Some(answer("404 Not Found", &[], b"")),
        ("t4", _) => Some(answer("200 OK", &[], &served)),
        _ => None,
    });
    let session = session(&host);
    let dir = tempfile::tempdir().unwrap();
    session.try_push().unwrap_err();
    session.fetch(&[wanted(&bytes)], dir.path(), None).unwrap();
    let seen = seen.lock().unwrap();
    let asked: Vec<_> = seen
        .iter()
        .filter(|request| request.path.starts_with("/token"))
        .collect();
    assert_eq!(asked.len(), 2);
    assert!(
        asked[0]
            .path
            .contains("scope=repository%3Ateam%2Fweb%3Apull%2Cpush"),
        "{}",
        asked[0].path
    );
    assert!(asked[0].path.contains("service=here"), "{}", asked[0].path);
    assert!(
        asked[1]
            .path
            .contains("scope=repository%3Ateam%2Fweb%3Apull"),
        "{}",
        asked[1].path
    );
}
