//! Vellum under containerd: a proxy plugin that serves `containerd.services.snapshots.v1`, and
//! `containerd.services.diff.v1` beside it.
//!
//! Each snapshot that can be written is one thin block layer on those of its parent. Prepare makes
//! the layer, attaches it as a device of its own process, and mounts its ext4 under the store;
//! Mounts answers with a bind of that. Commit seals the layer; checksums are made afterwards.
//! Devices and mounts belong to no process of this module, so they outlive it: what is mounted is
//! asked of the kernel at each call, never remembered.
//!
//! * [`authority`]: connections of clients whose requests name no host.
//! * [`service`], `diff_service`: gRPC, and nothing else: messages in, messages out.
//! * [`Snapshotter`]: the operations.
//! * [`diff`]: what a snapshot changed, as a layer.
//! * [`content`]: containerd's content store, where layers go.
//! * [`metadata`]: what containerd knows of snapshots, in memory and on disk.
//! * [`mounts`]: devices and mounts of snapshots.
//! * [`remote`]: layers that a registry has as blocks.
//! * [`image_service`], [`pull_secrets`]: what the kubelet pulls images with.
//! * [`retire`]: what comes after an answer: detaching, removing, checksums.
//! * [`metrics`]: counters, and the HTTP server that shows them to Prometheus.
//! * [`filter`]: containerd's language for choosing from a list.

pub mod authority;
mod commit;
pub mod config;
mod container_metrics;
pub mod content;
mod cri;
pub mod diff;
mod diff_service;
mod failure;
pub mod filter;
pub mod image_service;
mod labels;
pub mod metadata;
pub mod metrics;
pub mod mounts;
mod operations;
pub mod pull_secrets;
pub mod remote;
pub mod retire;
pub mod service;
mod usage;

pub use failure::Failure;
pub use operations::{Defaults, MountSpec, Snapshotter};
pub use usage::SnapshotUsage;

/// The messages, and the traits of servers and clients, made from `proto/` by the build script.
#[allow(
    missing_docs,
    clippy::all,
    clippy::too_many_lines,
    rust_2018_idioms,
    reason = "generated; the names are containerd's"
)]
pub mod proto {
    /// `containerd.types`
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
    /// `containerd.services.snapshots.v1`
    pub mod services {
        /// The content store, of which we are a client.
        pub mod content {
            /// Version 1.
            pub mod v1 {
                tonic::include_proto!("containerd.services.content.v1");
            }
        }
        /// The diff service.
        pub mod diff {
            /// Version 1.
            pub mod v1 {
                tonic::include_proto!("containerd.services.diff.v1");
            }
        }
        /// Leases, of which we are a client.
        pub mod leases {
            /// Version 1.
            pub mod v1 {
                tonic::include_proto!("containerd.services.leases.v1");
            }
        }
        /// The snapshots service.
        pub mod snapshots {
            /// Version 1.
            pub mod v1 {
                tonic::include_proto!("containerd.services.snapshots.v1");
            }
        }
    }
}
