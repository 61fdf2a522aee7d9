//! Block-level copy-on-write: layers on disk, and chains of them that read and write as one device.
//!
//! A *layer* is a directory: a header, the data, a map of the blocks that it holds, and, while it is
//! writable, a journal and a log of changes. A *chain* is a stack of sealed layers with at most one
//! writable layer on top. A write allocates 4 KiB blocks in the top (copy-up where it covers a block in
//! part); a read is answered by the uppermost layer that holds the block. What was flushed survives
//! power cuts and the death of the process at any moment.
//!
//! * [`layer`]: one layer: made, written, flushed, sealed, recovered, checked.
//! * [`chain`]: layers stacked into one [`BlockDevice`](vellum_base::block::BlockDevice) through one
//!   merged index.
//!
//! An image's layer, and a container's on top of it:
//!
//! ```
//! use std::sync::Arc;
//! use vellum_base::block::{BlockDevice, Durability};
//! use vellum_base::storage::{FileStorage, Storage};
//! use vellum_core::chain::{ChainSpec, open_chain};
//! use vellum_core::layer::{Header, LayerOptions, WritableLayer, seal_in_place};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let (image, container) = (dir.path().join("image"), dir.path().join("container"));
//! let storage: Arc<dyn Storage> = Arc::new(FileStorage);
//! let options = LayerOptions::default();
//!
//! let header = Header::new(None, 1 << 20)?;
//! WritableLayer::create(&*storage, &image, &header)?;
//! let chain = open_chain(&storage, &ChainSpec { sealed: vec![], top: Some(image.clone()), options })?;
//! chain.write_at(b"from the image", 4096, Durability::Durable)?;
//! chain.seal_last()?;
//! drop(chain);
//! seal_in_place(&*storage, &image, |_| {})?;
//!
//! WritableLayer::create(&*storage, &container, &Header::new(Some(header.uuid), 1 << 20)?)?;
//! let chain = open_chain(&storage, &ChainSpec { sealed: vec![image], top: Some(container), options })?;
//! chain.write_at(b"FROM", 4096, Durability::Durable)?; // Copies up the block's other bytes.
//! let mut read = [0; 14];
//! chain.read_at(&mut read, 4096)?;
//! assert_eq!(&read, b"FROM the image");
//! chain.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! The bytes are specified in `docs/format.md`, and what survives which crash is argued in
//! `docs/durability.md`.

#![deny(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]
#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        reason = "tests make bytes of numbers that fit"
    )
)]

pub mod chain;
pub mod layer;
