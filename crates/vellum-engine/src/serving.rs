//! Who serves a container, or works on it, without a device of the container's own.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::Holder;
use vellum_export::device::control;
use vellum_store::{ContainerRecord, Store};

/// Asks an NBD server which process it is: [`Holder`].
pub const WHO: &str = "who";

/// How long a server may take to say who it is.
const TIMEOUT: Duration = Duration::from_secs(1);

/// How a process has a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Having {
    /// `vellum nbd` serves it.
    Nbd,
    /// A command works on it, such as `vellum diff`.
    Command,
}

/// A process that has a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Serving {
    /// How.
    pub by: Having,
    /// The process; `None` where it cannot be seen from here (another pid namespace).
    #[serde(flatten)]
    pub holder: Option<Holder>,
}

impl Serving {
    /// For `ps`.
    pub fn describe(&self) -> String {
        let (what, holder) = (self.what(), self.holder.as_ref());
        let Some(holder) = holder else {
            return format!("{what} by a process of another pid namespace");
        };
        match (&holder.since, self.by) {
            (Some(since), Having::Nbd) => format!("{what} by {} since {since}", holder.pid),
            _ => format!("{what} by {holder}"),
        }
    }

    fn what(&self) -> &'static str {
        match self.by {
            Having::Nbd => "served over nbd",
            Having::Command => "in use",
        }
    }

    /// Why nothing else can have the container `name`.
    fn refusal(&self, name: &str) -> Error {
        let who = match &self.holder {
            Some(holder) => format!("process {holder}"),
            None => "a process of another pid namespace".into(),
        };
        let text = match (self.by, &self.holder) {
            (Having::Nbd, Some(holder)) => format!(
                "the container {name} is not mounted, but served over NBD by {who}: end that \
                 server (`kill {}`)",
                holder.pid
            ),
            (Having::Nbd, None) => format!(
                "the container {name} is not mounted, but served over NBD by {who}: end that server"
            ),
            (Having::Command, _) => {
                format!("the container {name} is in use by {who}: wait for it, or end it")
            }
        };
        Error::new(ErrorKind::InUse, text)
    }
}

/// Who has a container that has no device of its own. Takes no lock and changes no file.
///
/// # Errors
/// Where the layers cannot be told.
pub fn serving(store: &Store, container: &ContainerRecord) -> Result<Option<Serving>> {
    let socket = store.runs().socket_beside(container.id);
    // A look at a name, for each of a thousand containers that nobody serves.
    if !socket.path().exists() {
        return Ok(None);
    }
    let top = store.layer_dir(store.resolve(container)?.top);
    if let Some(holder) = store.layer_holder(&top) {
        // A killed server leaves its socket behind.
        let is_nbd = holder.command.split(' ').any(|word| word == "nbd");
        let by = if is_nbd { Having::Nbd } else { Having::Command };
        return Ok(Some(Serving {
            by,
            holder: Some(holder),
        }));
    }
    // It may live where its locks cannot be seen from here; the pid that it says is of there.
    match control::call_at(&socket, WHO, Value::Null, TIMEOUT) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        _ => Ok(Some(Serving {
            by: Having::Nbd,
            holder: None,
        })),
    }
}

/// Refuses a container that has no device of its own while somebody has it, with what to do.
///
/// # Errors
/// [`ErrorKind::InUse`]; as [`serving`].
pub(super) fn refuse_served(store: &Store, container: &ContainerRecord) -> Result<()> {
    match serving(store, container)? {
        Some(serving) => Err(serving.refusal(&container.name)),
        None => Ok(()),
    }
}

/// Which command works on a container at this moment, for people who wait for it.
pub(super) fn working(store: &Store, container: &ContainerRecord) -> Option<Holder> {
    let lock = store.runs().container_lock(container.id);
    store.storage().holder(&lock)
}
