//! A qcow2 and the files below it, read by imago.

use std::fmt;
use std::io;
use std::ops::Range;

use imago::file::File as Stored;
use imago::qcow2::Qcow2 as Format;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};

use super::super::disk::DiskContent;
use super::chain::{Link, Links};
use super::corrupt;
use vellum_base::interrupt;
use vellum_base::{Error, ErrorKind, Result};

/// A disk that lies in a qcow2.
pub(super) struct Qcow2(FormatAccess<Stored>);

impl fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Qcow2").field(&self.0.size()).finish()
    }
}

/// An error of imago's. Where it does not say what failed, the image makes no sense.
fn failed(doing: &str, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::Other | io::ErrorKind::InvalidInput => {
            Error::with_source(ErrorKind::Corrupt, doing, error)
        }
        _ => Error::io(doing, error),
    }
}

fn open_link(link: Link, below: Option<FormatAccess<Stored>>) -> io::Result<FormatAccess<Stored>> {
    let stored = Stored::try_from(link.file)?;
    // Nothing that an image names is opened but what was found for it.
    let gate = DenyImplicitOpenGate::default();
    match link.header {
        Some(_) => Ok(FormatAccess::new(
            Format::builder(stored).backing(below).open(gate)?,
        )),
        None => Ok(FormatAccess::new(Raw::builder(stored).open(gate)?)),
    }
}

impl Qcow2 {
    /// Opens the files of an image.
    pub fn open(links: Links) -> Result<Qcow2> {
        let mut below = None;
        for link in links.into_iter().rev() {
            let path = link.path.clone();
            let opened = open_link(link, below.take());
            below = Some(
                opened.map_err(|error| failed(&format!("reading {}", path.display()), error))?,
            );
        }
        let top = below.ok_or_else(|| Error::internal("a qcow2 without a file"))?;
        Ok(Qcow2(top))
    }

    /// What lies at `at`, and for how many of `len` bytes.
    fn mapping(&self, at: u64, len: u64) -> Result<(Mapping<'_, Stored>, u64)> {
        let (mapping, len) = self
            .0
            .get_mapping(at, len)
            .map_err(|error| failed("reading its tables", error))?;
        match len {
            0 => Err(corrupt("its tables end before its disk does")),
            _ => Ok((mapping, len)),
        }
    }
}

impl DiskContent for Qcow2 {
    fn next_data(&self, mut at: u64, size: u64) -> Result<Option<Range<u64>>> {
        while at < size {
            interrupt::check()?;
            let (mapping, len) = self.mapping(at, size - at)?;
            match mapping {
                Mapping::Raw { .. } | Mapping::Special { .. } => return Ok(Some(at..at + len)),
                _ => at += len,
            }
        }
        Ok(None)
    }

    fn read(&self, into: &mut [u8], at: u64) -> Result<()> {
        self.0
            .read(into, at)
            .map_err(|error| failed("reading its data", error))
    }
}
