//! Finds out what a source is, by its content and not by its name.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, BufReader, Cursor, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::blobs::{Archive, Blobs, Slice};
use super::compress::{Compression, Decoder, buffered};
use super::config::ImageConfig;
use super::layer::{LayerReader, LayerRef};
use super::members::Members;
use super::oci::Platform;
use super::{Progress, docker, oci, read_failure};
use crate::error::ResultExt;
use crate::{Error, ErrorKind, Result};

/// How much of a source is looked at, in bytes: every superblock that is known lies in it.
const HEAD: usize = 128 * 1024;

/// How much of a stream is looked at for names that only an image archive has, in bytes.
const STREAM_HEAD: u64 = 1 << 20;

/// A tar without a member is at most this long, in bytes: one record of tar's usual size.
const EMPTY_TAR: u64 = 10 * 1024;

/// What a user says about a source.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SourceOptions {
    /// Which image of an archive that holds several; `None` when there is one.
    pub image: Option<String>,
    /// Which platform of an image for several; `None` is this host's.
    pub platform: Option<Platform>,
    /// A directory on a file system with room, for archives that cannot be read in place.
    pub spool: PathBuf,
}

impl SourceOptions {
    /// No wishes; archives that are compressed or come from a pipe are kept in `spool`, in
    /// files without a name, as long as they are read.
    pub fn new(spool: impl Into<PathBuf>) -> Self {
        SourceOptions {
            image: None,
            platform: None,
            spool: spool.into(),
        }
    }
}

/// Where a root file system comes from.
#[derive(Debug)]
#[non_exhaustive]
pub enum Source {
    /// A directory that is a root file system. See [`copy_tree`](super::copy_tree).
    Directory(PathBuf),
    /// The tar of a root file system, one layer without whiteouts.
    Tar(TarSource),
    /// A container image.
    Image(Box<Image>),
    /// A disk image.
    Raw(RawImage),
}

/// A tar, wherever it comes from.
pub struct TarSource {
    input: Input,
    compression: Compression,
    size: Option<u64>,
}

enum Input {
    File(Arc<File>),
    Stream(Box<dyn Read + Send>),
}

impl fmt::Debug for TarSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TarSource")
            .field("compression", &self.compression)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl TarSource {
    /// How it was compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// The size in bytes of what [`Progress`] counts, where it is known: the file as stored.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// The uncompressed tar. `progress` hears of the bytes read from the file or pipe.
    ///
    /// # Errors
    ///
    /// `Io` when it cannot be read.
    pub fn into_reader(self, progress: Option<Progress<'static>>) -> Result<Box<dyn Read + Send>> {
        let input: Box<dyn Read + Send> = match self.input {
            Input::File(file) => {
                let counted = Counted {
                    input: Slice::new(file, 0, u64::MAX),
                    progress,
                };
                Box::new(Decoder::new(buffered(counted))?)
            }
            Input::Stream(stream) => Box::new(Counted {
                input: stream,
                progress,
            }),
        };
        Ok(input)
    }
}

struct Counted<R> {
    input: R,
    progress: Option<Progress<'static>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(into)?;
        if let Some(progress) = &mut self.progress {
            progress(count as u64);
        }
        Ok(count)
    }
}

/// A disk image, byte for byte.
#[derive(Debug)]
#[non_exhaustive]
pub struct RawImage {
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes, a multiple of 512.
    pub size: u64,
    /// The file system in it, when a known superblock is there: `ext4`, `xfs`.
    pub filesystem: Option<&'static str>,
    /// Whether it begins with a partition table.
    pub partitioned: bool,
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
        LayerReader::new(blob, layer, progress)
    }
}

impl Source {
    /// Finds out what `spec` is: a path, or `-` for standard input.
    ///
    /// # Errors
    ///
    /// `NotFound` when there is nothing, or no image of the name or platform asked for (the
    /// message lists what there is); `Unsupported` for what is recognised but not read here, with
    /// the command that helps; `Corrupt` for a damaged archive.
    pub fn open(spec: &Path, options: &SourceOptions) -> Result<Source> {
        if spec.as_os_str() == "-" {
            let input = Box::new(io::stdin());
            return from_stream(input, None, options).context(|| "standard input");
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
    let mut file = File::open(path).context(|| "opening it")?;
    if kind.is_file() {
        return open_file(path, file, options);
    }
    if kind.is_block_device() {
        let size = file.seek(SeekFrom::End(0)).context(|| "finding its size")?;
        let head = read_head(&file)?;
        return raw(path, size, &head);
    }
    if kind.is_fifo() || kind.is_char_device() {
        return from_stream(Box::new(file), None, options);
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        "it is neither a file, a directory, a pipe nor a block device",
    ))
}

fn open_directory(path: &Path, options: &SourceOptions) -> Result<Source> {
    let has = |name: &str| path.join(name).exists();
    if has("oci-layout") && has("index.json") {
        return oci::load(Blobs::Directory(path.into()), options)
            .map(|image| Source::Image(Box::new(image)));
    }
    let root = has("etc") || has("usr") || has("bin");
    if !root && has("config.json") && has("rootfs") {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "it is a bundle of an OCI runtime: import the rootfs directory inside it",
        ));
    }
    if !root && has("manifest.json") && has("version") {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "it is skopeo's dir: format: convert it with skopeo copy dir:PATH oci:NEW:latest",
        ));
    }
    Ok(Source::Directory(path.into()))
}

