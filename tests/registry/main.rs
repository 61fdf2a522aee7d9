//! `vellum push`, `pull`, `login` and `run REF` against a real registry and a real object store, `save` and `load`, with
//! skopeo, podman and containerd as judges.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

#[path = "../support/bucket_support/mod.rs"]
mod bucket_support;
#[path = "../support/common/mod.rs"]
mod common;
#[path = "../support/image_support/mod.rs"]
mod image_support;
#[path = "../support/ports/mod.rs"]
mod ports;
#[path = "../support/registry_support/mod.rs"]
mod registry_support;
#[path = "../support/uring/mod.rs"]
mod uring;

mod archive;
mod buckets;
mod cache;
mod crash;
mod encrypted;
mod faults;
mod faulty;
mod healing;
mod hedging;
mod hot;
mod layouts;
mod lazy;
mod login;
mod metadata;
mod mirrors;
mod mutual_tls;
mod plain;
mod presigned;
mod push;
mod tls;
