//! Sources of images: what they are read as, by their content and not by their name.
//!
//! docs/images.md has the order in which a source is looked at; [`super::detect`] does the looking.
//! Each format has a module that is called from here and gives back an [`Image`] or a [`DiskImage`]: a
//! dispatcher and its cases, which know each other.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, BufReader, Cursor, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::blobs::{Archive, Blobs};
use super::compress::{Compression, Decoder, buffered};
use super::config::ImageConfig;
use super::detect::{self, Archived};
use super::disk::DiskImage;
use super::layer::{LayerReader, LayerRef};
use super::measure::{self, Measure};
use super::platform::Platform;
use super::raw;
use super::slice::Slice;
use super::{Progress, docker, docker_legacy, oci, qcow2, read_failure};
use vellum_base::error::ResultExt;
use vellum_base::interrupt::{self, Interruptible, standard_input};
use vellum_base::{Error, ErrorKind, Result};

/// What a source can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A directory that is a root file system.
    Directory,
    /// A tar of files.
    Tar,
    /// An OCI layout, as a directory or in a tar.
    Oci,
    /// A Docker archive, of either age.
    Docker,
    /// A disk image or block device, byte for byte.
    Raw,
    /// A disk image in QEMU's format of that name.
    Qcow2,
    /// An image with its block layers.
    Layer,
}

impl fmt::Display for Format {
    /// As `--format` takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Directory => "dir",
            Format::Tar => "tar",
            Format::Oci => "oci",
            Format::Docker => "docker",
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Layer => "layer",
        })
    }
}

/// What a user says about a source.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SourceOptions {
    /// Which image of an archive that holds several; `None` when there is one.
    pub image: Option<String>,
    /// Which platform of an image for several; `None` is this host's.
    pub platform: Option<Platform>,
    /// What the source is; `None` finds out.
    pub format: Option<Format>,
    /// A directory on a file system with room, for what cannot be read in place.
    pub spool: PathBuf,
    /// Files, and directories with them, that a disk image may name as its backing, besides those that lie
    /// beside it.
    pub allow_backing: Vec<PathBuf>,
    /// What a layer file begins with: the caller reads those.
    pub layer_file: Option<&'static [u8]>,
}

impl SourceOptions {
    /// No wishes; archives that are compressed or come from a pipe are kept in `spool`, in
    /// files without a name, as long as they are read.
    pub fn new(spool: impl Into<PathBuf>) -> Self {
        SourceOptions {
            image: None,
            platform: None,
            format: None,
            spool: spool.into(),
            allow_backing: Vec::new(),
            layer_file: None,
        }
    }
}

/// Where a root file system comes from.
#[derive(Debug)]
pub enum Source {
    /// A directory that is a root file system. See [`copy_tree`](super::copy_tree).
    Directory(PathBuf),
    /// The tar of a root file system, one layer without whiteouts.
    Tar(StreamSource),
    /// A container image.
    Image(Box<Image>),
    /// A disk image.
    Disk(DiskImage),
    /// What begins as a layer file does.
    Layers(StreamSource),
}

/// A tar or layer file, wherever it comes from.
pub struct StreamSource {
    input: Input,
    compression: Compression,
    size: Option<u64>,
}

enum Input {
    File(Arc<File>),
    /// `None` once it was read.
    Stream(Option<Box<dyn Read + Send>>),
}

impl fmt::Debug for StreamSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamSource")
            .field("compression", &self.compression)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl StreamSource {
    /// How it was compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// The size in bytes of what [`Progress`] counts, where it is known: the file as stored.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// Its bytes, uncompressed. `progress` hears of the bytes read from the file or pipe.
    ///
    /// # Errors
    ///
    /// `Io` when it cannot be read.
    pub fn into_reader(
        mut self,
        progress: Option<Progress<'static>>,
    ) -> Result<Box<dyn Read + Send>> {
        self.reader(progress)
    }

    /// As [`StreamSource::into_reader`]; again and again, unless it is a pipe.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a pipe that was read before; as [`StreamSource::into_reader`].
    pub fn reader(&mut self, progress: Option<Progress<'static>>) -> Result<Box<dyn Read + Send>> {
        let input: Box<dyn Read + Send> = match &mut self.input {
            Input::File(file) => {
                let counted = Counted {
                    input: Slice::new(file.clone(), 0, u64::MAX),
                    progress,
                };
                Box::new(Decoder::new(buffered(counted))?)
            }
            Input::Stream(stream) => Box::new(Counted {
                input: stream.take().ok_or_else(|| {
                    Error::new(ErrorKind::InvalidInput, "a pipe cannot be read twice")
                })?,
                progress,
            }),
        };
        Ok(input)
    }

    /// What is in it; `None` for a pipe, and for a compressed one unless `thoroughly`.
    fn measure(&self, thoroughly: bool) -> Result<Option<Measure>> {
        let Input::File(file) = &self.input else {
            return Ok(None);
        };
        measure::tar(Slice::new(file.clone(), 0, u64::MAX), thoroughly)
    }
}

