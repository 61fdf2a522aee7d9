//! Where the servers of a chain are asked: that of a block device, or one of clients.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::serving::{Having, how_served};
use vellum_base::error::{ErrorKind, Result};
use vellum_export::device::control;
use vellum_fs::run_dir::{DirSocket, RunDir};
use vellum_store::Store;

/// Who serves a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Server {
    /// The worker of a local device.
    Device,
    /// `vellum nbd`.
    Nbd,
    /// `vellum vhost`.
    Vhost,
}

/// Where the servers of a chain listen.
pub(crate) struct Sockets {
    run_dir: RunDir,
    beside: Option<DirSocket>,
}

impl Sockets {
    /// Those of the container or snapshot with this id.
    pub(crate) fn new(store: &Store, id: Uuid) -> Self {
        Sockets {
            run_dir: store.runs().dir(id),
            beside: Some(store.runs().socket_beside(id)),
        }
    }

    /// Those of a device in `run_dir` alone.
    pub(crate) fn of_device(run_dir: &RunDir) -> Self {
        Sockets {
            run_dir: run_dir.clone(),
            beside: None,
        }
    }

    /// Asks whoever serves; [`ErrorKind::NotFound`] where nobody does.
    pub(crate) fn ask(
        &self,
        verb: &str,
        args: &Value,
        timeout: Duration,
    ) -> Result<(Server, Value)> {
        let answer = control::call_again(&self.run_dir, verb, args.clone(), timeout);
        match (answer, &self.beside) {
            (Err(error), Some(beside)) if error.kind() == ErrorKind::NotFound => {
                let answer = control::call_at(beside, verb, args.clone(), timeout)?;
                let server = match how_served(beside) {
                    Ok(Having::Vhost) => Server::Vhost,
                    _ => Server::Nbd,
                };
                Ok((server, answer))
            }
            (answer, _) => answer.map(|answer| (Server::Device, answer)),
        }
    }
}
