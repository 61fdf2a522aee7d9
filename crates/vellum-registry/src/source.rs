//! The hosts that may have what is in a repository, and what requests have shown of them. docs/registry.md, "Mirrors".

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vellum_base::error::{Error, ErrorKind};

use super::client::Repository;
use super::credentials::Keychain;
use super::failure::Failure;
use super::hedge::{Hedging, Traffic};
use super::hosts::Capabilities;
use super::retry::Tries;

/// For how long a host that failed is asked behind the others.
const REST: Duration = Duration::from_secs(60);
/// How many of them are known.
const MOST: usize = 4096;

/// What requests have shown of hosts so far, and who else knows credentials. Whoever talks to many repositories keeps one.
#[derive(Debug, Default)]
pub struct Seen {
    pub(crate) keychain: Option<Arc<dyn Keychain>>,
    /// Until when a host is asked behind the others, for all or for one blob.
    resting: Mutex<HashMap<(String, Option<String>), Instant>>,
    pub(crate) hedging: Hedging,
}

impl Seen {
    /// Nothing yet, but who knows credentials that are not in docker's files.
    pub fn knowing(keychain: Arc<dyn Keychain>) -> Self {
        Seen {
            keychain: Some(keychain),
            ..Seen::default()
        }
    }

    /// How many parts of blobs were asked for.
    pub fn traffic(&self) -> Traffic {
        self.hedging.traffic()
    }

    /// Whether a host failed lately, for all or for that.
    pub(crate) fn rests(&self, repository: &Repository, what: &str) -> bool {
        let resting = self.resting.lock();
        let base = repository.http.base().to_string();
        let until = |what| resting.get(&(base.clone(), what));
        let now = Instant::now();
        let mut ends = [until(None), until(Some(what.to_owned()))]
            .into_iter()
            .flatten();
        ends.any(|end| *end > now)
    }

    /// A host failed to give something.
    pub(crate) fn failed(&self, repository: &Repository, what: &str, failure: &Failure) {
        let kind = failure.error.kind();
        let all = failure.passes && matches!(kind, ErrorKind::Io | ErrorKind::Timeout);
        let rest = failure.after.unwrap_or(REST);
        if failure.is_busy {
            self.hedging.off_for(rest);
        }
        let now = Instant::now();
        let mut resting = self.resting.lock();
        if resting.len() >= MOST {
            resting.retain(|_, end| *end > now);
        }
        let what = (!all).then(|| what.to_owned());
        resting.insert((repository.http.base().to_string(), what), now + rest);
    }
}

/// The hosts that may have what is in a repository, in the order in which they are named.
#[derive(Debug)]
pub(crate) struct Source {
    hosts: Vec<Repository>,
    pub tries: Tries,
    pub seen: Arc<Seen>,
}

impl Source {
    pub fn new(hosts: Vec<Repository>, tries: Tries, seen: Arc<Seen>) -> Self {
        Source { hosts, tries, seen }
    }

    /// The hosts that may be asked for something, those that failed lately behind the others.
    pub fn order(&self, what: &str, able: fn(&Capabilities) -> bool) -> Vec<&Repository> {
        let hosts = self
            .hosts
            .iter()
            .filter(|host| able(&host.http.capabilities));
        let mut hosts: Vec<_> = hosts.collect();
        if hosts.len() > 1 {
            hosts.sort_by_cached_key(|host| self.seen.rests(host, what));
        }
        hosts
    }

    /// What the first host answers that answers well.
    ///
    /// # Errors
    /// What each of them said.
    pub async fn first<T>(
        &self,
        what: &str,
        able: fn(&Capabilities) -> bool,
        mut attempt: impl AsyncFnMut(&Repository) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let hosts = self.order(what, able);
        let last = self.hosts.last().map(|host| host.http.base());
        let mut failures = Vec::new();
        for (index, repository) in hosts.iter().enumerate() {
            let failure = match attempt(repository).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            self.seen.failed(repository, what, &failure);
            if index + 1 < hosts.len() {
                tracing::info!("{}; the next host is asked", failure.error);
            }
            // What the registry itself says is what counts, whenever it was asked.
            match Some(repository.http.base()) == last {
                true => failures.insert(0, failure),
                false => failures.push(failure),
            }
        }
        Err(all(failures))
    }
}

/// The failures of all hosts as one, of the kind of the first of them, which passes where that of any does.
fn all(mut failures: Vec<Failure>) -> Failure {
    let kind = failures.first().map(|first| first.error.kind());
    let Some(last) = failures.pop() else {
        let text = "no host may be asked for it: the capabilities in hosts.toml allow it to none";
        return Error::new(ErrorKind::Unsupported, text).into();
    };
    if failures.is_empty() {
        return last;
    }
    failures.push(last);
    let said = failures.iter().rev().map(|one| one.error.to_string());
    let text = format!("no host gave it: {}", said.collect::<Vec<_>>().join("; "));
    Failure {
        error: Error::new(kind.unwrap_or(ErrorKind::Io), text),
        passes: failures.iter().any(|one| one.passes),
        after: failures.iter().filter_map(|one| one.after).min(),
        is_busy: failures.iter().any(|one| one.is_busy),
    }
}
