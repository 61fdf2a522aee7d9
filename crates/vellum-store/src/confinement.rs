//! What a container may do and use, as it was asked for when it was made. It lies in the container's
//! record, so that every later start of a command in it has the same.

use serde::{Deserialize, Serialize};

/// The network that a container sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Its own, with a loopback interface alone. Also for records that do not say: whether such a
    /// container was once run so is not known, and this is the side that gives nothing away.
    #[default]
    None,
    /// The host's.
    Host,
}

/// Which system calls a container's processes may make.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Seccomp {
    /// Those of Vellum's own profile.
    #[default]
    Default,
    /// All.
    Unconfined,
    /// Those of a profile in docker's form, as it was when the container was made.
    Profile(serde_json::Value),
}

/// How many processes and threads a container may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PidsLimit {
    /// As many as docs/operations.md says, where the host can limit them.
    #[default]
    Default,
    /// As many as the host has room for.
    Unlimited,
    /// So many.
    Limit(u32),
}

/// Rights and limits of a container.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Confinement {
    /// The network that it sees.
    pub network: Network,
    /// Its host name; its own name where it is `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Capabilities (`CAP_…`, or `ALL`) on top of the default ones.
    pub cap_add: Vec<String>,
    /// Capabilities that it does not have.
    pub cap_drop: Vec<String>,
    /// Its system calls.
    pub seccomp: Seccomp,
    /// No program in it gains rights, whatever its mode and capabilities.
    pub no_new_privileges: bool,
    /// Its root file system cannot be written.
    pub read_only: bool,
    /// Bytes of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Its processes and threads.
    pub pids: PidsLimit,
    /// Processors, in thousandths of one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub millicpus: Option<u64>,
}