fn read_head(file: &File) -> Result<Vec<u8>> {
    let mut head = vec![0; HEAD];
    let mut filled = 0;
    loop {
        let into = head.get_mut(filled..).unwrap_or_default();
        let count = file
            .read_at(into, filled as u64)
            .context(|| "reading its first bytes")?;
        if count == 0 {
            head.truncate(filled);
            return Ok(head);
        }
        filled += count;
    }
}

fn open_file(path: &Path, file: File, options: &SourceOptions) -> Result<Source> {
    let head = read_head(&file)?;
    let size = file.metadata().context(|| "reading its size")?.len();
    if head.is_empty() {
        return Err(Error::new(ErrorKind::InvalidInput, "it is empty"));
    }
    let compression = Compression::detect(&head)?;
    if compression != Compression::None {
        let file = Arc::new(file);
        let whole = Box::new(Slice::new(file.clone(), 0, u64::MAX));
        return from_stream(whole, Some((file, size)), options);
    }
    if is_tar(&head) || (size <= EMPTY_TAR && is_empty_tar(&head)) {
        if looks(&head) == Looks::Root {
            return Ok(plain_tar(Arc::new(file), size));
        }
        let archive = Archive::index(file)?;
        return from_archive(archive, size, options);
    }
    raw(path, size, &head)
}

/// An archive in a file that can be read in place: an image, or the tar of a root file system.
fn from_archive(archive: Archive, size: u64, options: &SourceOptions) -> Result<Source> {
    if archive.has("oci-layout") && archive.has("index.json") {
        return oci::load(Blobs::Archive(archive), options)
            .map(|image| Source::Image(Box::new(image)));
    }
    if archive.has("manifest.json") && !archive.has("etc/passwd") {
        return docker::load(Blobs::Archive(archive), options)
            .map(|image| Source::Image(Box::new(image)));
    }
    Ok(plain_tar(archive.into_file(), size))
}

fn plain_tar(file: Arc<File>, size: u64) -> Source {
    Source::Tar(TarSource {
        input: Input::File(file),
        compression: Compression::None,
        size: Some(size),
    })
}

/// A tar that comes byte after byte. One that looks like an image is kept in a file first.
fn from_stream(
    input: Box<dyn Read + Send>,
    file: Option<(Arc<File>, u64)>,
    options: &SourceOptions,
) -> Result<Source> {
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
        .take(STREAM_HEAD)
        .read_to_end(&mut head)
        .map_err(|error| read_failure("reading the first bytes", error))?;
    if head.is_empty() {
        return Err(Error::new(ErrorKind::InvalidInput, "it is empty"));
    }
    if !is_tar(&head) && !is_empty_tar(&head) {
        let inside = match filesystem(&head) {
            Some(name) => format!("holds a disk image ({name}), which has to be a plain file"),
            None => "does not hold a tar".to_owned(),
        };
        return Err(Error::new(
            ErrorKind::Unsupported,
            match compression {
                Compression::None => format!("the stream {inside}"),
                Compression::Gzip => format!("the gzip data {inside}: decompress it first"),
                Compression::Zstd => format!("the zstd data {inside}: decompress it first"),
            },
        ));
    }
    let looks = looks(&head);
    let mut whole = Cursor::new(head).chain(decoder);
    if looks != Looks::Image {
        let (input, size) = match file {
            // From the start again, so that progress counts the bytes of the file.
            Some((file, size)) => (Input::File(file), Some(size)),
            None => (Input::Stream(Box::new(whole)), None),
        };
        return Ok(Source::Tar(TarSource {
            input,
            compression,
            size,
        }));
    }
    let spool = &options.spool;
    let mut file =
        tempfile::tempfile_in(spool).context(|| format!("making a temporary file in {spool:?}"))?;
    let length = io::copy(&mut whole, &mut file)
        .map_err(|error| read_failure(&format!("keeping the archive in {spool:?}"), error))?;
    let archive = Archive::index(file)?;
    from_archive(archive, length, options)
}

/// Whether it begins with a valid tar header.
fn is_tar(head: &[u8]) -> bool {
    let Some(header) = head.first_chunk::<512>() else {
        return false;
    };
    header.iter().any(|byte| *byte != 0)
        && tar_core::Header::from_bytes(header)
            .verify_checksum()
            .is_ok()
}

