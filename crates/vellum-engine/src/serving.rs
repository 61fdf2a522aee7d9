//! Who serves a container, or works on it, without a device of the container's own.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::Holder;
use vellum_export::device::control;
use vellum_fs::run_dir::DirSocket;
use vellum_store::{ContainerRecord, Store};

/// Asks a server of clients which process it is: [`Holder`].
pub const WHO: &str = "who";

/// How long a server may take to say who it is.
const TIMEOUT: Duration = Duration::from_secs(1);

/// How a process has a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Having {
    /// `vellum nbd` serves it.
    Nbd,
    /// `vellum vhost` serves it to a virtual machine.
    Vhost,
    /// A command works on it, such as `vellum diff`.
    Command,
}

impl Having {
    /// How a process with this command line has it.
    fn of(command: &str) -> Having {
        let known = |word: &str| match word {
            "nbd" => Some(Having::Nbd),
            "vhost" => Some(Having::Vhost),
            _ => None,
        };
        let words = command.split(' ').skip(1);
        words.into_iter().find_map(known).unwrap_or(Having::Command)
    }
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
            (Some(since), Having::Nbd | Having::Vhost) => {
                format!("{what} by {} since {since}", holder.pid)
            }
            _ => format!("{what} by {holder}"),
        }
    }

    fn what(&self) -> &'static str {
        match self.by {
            Having::Nbd => "served over nbd",
            Having::Vhost => "served over vhost-user",
            Having::Command => "in use",
        }
    }

    /// Why nothing else can have the container `name`.
    fn refusal(&self, name: &str) -> Error {
        let who = match &self.holder {
            Some(holder) => format!("process {holder}"),
            None => "a process of another pid namespace".into(),
        };
        let over = match self.by {
            Having::Nbd => "NBD",
            Having::Vhost => "vhost-user",
            Having::Command => {
                let text =
                    format!("the container {name} is in use by {who}: wait for it, or end it");
                return Error::new(ErrorKind::InUse, text);
            }
        };
        let kill = self
            .holder
            .as_ref()
            .map_or(String::new(), |holder| format!(" (`kill {}`)", holder.pid));
        let text = format!(
            "the container {name} is not mounted, but served over {over} by {who}: end that server{kill}"
        );
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
        return Ok(Some(Serving {
            by: Having::of(&holder.command),
            holder: Some(holder),
        }));
    }
    // It may live where its locks cannot be seen from here; the pid that it says is of there.
    match control::call_at(&socket, WHO, Value::Null, TIMEOUT) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        answer => Ok(Some(Serving {
            by: answer.map_or(Having::Nbd, having),
            holder: None,
        })),
    }
}

/// How the server has a container that answers this to [`WHO`].
fn having(answer: Value) -> Having {
    let told: Option<Holder> = serde_json::from_value(answer).ok().flatten();
    match told.map(|holder| Having::of(&holder.command)) {
        Some(Having::Vhost) => Having::Vhost,
        // Servers of other versions do not say.
        _ => Having::Nbd,
    }
}

/// How the server has its container that listens here.
///
/// # Errors
/// As [`control::call_at`].
pub(super) fn how_served(socket: &DirSocket) -> Result<Having> {
    control::call_at(socket, WHO, Value::Null, TIMEOUT).map(having)
}

/// The socket of a server that can go on in other layers and with another size while a machine uses the
/// container; `None` where nobody has it.
///
/// # Errors
/// [`ErrorKind::InUse`] where somebody else has it; as [`serving`].
pub(super) fn served_live(store: &Store, container: &ContainerRecord) -> Result<Option<DirSocket>> {
    match serving(store, container)? {
        None => Ok(None),
        Some(Serving {
            by: Having::Vhost, ..
        }) => Ok(Some(store.runs().socket_beside(container.id))),
        Some(serving) => Err(serving.refusal(&container.name)),
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
