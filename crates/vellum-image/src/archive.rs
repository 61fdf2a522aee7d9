//! An OCI archive, the tar of an OCI layout, that is read in place.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::blobs::Archive;
use super::compress::{Compression, Decoder, buffered};
use super::detect;
use super::node::normalise;
use super::read_failure;
use vellum_base::error::ResultExt;
use vellum_base::interrupt::{Interruptible, standard_input};
use vellum_base::{Error, ErrorKind, Result};

/// The tar of an OCI layout. Which blobs are what they should be, who reads them finds out.
#[derive(Debug)]
pub struct OciArchive {
    file: Arc<File>,
    archive: Archive,
}

impl OciArchive {
    /// Opens the archive `path`, or with `-` standard input. What is compressed, or comes from a pipe, is kept in a file
    /// without a name in the directory `spool` meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a tar that is something else, [`ErrorKind::InvalidInput`] for what is no tar;
    /// [`ErrorKind::Corrupt`] for one that is cut off.
    pub fn open(path: &Path, spool: &Path) -> Result<Self> {
        let shown = || path.display().to_string();
        let file = match path.as_os_str() == "-" {
            true => standard_input().context(shown)?.0,
            false => File::open(path).context(|| format!("opening {}", path.display()))?,
        };
        let meta = file.metadata().context(shown)?;
        let seekable = meta.is_file() && path.as_os_str() != "-";
        let compressed = match seekable {
            true => Compression::detect(&detect::head(&file)?)? != Compression::None,
            false => true,
        };
        let file = match compressed {
            true => keep(file, spool).context(shown)?,
            false => file,
        };
        Self::index(file).map_err(|error| error.context(shown()))
    }

    fn index(file: File) -> Result<Self> {
        let len = file.metadata().context(|| "reading its size")?.len();
        if !detect::is_tar(&detect::head(&file)?, len) {
            let text = "it does not begin as a tar does: `vellum save` and `docker save` write archives of images";
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        let archive = Archive::index(file)?;
        if !archive.has("oci-layout") || !archive.has("index.json") {
            let text = "it is no OCI archive (it has no oci-layout and index.json): `vellum import NAME FILE` takes \
                        archives of Docker before 25, and tars of files";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        Ok(OciArchive {
            file: archive.file(),
            archive,
        })
    }

    /// At which byte of the archive the content of a file begins, and how many bytes it has; `None` where there is
    /// none.
    pub fn find(&self, name: &str) -> Option<(u64, u64)> {
        self.archive.find(&normalise(name.as_bytes()).ok()?)
    }

    /// The archive itself.
    pub fn file(&self) -> Arc<File> {
        self.file.clone()
    }
}

/// Keeps what is read, decompressed, in a file without a name.
fn keep(file: File, spool: &Path) -> Result<File> {
    let input: Box<dyn io::Read + Send> = Box::new(Interruptible(file));
    let mut decoder = Decoder::new(buffered(input))?;
    let failed = || format!("keeping the archive in {}", spool.display());
    let mut kept = tempfile::tempfile_in(spool).context(failed)?;
    io::copy(&mut decoder, &mut kept).map_err(|error| read_failure(&failed(), error))?;
    Ok(kept)
}
