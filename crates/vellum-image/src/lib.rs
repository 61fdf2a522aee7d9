//! Container images in their many shapes: where a root file system comes from, how a layer of it
//! is applied to a mounted tree, and how a tree becomes a layer again.
//!
//! * [`Source`]: a directory, a tar, an OCI image, a Docker archive or a disk image.
//! * [`apply_layer`], [`copy_tree`]: one layer, or a whole tree, into a directory.
//! * [`transfer()`], [`transfer_to_tar`], [`transfer_from_tar`]: single files and directories, into a [`View`]
//!   of a tree and out of one.
//! * [`diff_trees`], [`compare_trees`], [`write_layer_tar`], [`write_blob()`],
//!   [`write_rootfs_tar`]: the way back.
//! * [`ImageConfig`], [`chain_id`]: what an image says about how to run it, and its identity.
//!
//! Nothing here knows of block layers: all of it works on directories and streams. Trees that are compared
//! may also be somewhere else ([`Trees`]).

mod acl;
mod apply;
mod archive;
mod aside;
mod blobs;
mod compress;
mod config;
mod content;
mod copy;
mod detect;
mod diff;
mod disk;
mod docker;
mod docker_legacy;
mod holes;
mod install;
mod layer;
mod measure;
mod members;
mod node;
mod oci;
mod platform;
mod qcow2;
mod raw;
mod records;
mod rooted;
mod slice;
mod source;
mod transfer;
mod tree;
mod view;
mod walk;
mod write;
mod write_blob;
mod write_oci;

pub use apply::{ApplyOptions, apply_layer, apply_layer_aside};
pub use archive::OciArchive;
pub use aside::Aside;
pub use blobs::blob_name;
pub use compress::Compression;
pub use config::{HistoryEntry, HistoryStep, ImageConfig, RunConfig, chain_id, chain_ids};
pub use copy::{copy_tree, copy_tree_aside};
pub use diff::{
    Change, ChangeKind, Comparison, ContentChange, Difference, Foreign, compare_trees, diff_trees,
    diff_trees_but,
};
pub use disk::DiskImage;
pub use install::ApplyStats;
pub use layer::{Hasher, LayerReader, LayerRef, hex};
pub use measure::Measure;
pub use oci::tag_of;
pub use platform::Platform;
pub use qcow2::{Qcow2Writer, cluster_size};
pub use raw::Holds;
pub use source::{Format, Image, Source, SourceOptions, StreamSource};
pub use transfer::{Owners, TransferOptions, transfer, transfer_from_tar, transfer_to_tar};
pub use tree::{Attributes, Directory, MountedTrees, Trees};
pub use view::View;
pub use write::{LayerTarOptions, write_layer_tar, write_rootfs_tar};
pub use write_blob::{LayerBlob, write_blob};
pub use write_oci::{LAYOUT, LayoutBlob, OciWriter, archive_name, familiar_name, write_layout_tar};

use vellum_base::Error;

/// Hears how many bytes of a source were read since it was last called.
pub type Progress<'a> = Box<dyn FnMut(u64) + Send + 'a>;

/// Turns a failed read into an [`Error`]; one of ours that travelled inside comes out again.
pub(crate) fn read_failure(doing: &str, error: std::io::Error) -> Error {
    let is_ours = error
        .get_ref()
        .is_some_and(|inner| inner.downcast_ref::<Error>().is_some());
    if !is_ours {
        return Error::io(doing, error);
    }
    match error.into_inner().map(|inner| inner.downcast::<Error>()) {
        Some(Ok(ours)) => *ours,
        _ => Error::new(vellum_base::ErrorKind::Io, doing),
    }
}

/// Wraps one of our errors for a trait that speaks [`std::io::Error`].
pub(crate) fn as_io_error(error: Error) -> std::io::Error {
    std::io::Error::other(error)
}
