//! A blob that comes piece by piece in one request: each byte is given out once, in order, and it goes on where it broke off.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use vellum_base::ErrorKind;
use vellum_registry::{Access, Failure, Flow, Ranges, Reference};

use crate::fake::{Answer, Request, answer, digest, serve, some_bytes};

/// What came, how that ended, and what was asked for.
type Streamed = (Vec<u8>, Result<(), Failure>, Vec<Request>);

/// Streams a range of a blob of a server that answers so; `wanted` says after how many bytes there are enough.
fn streamed(range: Range<u64>, wanted: usize, said: Answer) -> Streamed {
    let said = Mutex::new(Some(said));
    let (host, seen) = serve(|_, _| 0, move |_, _| said.lock().unwrap().take().unwrap());
    let reference = Reference::parse(&format!("{host}/team/web:1")).unwrap();
    let ranges = Ranges::open(&reference, Access::default(), &std::sync::Arc::default()).unwrap();
    let mut came = Vec::new();
    let result = ranges.stream(&digest(&some_bytes()), range, |bytes| {
        came.extend_from_slice(bytes);
        Ok(match came.len() >= wanted {
            true => Flow::Stop,
            false => Flow::Go,
        })
    });
    let seen: Vec<Request> = Arc::clone(&seen).lock().unwrap().clone();
    (came, result, seen)
}

#[test]
fn a_whole_blob_comes_in_one_request_without_a_range() {
    let bytes = some_bytes();
    let len = bytes.len() as u64;
    let (came, result, seen) = streamed(0..len, usize::MAX, answer("200 OK", &[], &bytes));
    result.unwrap();
    assert!(came == bytes);
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].header("range"), None);
}

#[test]
fn what_broke_off_goes_on_by_a_range_and_ends_when_there_is_enough() {
    let bytes = some_bytes();
    let len = bytes.len() as u64;
    let header = format!("Content-Range: bytes 1000-{}/{len}", len - 1);
    let part = || answer("206 Partial Content", &[&header], &bytes[1000..]);
    let (came, result, seen) = streamed(1000..len, usize::MAX, part());
    result.unwrap();
    assert!(came == bytes[1000..]);
    assert_eq!(seen[0].header("range"), Some("bytes=1000-"));
    let (came, result, _) = streamed(1000..len, 5, part());
    result.unwrap();
    assert!(came.len() < bytes.len() / 2 && bytes[1000..].starts_with(&came));
}

#[test]
fn a_blob_that_is_cut_off_passes_and_one_that_is_too_long_does_not() {
    let bytes = some_bytes();
    let len = bytes.len() as u64;
    let short = answer("200 OK", &[], &bytes[..5000]);
    let (came, result, _) = streamed(0..len, usize::MAX, short);
    assert!(came == bytes[..5000]);
    assert!(result.unwrap_err().passes);
    let cut = answer(
        "200 OK",
        &[&format!("Content-Length: {len}")],
        &bytes[..5000],
    );
    assert!(streamed(0..len, usize::MAX, cut).1.unwrap_err().passes);
    let long = answer("200 OK", &[], &bytes);
    let (came, result, _) = streamed(0..len - 1, usize::MAX, long);
    let failure = result.unwrap_err();
    assert_eq!(
        (failure.passes, failure.error.kind()),
        (false, ErrorKind::Corrupt)
    );
    assert!((came.len() as u64) < len);
}

#[test]
fn a_registry_without_the_blob_or_without_ranges_says_so() {
    let bytes = some_bytes();
    let len = bytes.len() as u64;
    let (_, result, _) = streamed(0..len, 1, answer("404 Not Found", &[], b"{}"));
    let failure = result.unwrap_err();
    assert_eq!(
        (failure.passes, failure.error.kind()),
        (false, ErrorKind::NotFound)
    );
    let (came, result, _) = streamed(1000..len, 1, answer("200 OK", &[], &bytes));
    assert_eq!(result.unwrap_err().error.kind(), ErrorKind::Unsupported);
    assert!(came.is_empty());
}