struct Counted<R> {
    input: R,
    progress: Option<Progress<'static>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        interrupt::check_io()?;
        let count = self.input.read(into)?;
        if let Some(progress) = &mut self.progress {
            progress(count as u64);
        }
        Ok(count)
    }
}

/// A container image: its configuration and its layers.
#[derive(Debug)]
pub struct Image {
    blobs: Blobs,
    names: Vec<String>,
    config: ImageConfig,
    layers: Vec<LayerRef>,
    files: Vec<String>,
}

impl Image {
    pub(super) fn new(
        blobs: Blobs,
        names: Vec<String>,
        config: ImageConfig,
        layers: Vec<LayerRef>,
        files: Vec<String>,
    ) -> Image {
        Image {
            blobs,
            names,
            config,
            layers,
            files,
        }
    }

    /// The names it goes by in its archive; often none.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// What it says about itself.
    pub fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// Its layers, the lowest first.
    pub fn layers(&self) -> &[LayerRef] {
        &self.layers
    }

    /// The diff_ids of its layers, the lowest first, for [`chain_ids`](super::chain_ids).
    pub fn diff_ids(&self) -> &[String] {
        &self.config.rootfs.diff_ids
    }

    /// The uncompressed tar of layer `index`, checked while it is read: see [`LayerReader`].
    ///
    /// `progress` hears of the bytes read of the layer as stored ([`LayerRef::size`]).
    ///
    /// # Errors
    ///
    /// `InvalidInput` for an index beyond the last layer, `NotFound` when the archive lacks the
    /// layer, `Corrupt` when its size is not what the manifest says.
    pub fn open_layer(
        &self,
        index: usize,
        progress: Option<Progress<'static>>,
    ) -> Result<LayerReader> {
        let (Some(layer), Some(file)) = (self.layers.get(index), self.files.get(index)) else {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "the image has {} layers, not {}",
                    self.layers.len(),
                    index + 1
                ),
            ));
        };
        let (blob, size) = self
            .blobs
            .open(file)
            .context(|| format!("layer {} of the image", index + 1))?;
        if size != layer.size {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "layer {} has {size} bytes where the manifest says {}",
                    index + 1,
                    layer.size
                ),
            ));
        }
        LayerReader::new(Box::new(blob), layer, progress)
    }
}

impl Source {
    /// How much its content takes in a file system; `None` where that cannot be told. What is
    /// compressed is measured only `thoroughly`, by decompressing it. For disk images `None`.
    ///
    /// # Errors
    ///
    /// As reading it.
    pub fn measure(&self, thoroughly: bool) -> Result<Option<Measure>> {
        match self {
            Source::Directory(path) => measure::tree(path).map(Some),
            Source::Tar(tar) => tar.measure(thoroughly),
            Source::Image(image) => {
                let mut sum = Measure::default();
                for file in &image.files {
                    let (blob, _) = image.blobs.open(file)?;
                    match measure::tar(blob, thoroughly)? {
                        Some(layer) => sum += layer,
                        None => return Ok(None),
                    }
                }
                Ok(Some(sum))
            }
            Source::Disk(_) | Source::Layers(_) => Ok(None),
        }
    }

    /// Finds out what `spec` is: a path, or `-` for standard input.
    ///
    /// # Errors
    ///
    /// `NotFound` when there is nothing, or no image of the name or platform asked for (the
    /// message lists what there is); `Unsupported` for what is recognised but not read here, with
    /// the command that helps; `Corrupt` for a damaged archive.
    pub fn open(spec: &Path, options: &SourceOptions) -> Result<Source> {
        if spec.as_os_str() == "-" {
            let input = standard_input().context(|| "standard input")?;
            return from_stream(Box::new(input), None, options).context(|| "standard input");
        }
        let meta = std::fs::metadata(spec).context(|| format!("opening {spec:?}"))?;
        open_path(spec, &meta, options).context(|| format!("{}", spec.display()))
    }
}