/// Whether it is nothing but the end marker of a tar.
fn is_empty_tar(head: &[u8]) -> bool {
    head.len() >= 1024
        && head.len() as u64 <= EMPTY_TAR
        && head.len().is_multiple_of(512)
        && head.iter().all(|byte| *byte == 0)
}

/// What the names of the first members say about a tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Looks {
    /// Some are those of an image archive, and none speaks against it.
    Image,
    /// They are those of a root file system.
    Root,
    Unknown,
}

fn looks(head: &[u8]) -> Looks {
    let mut members = Members::new(head);
    let mut looks = Looks::Unknown;
    // The head ends in the middle of a member, which is no concern here.
    while let Ok(Some(member)) = members.next() {
        let path = member.node.path;
        let mut components = path.split(|byte| *byte == b'/');
        let first = components.next().unwrap_or_default();
        let nested = components.next().is_some();
        // Docker, skopeo and go-containerregistry name their files after digests.
        let hex = first.strip_prefix(b"sha256:").unwrap_or(first);
        let hex = hex.split(|byte| *byte == b'.').next().unwrap_or_default();
        let hash = hex.len() == 64 && hex.iter().all(u8::is_ascii_hexdigit);
        let known = matches!(first, b"oci-layout" | b"blobs" | b"repositories")
            || [&b".json"[..], b".tar", b".tar.gz"]
                .iter()
                .any(|end| first.ends_with(end));
        if hash || known {
            looks = Looks::Image;
        } else if nested {
            return Looks::Root;
        }
    }
    looks
}

fn raw(path: &Path, size: u64, head: &[u8]) -> Result<Source> {
    let foreign = |format: &str, name: &str| {
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "it is a disk image in {format} format: make it raw first with \
                 qemu-img convert -f {name} -O raw {} NEW.raw",
                path.display()
            ),
        ))
    };
    if head.starts_with(b"QFI\xfb") {
        return foreign("QEMU's", "qcow2");
    }
    if head.starts_with(b"KDMV") || head.starts_with(b"# Disk DescriptorFile") {
        return foreign("VMware's", "vmdk");
    }
    if head.starts_with(b"vhdxfile") {
        return foreign("Hyper-V's", "vhdx");
    }
    if head.starts_with(b"conectix") {
        return foreign("Virtual PC's", "vpc");
    }
    let filesystem = filesystem(head);
    if size == 0 || !size.is_multiple_of(512) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            match filesystem {
                Some(name) => format!(
                    "it holds a file system ({name}) but its size of {size} bytes is not a \
                     multiple of 512: it is cut off"
                ),
                None => "it is nothing that can be imported: neither a tar (plain, gzip, zstd), \
                         an OCI layout or archive, a docker-archive, a directory nor a raw disk \
                         image (whose size is a multiple of 512 bytes)"
                    .to_owned(),
            },
        ));
    }
    Ok(Source::Raw(RawImage {
        path: path.into(),
        size,
        filesystem,
        partitioned: filesystem.is_none() && is_partitioned(head),
    }))
}

fn at(head: &[u8], offset: usize, magic: &[u8]) -> bool {
    head.get(offset..)
        .is_some_and(|tail| tail.starts_with(magic))
}

/// The file system whose superblock is at the place where it belongs.
fn filesystem(head: &[u8]) -> Option<&'static str> {
    if at(head, 0x438, &[0x53, 0xef]) {
        // Extents mark ext4, a journal ext3; that far the family's members tell themselves apart.
        let word = |offset: usize| -> u32 {
            let bytes = head.get(offset..).and_then(|tail| tail.first_chunk::<4>());
            bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        let (compatible, incompatible) = (word(0x45c), word(0x460));
        return Some(if incompatible & 0x40 != 0 {
            "ext4"
        } else if compatible & 0x4 != 0 {
            "ext3"
        } else {
            "ext2"
        });
    }
    if at(head, 0, b"XFSB") {
        return Some("xfs");
    }
    if at(head, 0x10040, b"_BHRfS_M") {
        return Some("btrfs");
    }
    if at(head, 0, b"hsqs") {
        return Some("squashfs");
    }
    if at(head, 1024, &[0xe2, 0xe1, 0xf5, 0xe0]) {
        return Some("erofs");
    }
    if at(head, 1024, &[0x10, 0x20, 0xf5, 0xf2]) {
        return Some("f2fs");
    }
    if at(head, 0x8001, b"CD001") {
        return Some("iso9660");
    }
    if at(head, 510, &[0x55, 0xaa]) && (at(head, 54, b"FAT") || at(head, 82, b"FAT32")) {
        return Some("vfat");
    }
    None
}

fn is_partitioned(head: &[u8]) -> bool {
    at(head, 512, b"EFI PART") || at(head, 510, &[0x55, 0xaa])
}
