//! A qcow2, written by imago from one end to the other.

use std::fmt;
use std::fs::File;
use std::io;

use imago::file::File as Stored;
use imago::qcow2::Qcow2 as Format;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};

use vellum_base::block::BLOCK_SIZE;
use vellum_base::error::ResultExt;
use vellum_base::{Error, Result};

/// What QEMU takes too.
const USUAL_CLUSTER: u64 = 64 << 10;
/// The largest disk whose clusters can be as small as blocks: its first table has the 32 MiB that QEMU
/// reads.
const MAX_FINE: u64 = 8 << 40;

/// Bytes of a cluster of an image of `size` bytes. That of a layer alone has the size of a block where it
/// can, so that it holds no more than the layer does.
pub fn cluster_size(size: u64, of_layer: bool) -> u64 {
    match of_layer && size <= MAX_FINE {
        true => BLOCK_SIZE,
        false => USUAL_CLUSTER,
    }
}

/// A qcow2 that is being written. What nobody writes reads as in the image below it, and as zeros where
/// there is none.
pub struct Qcow2Writer {
    image: FormatAccess<Stored>,
    cluster: u64,
}

impl fmt::Debug for Qcow2Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Writer")
            .field("size", &self.image.size())
            .field("cluster", &self.cluster)
            .finish()
    }
}

fn failed(error: io::Error) -> Error {
    Error::io("writing the qcow2", error)
}

impl Qcow2Writer {
    /// Begins an image of `size` bytes in clusters of `cluster` in an empty file, above another qcow2, if
    /// one is named: as it will be found from beside the image.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn new(file: &File, size: u64, cluster: u64, below: Option<&str>) -> Result<Qcow2Writer> {
        let file = file.try_clone().context(|| "writing the qcow2")?;
        let stored = Stored::try_from(file).map_err(failed)?;
        let mut builder = Format::<Stored>::create_builder(stored)
            .size(size)
            .cluster_size(cluster as usize);
        if let Some(below) = below {
            builder = builder.backing(below.into(), "qcow2".into());
        }
        // Whole clusters are written: nothing is read from below.
        let opening = |stored| Ok(Format::builder(stored).backing(None).write(true));
        let image = builder
            .create_open(DenyImplicitOpenGate::default(), opening)
            .map_err(failed)?;
        Ok(Qcow2Writer {
            image: FormatAccess::new(image),
            cluster,
        })
    }

    /// Bytes of a cluster: what is written begins with one, and ends with one or with the disk.
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// Writes `bytes` at `at`.
    ///
    /// # Errors
    /// `NoSpace` and `Io` of the file.
    pub fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.image.write(bytes, at).map_err(failed)
    }

    /// Has `len` bytes at `at` read as zeros, whatever lies below.
    ///
    /// # Errors
    /// As [`Qcow2Writer::write`].
    pub fn zero(&self, at: u64, len: u64) -> Result<()> {
        self.image.write_zeroes(at, len).map_err(failed)
    }

    /// Writes the tables. The caller makes the file durable.
    ///
    /// # Errors
    /// As [`Qcow2Writer::write`].
    pub fn finish(self) -> Result<()> {
        self.image.flush().map_err(failed)
    }
}
