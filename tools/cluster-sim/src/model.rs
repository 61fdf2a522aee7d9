//! What was measured of one host, and what a cluster is made of.

use serde::{Deserialize, Serialize};

/// What `tools/cluster-sim/calibrate` writes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Calibration {
    /// Of this form.
    pub(crate) version: u32,
    /// When, on what.
    pub(crate) about: String,
    /// Seconds of work of the registry's process for a request, and for a byte of an answer.
    pub(crate) registry_request_s: f64,
    pub(crate) registry_byte_s: f64,
    /// What one host did, by strategy.
    pub(crate) full: Start,
    pub(crate) ranges: Start,
    pub(crate) hot: Start,
    /// What many hosts at once took, on the same machine.
    pub(crate) together: Vec<Together>,
    /// The cluster that they made.
    pub(crate) cluster: Cluster,
}

/// A start of one host that is alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Start {
    /// Bytes of each answer of the registry while the image was pulled, in order.
    pub(crate) pull: Vec<u64>,
    /// The same while the container started.
    pub(crate) start: Vec<u64>,
    /// Seconds of work of all processors but the registry's: for the pull, for the container and its start.
    pub(crate) pull_cpu_s: f64,
    pub(crate) start_cpu_s: f64,
    /// Seconds from the beginning to the first output.
    pub(crate) first_output_s: f64,
}

/// Starts at once on several hosts.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Together {
    pub(crate) strategy: Strategy,
    pub(crate) hosts: usize,
    /// Seconds from the beginning to each host's first output.
    pub(crate) first_output_s: Vec<f64>,
}

/// How an image comes to the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Strategy {
    /// Pulled whole.
    Full,
    /// Lazily, by ranges.
    Ranges,
    /// Lazily, with a hot pack.
    Hot,
    /// The hot pack, through pull-through mirrors.
    Mirrors,
    /// The hot pack along a tree of hosts, each of which gives it to two others (FaaSNet, ATC '21). Vellum has none.
    Tree,
}

impl Strategy {
    pub(crate) const ALL: [Strategy; 5] = [
        Strategy::Full,
        Strategy::Ranges,
        Strategy::Hot,
        Strategy::Mirrors,
        Strategy::Tree,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Strategy::Full => "full",
            Strategy::Ranges => "ranges",
            Strategy::Hot => "hot",
            Strategy::Mirrors => "mirrors",
            Strategy::Tree => "tree",
        }
    }
}

impl Calibration {
    /// The version of the form that is read and written.
    pub(crate) const VERSION: u32 = 1;

    /// What one host does by that strategy: mirrors and trees carry the hot pack.
    pub(crate) fn start(&self, strategy: Strategy) -> &Start {
        match strategy {
            Strategy::Full => &self.full,
            Strategy::Ranges => &self.ranges,
            Strategy::Hot | Strategy::Mirrors | Strategy::Tree => &self.hot,
        }
    }
}

/// A cluster: all links in bytes a second.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cluster {
    pub(crate) hosts: usize,
    /// Containers of the image that each host starts at once.
    pub(crate) containers: usize,
    /// The registry's link, a mirror's, and a host's, each way.
    pub(crate) registry_link: f64,
    pub(crate) mirror_link: f64,
    pub(crate) host_link: f64,
    /// Seconds from a request to the first byte of its answer, over an idle network.
    pub(crate) round_trip_s: f64,
    pub(crate) hosts_per_mirror: usize,
    /// Processors of the registry, of a mirror, and of a host.
    pub(crate) registry_cpus: f64,
    pub(crate) mirror_cpus: f64,
    pub(crate) host_cpus: f64,
    /// All of them, the registry and the mirrors share so many processors, as in a calibration on one machine.
    pub(crate) shared_cpus: Option<f64>,
}
