//! Images, containers and snapshots as files of formats that other programs read. docs/images.md.

mod disk;
pub(crate) mod image;
pub(crate) mod layers;
pub(crate) mod output;
pub(crate) mod subject;

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::watch::Watch;
use output::Out;
use subject::Subject;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_image::{Compression, write_rootfs_tar};
use vellum_store::{ImageRecord, Store};

/// Bytes that are written to a file at a time.
const BUFFER: usize = 256 << 10;

/// What an export is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk, byte for byte.
    Raw,
    /// The disk in QEMU's format.
    Qcow2,
    /// The files.
    Tar,
    /// A container image as the OCI specifies it.
    Oci,
    /// A container image as `docker save` writes it.
    Docker,
    /// The block layers as they are.
    Layer,
}

/// What a user says about an export.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// What it is.
    pub format: Format,
    /// As qcow2: a directory with a file for each layer, rather than one file.
    pub layers: bool,
    /// How the layers of an OCI image are compressed; `None` as others do it.
    pub compression: Option<Compression>,
    /// What a container image is called in it; `None` for its name here.
    pub name: Option<String>,
    /// Of a layer file: an image whose layers are left out of it.
    pub without: Option<String>,
    /// A file that is there is replaced.
    pub replace: bool,
}

/// What an export wrote.
#[derive(Debug, Clone, Serialize)]
pub struct ExportReport {
    /// The image or container.
    pub name: String,
    /// What was written.
    pub format: Format,
    /// Where; `-` is standard output.
    #[serde(serialize_with = "super::path_as_text")]
    pub path: PathBuf,
    /// Bytes of data that were copied, of a disk or of files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Layers of a container image or layer file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// The digest of a container image's manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// Writes the image, snapshot or container `name` to the file or directory `target`; `-`, a pipe and a character
/// device are written from the first byte to the last. What cannot be written in whole is not there.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] for what is there; [`ErrorKind::InUse`] while an NBD server has the
/// container; [`ErrorKind::Unsupported`] for files of a disk that holds none; [`ErrorKind::NoSpace`].
pub fn export(
    store: &Store,
    name: &str,
    target: &Path,
    options: &ExportOptions,
    watch: &dyn Watch,
) -> Result<ExportReport> {
    check(options)?;
    // First, so that nothing is done for what has no place to go to.
    let mut out = Out::new(target, options)?;
    let without = options.without.as_deref();
    let without = without.map(|image| store.image(image)).transpose()?;
    let mut export = Export {
        subject: Subject::find(store, name, options.format == Format::Layer)?,
        options,
        without,
        watch,
        report: ExportReport {
            name: name.to_owned(),
            format: options.format,
            path: target.to_owned(),
            bytes: None,
            layers: None,
            digest: None,
        },
    };
    let written = match options.format {
        Format::Raw => export.raw(&mut out),
        Format::Qcow2 => export.qcow2(&mut out),
        Format::Tar => export.tar(&mut out),
        Format::Oci | Format::Docker => export.image(&mut out),
        Format::Layer => export.layers(&mut out),
    };
    let what = || match target.as_os_str() == "-" {
        true => format!("exporting {name} to standard output"),
        false => format!("exporting {name} to {}", target.display()),
    };
    written.and_then(|()| out.finish()).context(what)?;
    Ok(export.report)
}

/// Refuses options that contradict the format.
fn check(options: &ExportOptions) -> Result<()> {
    let refuse = |text: &str| Err(Error::new(ErrorKind::InvalidInput, text));
    if options.layers && options.format != Format::Qcow2 {
        return refuse("--layers is for --format qcow2; an OCI image always has its layers");
    }
    if options.compression.is_some() && options.format != Format::Oci {
        return refuse(
            "--compression is for the layers of --format oci: send others to gzip or zstd",
        );
    }
    if options.name.is_some() && !matches!(options.format, Format::Oci | Format::Docker) {
        return refuse("--name is for --format oci and docker");
    }
    if options.without.is_some() && options.format != Format::Layer {
        return refuse("--without is for --format layer: other formats have all of it");
    }
    Ok(())
}

struct Export<'a> {
    subject: Subject<'a>,
    options: &'a ExportOptions,
    without: Option<ImageRecord>,
    watch: &'a dyn Watch,
    report: ExportReport,
}

impl Export<'_> {
    fn raw(&mut self, out: &mut Out) -> Result<()> {
        let open = self.subject.open_whole()?;
        let chain = open.chain();
        let size = disk::data_bytes(chain)?;
        let progress = self.watch.begin(&self.subject.name, Some(size));
        let bytes = match out {
            Out::Stream(stream) => disk::raw_stream(chain, stream, progress)?,
            Out::File(new) => disk::raw_file(chain, new.file(), progress)?,
            Out::Dir(_) => return Err(Error::internal("a raw disk is no directory")),
        };
        self.watch.done();
        self.report.bytes = Some(bytes);
        Ok(())
    }

    fn qcow2(&mut self, out: &mut Out) -> Result<()> {
        let bytes = match out {
            Out::Dir(new) => disk::qcow2_layers(&self.subject, &new.inner(), self.watch)?,
            Out::File(new) => {
                let open = self.subject.open_whole()?;
                let chain = open.chain();
                let size = disk::data_bytes(chain)?;
                let progress = self.watch.begin(&self.subject.name, Some(size));
                let bytes = disk::qcow2_file(chain, new.file(), progress)?;
                self.watch.done();
                bytes
            }
            Out::Stream(_) => return Err(Error::internal("a qcow2 is no stream")),
        };
        self.report.bytes = Some(bytes);
        Ok(())
    }

    fn tar(&mut self, out: &mut Out) -> Result<()> {
        self.subject.need_files()?;
        let mount = self.subject.mount(self.subject.whole()?)?;
        let mut output = BufWriter::with_capacity(BUFFER, out.writer()?);
        let progress = self.watch.begin(&self.subject.name, None);
        write_rootfs_tar(mount.dir(), &self.subject.foreign(), &mut output, progress)?;
        output.flush().context(|| "writing the tar")?;
        self.watch.done();
        mount.end()
    }

    fn layers(&mut self, out: &mut Out) -> Result<()> {
        let without = self.without.as_ref();
        let written = layers::write(&self.subject, without, out.writer()?, self.watch)?;
        self.report.layers = Some(written.layers);
        self.report.bytes = Some(written.bytes);
        Ok(())
    }

    /// A container image: what it is made of is collected where it has room, then put together.
    fn image(&mut self, out: &mut Out) -> Result<()> {
        self.subject.need_files()?;
        let is_docker = self.options.format == Format::Docker;
        let compression = match is_docker {
            true => Compression::None,
            false => self.options.compression.unwrap_or(Compression::Gzip),
        };
        let staging = self.subject.store.root().join("staging");
        let spool = out.spool().unwrap_or(&staging);
        let name = self.options.name.as_deref();
        let collected = image::collect(&self.subject, spool, compression, name, self.watch)?;
        self.report.layers = Some(collected.layers);
        let digest = match out {
            Out::Dir(new) => collected.layout(&new.inner())?,
            other => {
                let mut output = BufWriter::with_capacity(BUFFER, other.writer()?);
                let digest = match is_docker {
                    true => collected.docker(&mut output)?,
                    false => collected.archive(&mut output)?,
                };
                output.flush().context(|| "writing the archive")?;
                digest
            }
        };
        self.report.digest = Some(digest);
        Ok(())
    }
}
