//! How pull secrets, which the snapshotter knows, get to the fetcher: by a socket, whenever a registry wants to know who
//! asks, and nowhere else. docs/lazy.md, "Pull secrets".

use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::wire::encode;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_export::device::control_server::ControlServer;
use vellum_export::device::{ControlHandler, control};
use vellum_fs::run_dir::{DirSocket, RunRoot};
use vellum_registry::{Credential, Keychain};

/// Asks for what is known for a [`Place`].
const FIND: &str = "find";
/// Connections at once: of each layer that a registry refuses there may be one.
const CONNECTIONS: usize = 256;
/// How long the snapshotter may take for what it has in memory.
const PATIENCE: Duration = Duration::from_secs(2);
/// What to do where none is known, or a wrong one.
const ADVICE: &str = "pull the image again with its pull secret, by the kubelet or `crictl pull --creds`: whoever reads \
    waits for that";

/// A repository of a registry.
#[derive(Debug, Serialize, Deserialize)]
struct Place {
    registry: String,
    repository: String,
    /// What the registry did not take; the socket is root's alone, and it came from there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    refused: Vec<Credential>,
}

/// The pull secrets of the snapshotter of a store, for its fetcher.
#[derive(Debug)]
pub(super) struct OfSnapshotter(DirSocket);

impl OfSnapshotter {
    pub fn new(runs: &RunRoot) -> Self {
        OfSnapshotter(runs.pull_secrets())
    }

    /// Whether a snapshotter keeps some, also if it does not run just now.
    fn is_there(&self) -> bool {
        self.0.path().exists()
    }
}

impl Keychain for OfSnapshotter {
    fn find(&self, registry: &str, repository: &str, refused: &[Credential]) -> Option<Credential> {
        if !self.is_there() {
            return None;
        }
        let place = Place {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            refused: refused.to_vec(),
        };
        let asked = encode(&place)
            .and_then(|place| control::call_at(&self.0, FIND, place, PATIENCE))
            .and_then(read);
        asked.unwrap_or_else(|error| {
            tracing::warn!(registry, repository, "pull secrets: {error}");
            None
        })
    }

    fn advice(&self) -> Option<&str> {
        self.is_there().then_some(ADVICE)
    }
}

/// Reads a message, of whose words nothing gets into an error: they may be secret.
fn read<T: DeserializeOwned>(message: Value) -> Result<T> {
    serde_json::from_value(message)
        .map_err(|_| Error::new(ErrorKind::Protocol, "a message of another version"))
}

/// Answers the fetcher of a store.
#[derive(Debug)]
pub struct PullSecretServer(ControlServer);

struct Answers(Arc<dyn Keychain>);

impl ControlHandler for Answers {
    fn handle(&self, verb: &str, args: Value) -> Result<Value> {
        if verb != FIND {
            let text = format!("pull secrets are asked for by {FIND:?}, not by {verb:?}");
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let place: Place = read(args)?;
        encode(
            &self
                .0
                .find(&place.registry, &place.repository, &place.refused),
        )
    }
}

impl PullSecretServer {
    /// Answers with what `keychain` has, to root alone.
    ///
    /// # Errors
    /// Where the socket cannot be made.
    pub fn start(runs: &RunRoot, keychain: Arc<dyn Keychain>) -> Result<Self> {
        let handler = Arc::new(Answers(keychain));
        ControlServer::start_for(CONNECTIONS, &runs.pull_secrets(), handler).map(PullSecretServer)
    }

    /// Goes on until the process ends, and leaves the socket where it is: by it the fetcher knows that another one may
    /// come.
    pub fn leave(self) {
        std::mem::forget(self.0);
    }

    /// For a snapshotter that keeps no pull secrets: nobody waits for one any more.
    ///
    /// # Errors
    /// Where what an earlier one left cannot be removed.
    pub fn none(runs: &RunRoot) -> Result<()> {
        let path = runs.pull_secrets().path();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct One;

    impl Keychain for One {
        fn find(&self, registry: &str, repository: &str, _: &[Credential]) -> Option<Credential> {
            let token = || Credential::RegistryToken("s3cret".into());
            ((registry, repository) == ("registry.example", "web")).then(token)
        }
    }

    #[test]
    fn the_fetcher_hears_what_the_snapshotter_knows_and_waits_for_it_also_while_none_runs() {
        let dir = tempfile::tempdir().unwrap();
        let runs = RunRoot::of_store(dir.path());
        std::fs::create_dir(runs.path()).unwrap();
        let asked = OfSnapshotter::new(&runs);
        assert_eq!(asked.find("registry.example", "web", &[]), None);
        assert_eq!(asked.advice(), None);
        let server = PullSecretServer::start(&runs, Arc::new(One)).unwrap();
        let token = Credential::RegistryToken("s3cret".into());
        assert_eq!(asked.find("registry.example", "web", &[]), Some(token));
        assert_eq!(asked.find("registry.example", "other", &[]), None);
        assert!(asked.advice().is_some());
        drop(server);
        // As one that was killed leaves it.
        drop(std::os::unix::net::UnixListener::bind(runs.pull_secrets().path()).unwrap());
        assert_eq!(asked.find("registry.example", "web", &[]), None);
        assert!(asked.advice().is_some());
        PullSecretServer::none(&runs).unwrap();
        PullSecretServer::none(&runs).unwrap();
        assert_eq!(asked.advice(), None);
    }

    #[test]
    fn what_is_wrong_with_a_message_says_nothing_of_it() {
        let wrong = serde_json::json!({ "password": "s3cret" });
        let error = read::<Option<Credential>>(wrong).unwrap_err();
        assert!(!format!("{error:?} {error}").contains("s3cret"));
    }
}
