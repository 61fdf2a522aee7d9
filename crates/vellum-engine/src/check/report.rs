//! What a check found, and what can be done about it.

use std::path::PathBuf;

use serde::Serialize;
use uuid::Uuid;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Note,
    /// Something is left over or out of date; no data is in danger.
    Warning,
    /// Data cannot be read, or not be trusted.
    Error,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The image, container or layer, or what else it is about.
    pub what: String,
    /// The file or directory.
    pub path: PathBuf,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub advice: String,
    /// [`super::CheckOptions::repair`] does something about it.
    pub repairable: bool,
    /// What was done about it.
    pub repaired: Option<String>,
    #[serde(skip)]
    pub(super) remedy: Option<Remedy>,
}

/// What can be done about a finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Make checksums, remove what they replace and what was never finished.
    Layer(Uuid),
    /// Count again.
    Count(Uuid),
    /// Bring a container's record up to date.
    Settle(String),
    /// End what is left of a container's device.
    Detach(String),
    /// Give a container's device a new supervisor.
    Supervise(String),
    /// Remove leftovers.
    Prune,
    /// Never build on this layer again.
    MarkDamaged(Uuid, String),
    /// The layer is fine again.
    MarkSound(Uuid),
    /// Take an image out of use.
    QuarantineImage(String, String),
    /// Take a container out of use.
    QuarantineContainer(String, String),
}

/// What a check found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct CheckReport {
    /// In the order of the layers, images, containers and leftovers.
    pub findings: Vec<Finding>,
    /// Layers looked at.
    pub layers: u64,
    /// Images looked at.
    pub images: u64,
    /// Containers looked at.
    pub containers: u64,
    /// containerd's snapshots looked at.
    pub snapshots: u64,
    /// Data blocks read.
    pub blocks: u64,
}

impl CheckReport {
    /// Findings of a severity that nothing was done about.
    pub fn open(&self, severity: Severity) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.severity == severity && finding.repaired.is_none())
            .count()
    }

    /// True when no error and no warning is left.
    pub fn is_clean(&self) -> bool {
        self.open(Severity::Error) == 0 && self.open(Severity::Warning) == 0
    }
}

impl Finding {
    pub(super) fn new(
        severity: Severity,
        what: impl Into<String>,
        path: impl Into<PathBuf>,
        problem: impl Into<String>,
        advice: impl Into<String>,
        remedy: Option<Remedy>,
    ) -> Self {
        Finding {
            severity,
            what: what.into(),
            path: path.into(),
            problem: problem.into(),
            advice: advice.into(),
            repairable: remedy.is_some(),
            repaired: None,
            remedy,
        }
    }
}