fn open_path(path: &Path, meta: &Metadata, options: &SourceOptions) -> Result<Source> {
    let kind = meta.file_type();
    if kind.is_dir() {
        return open_directory(path, options);
    }
    let file = File::open(path).context(|| "opening it")?;
    if options.format == Some(Format::Directory) {
        return Err(contradicts(Format::Directory, "it is not a directory"));
    }
    if kind.is_file() {
        return open_file(path, file, options);
    }
    if kind.is_block_device() {
        match options.format {
            None => return raw::open(path, file, false).map(Source::Disk),
            Some(Format::Raw) => return raw::open(path, file, true).map(Source::Disk),
            Some(Format::Qcow2) => return qcow2::open(path, file, options).map(Source::Disk),
            Some(_) => {}
        }
    }
    if kind.is_fifo() || kind.is_char_device() || kind.is_block_device() {
        return from_stream(Box::new(Interruptible(file)), None, options);
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        "it is neither a file, a directory, a pipe nor a block device",
    ))
}

/// An error about a format that was asked for and is not there.
fn contradicts(format: Format, why: &str) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!("--format {format} was given, but {why}"),
    )
}

fn image(loaded: Result<Image>) -> Result<Source> {
    loaded.map(|image| Source::Image(Box::new(image)))
}

fn open_directory(path: &Path, options: &SourceOptions) -> Result<Source> {
    let blobs = || Blobs::Directory(path.into());
    match options.format {
        Some(Format::Directory) => Ok(Source::Directory(path.into())),
        Some(Format::Oci) => image(oci::load(blobs(), options)),
        Some(Format::Docker) => image(docker::load(blobs(), options)),
        Some(other) => Err(contradicts(other, "it is a directory")),
        None => match detect::directory(path)? {
            Archived::Oci => image(oci::load(blobs(), options)),
            Archived::Docker => image(docker::load(blobs(), options)),
            Archived::LegacyDocker | Archived::Files => Ok(Source::Directory(path.into())),
        },
    }
}

fn open_file(path: &Path, file: File, options: &SourceOptions) -> Result<Source> {
    let size = file.metadata().context(|| "reading its size")?.len();
    match options.format {
        Some(Format::Raw) => return raw::open(path, file, true).map(Source::Disk),
        Some(Format::Qcow2) => return qcow2::open(path, file, options).map(Source::Disk),
        _ => {}
    }
    let head = detect::head(&file)?;
    if head.is_empty() {
        return Err(Error::new(ErrorKind::InvalidInput, "it is empty"));
    }
    let compression = Compression::detect(&head)?;
    if compression != Compression::None {
        let file = Arc::new(file);
        let whole = Box::new(Slice::new(file.clone(), 0, u64::MAX));
        return from_stream(whole, Some((file, size)), options);
    }
    let is_tar = detect::is_tar(&head, size);
    if is_layers(&head, is_tar, options)? {
        return Ok(Source::Layers(stored(Arc::new(file), size)));
    }
    if is_tar {
        if is_plain(&head, options) {
            return Ok(Source::Tar(stored(Arc::new(file), size)));
        }
        let archive = Archive::index(file)?;
        return from_archive(archive, size, options);
    }
    if let Some(format) = options.format {
        return Err(contradicts(format, "it does not begin as a tar does"));
    }
    if qcow2::is_one(&head) {
        return qcow2::open(path, file, options).map(Source::Disk);
    }
    raw::open(path, file, false).map(Source::Disk)
}

/// Whether a source is a layer file, by its first bytes.
fn is_layers(head: &[u8], is_tar: bool, options: &SourceOptions) -> Result<bool> {
    let magic = options.layer_file;
    let begins = magic.is_some_and(|magic| head.starts_with(magic));
    match options.format {
        None => Ok(begins && !is_tar),
        Some(Format::Layer) if !begins => Err(contradicts(
            Format::Layer,
            "it does not begin as a layer file does",
        )),
        Some(format) => Ok(format == Format::Layer),
    }
}

/// Whether a tar is one of files as far as its beginning says, so that it need not be read twice.
fn is_plain(head: &[u8], options: &SourceOptions) -> bool {
    match options.format {
        None => detect::is_root(head),
        Some(format) => format == Format::Tar,
    }
}

