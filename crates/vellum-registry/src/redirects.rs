//! Where blobs were found to be, so that one redirection serves many ranges. docs/registry.md, "Transport".

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use reqwest::Url;

/// How long an address is good for that does not say it.
const UNSAID: Duration = Duration::from_secs(60);
/// And the longest that it is used.
const LONGEST: Duration = Duration::from_secs(3600);
/// How many are kept.
const MOST: usize = 1024;

/// Addresses on other hosts, by digests of blobs.
#[derive(Debug, Default)]
pub(crate) struct Redirects(Mutex<HashMap<String, (Url, SystemTime)>>);

impl Redirects {
    /// Where a blob was, if that is still good.
    pub fn get(&self, digest: &str) -> Option<Url> {
        let mut known = self.0.lock();
        let (url, until) = known.get(digest)?;
        if *until > SystemTime::now() {
            return Some(url.clone());
        }
        known.remove(digest);
        None
    }

    /// A blob was found there.
    pub fn keep(&self, digest: &str, url: &Url) {
        let now = SystemTime::now();
        let mut known = self.0.lock();
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(digest.to_owned(), (url.clone(), now + good_for(url, now)));
    }

    /// It is there no more.
    pub fn forget(&self, digest: &str) {
        self.0.lock().remove(digest);
    }
}

/// Four fifths of the time that a presigned address says to be good for: how long from now on (AWS Signature Version 4,
/// Google's V4), or until when (their older ones, CloudFront).
fn good_for(url: &Url, now: SystemTime) -> Duration {
    let said = url.query_pairs().find_map(|(key, value)| {
        let number = Duration::from_secs(value.parse().ok()?);
        match &*key {
            "X-Amz-Expires" | "X-Goog-Expires" => Some(number),
            "Expires" => {
                let now = now.duration_since(SystemTime::UNIX_EPOCH).ok()?;
                Some(number.saturating_sub(now))
            }
            _ => None,
        }
    });
    said.map_or(UNSAID, |said| (said / 5).saturating_mul(4).min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_used_for_four_fifths_of_the_time_that_it_says() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (query, seconds) in [
            ("X-Amz-Date=20260101T000000Z&X-Amz-Expires=1200", 960),
            ("X-Goog-Expires=100", 80),
            ("Expires=1000100&Signature=x", 80),
            ("Expires=999999", 0),
            ("X-Amz-Expires=604800", 3600),
            ("X-Amz-Expires=soon", 60),
            ("", 60),
        ] {
            let url: Url = format!("https://s3.example/blob?{query}").parse().unwrap();
            assert_eq!(good_for(&url, now), Duration::from_secs(seconds), "{query}");
        }
    }

    #[test]
    fn what_is_forgotten_or_over_is_not_found() {
        let known = Redirects::default();
        let url: Url = "https://s3.example/blob?X-Amz-Expires=1200"
            .parse()
            .unwrap();
        known.keep("a", &url);
        assert_eq!(known.get("a"), Some(url));
        known.forget("a");
        assert_eq!(known.get("a"), None);
        known.keep("a", &"https://s3.example/blob?Expires=1".parse().unwrap());
        assert_eq!(known.get("a"), None);
    }
}