/// An archive in a file that can be read in place: an image, or the tar of a root file system.
fn from_archive(archive: Archive, size: u64, options: &SourceOptions) -> Result<Source> {
    let blobs = Blobs::Archive(archive);
    let kind = match options.format {
        None => detect::archive(&blobs)?,
        Some(Format::Oci) => Archived::Oci,
        Some(Format::Docker) if !blobs.has("manifest.json") => Archived::LegacyDocker,
        Some(Format::Docker) => Archived::Docker,
        Some(_) => Archived::Files,
    };
    match kind {
        Archived::Oci => image(oci::load(blobs, options)),
        Archived::Docker => image(docker::load(blobs, options)),
        Archived::LegacyDocker => image(docker_legacy::load(blobs, options)),
        Archived::Files => match blobs {
            Blobs::Archive(archive) => Ok(Source::Tar(stored(archive.into_file(), size))),
            Blobs::Directory(path) => Ok(Source::Directory(path)),
        },
    }
}

/// What lies in a file as it is.
fn stored(file: Arc<File>, size: u64) -> StreamSource {
    StreamSource {
        input: Input::File(file),
        compression: Compression::None,
        size: Some(size),
    }
}

/// A tar or layer file that comes byte after byte. A tar that does not begin as a root file system is kept in a
/// file first: whether it is an image only the whole of it can say.
fn from_stream(
    input: Box<dyn Read + Send>,
    file: Option<(Arc<File>, u64)>,
    options: &SourceOptions,
) -> Result<Source> {
    if let Some(format @ (Format::Raw | Format::Qcow2)) = options.format {
        return Err(contradicts(
            format,
            "it is read as a stream: a disk image has to be a file or a block device",
        ));
    }
    let mut input: BufReader<Box<dyn Read + Send>> = buffered(input);
    let compression = {
        use io::BufRead;
        let head = input
            .fill_buf()
            .map_err(|error| read_failure("reading the first bytes", error))?;
        Compression::detect(head)?
    };
    let mut decoder = Decoder::new(input)?;
    let mut head = Vec::new();
    (&mut decoder)
        .take(detect::HEAD)
        .read_to_end(&mut head)
        .map_err(|error| read_failure("reading the first bytes", error))?;
    if head.is_empty() {
        return Err(Error::new(ErrorKind::InvalidInput, "it is empty"));
    }
    let is_tar = detect::is_tar(&head, head.len() as u64);
    if is_layers(&head, is_tar, options)? {
        return Ok(Source::Layers(again(file, compression).unwrap_or_else(
            || StreamSource {
                input: Input::Stream(Some(Box::new(Cursor::new(head).chain(decoder)))),
                compression,
                size: None,
            },
        )));
    }
    if !is_tar {
        return Err(no_tar(&head, compression, options));
    }
    let plain = is_plain(&head, options);
    let mut whole = Cursor::new(head).chain(decoder);
    if plain {
        return Ok(Source::Tar(again(file, compression).unwrap_or_else(|| {
            StreamSource {
                input: Input::Stream(Some(Box::new(whole))),
                compression,
                size: None,
            }
        })));
    }
    let spool = &options.spool;
    let mut kept =
        tempfile::tempfile_in(spool).context(|| format!("making a temporary file in {spool:?}"))?;
    let length = io::copy(&mut whole, &mut kept)
        .map_err(|error| read_failure(&format!("keeping the archive in {spool:?}"), error))?;
    let archive = Archive::index(kept)?;
    match from_archive(archive, length, options)? {
        Source::Tar(kept) => Ok(Source::Tar(again(file, compression).unwrap_or(kept))),
        image => Ok(image),
    }
}

/// From the start again where it can be, so that progress counts the bytes of the file.
fn again(file: Option<(Arc<File>, u64)>, compression: Compression) -> Option<StreamSource> {
    file.map(|(file, size)| StreamSource {
        input: Input::File(file),
        compression,
        size: Some(size),
    })
}

/// Says what a stream is that is no tar.
fn no_tar(head: &[u8], compression: Compression, options: &SourceOptions) -> Error {
    let disk = match qcow2::is_one(head) {
        true => Some("qcow2".to_owned()),
        false => raw::holds_in(head, &options.spool).map(|holds| holds.to_string()),
    };
    let inside = match disk {
        Some(disk) => format!("holds a disk image ({disk}), which has to be a plain file"),
        None => "does not hold a tar".to_owned(),
    };
    Error::new(
        ErrorKind::Unsupported,
        match compression {
            Compression::None => format!("the stream {inside}"),
            Compression::Gzip => format!("the gzip data {inside}: decompress it first"),
            Compression::Zstd => format!("the zstd data {inside}: decompress it first"),
        },
    )
}
