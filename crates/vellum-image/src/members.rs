//! Reads a tar stream member by member, with bounded memory.
//!
//! The format itself is `tar_core`'s work (ustar, GNU, PAX, all sparse forms); this adds the
//! buffer that feeds it, nanosecond times, both xattr dialects and the checks that make a
//! member safe to act on. PAX values are binary-safe here: a capability may hold a newline.

use std::borrow::Cow;
use std::io::{self, Read};

use tar_core::parse::{Limits, ParseError, ParseEvent, ParsedEntry, Parser};
use tar_core::{EntryType, SparseEntry};

use super::node::{Extent, Kind, MAX_PATH, Node, PERMISSIONS, Time, join, normalise, shown};
use super::read_failure;
use super::records::{Records, corrupt, refuse};
use vellum_base::{Error, ErrorKind, Result};

/// How much is read ahead at a time, in bytes.
const READ_AHEAD: usize = 128 * 1024;

/// The most that the headers of one member may take in memory, in bytes.
const MAX_HEADERS: usize = 16 * 1024 * 1024;

/// The most that names and PAX records of one member may take, in bytes.
const MAX_METADATA: u32 = 2 * 1024 * 1024;

/// The most data runs in the map of a sparse file.
const MAX_EXTENTS: usize = 256 * 1024;

/// The data of a member: where it lies and how much is unread.
#[derive(Debug, Clone, Copy, Default)]
struct Content {
    unread: u64,
    padding: u64,
}

impl Content {
    /// Bytes up to the next header. `content` saw to it that they can be counted.
    fn left(&self) -> u64 {
        self.unread + self.padding
    }
}

/// A tar stream taken apart.
pub(super) struct Members<R> {
    input: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Offset in the stream of `buffer[start]`, in bytes.
    position: u64,
    parser: Parser,
    content: Content,
    ended: bool,
    end_marker: bool,
}

/// A member and where its content lies.
#[derive(Debug)]
pub(super) struct Member {
    pub node: Node,
    /// Offset of its content in the stream, in bytes.
    pub offset: u64,
}

impl<R: Read> Members<R> {
    /// Starts at the first member.
    pub fn new(input: R) -> Self {
        let mut parser = Parser::new(Limits {
            max_metadata_size: MAX_METADATA,
            max_path_len: Some(MAX_PATH as u32 + 1),
            max_pending_entries: 16,
            max_sparse_entries: MAX_EXTENTS,
        });
        // The values are checked below, where a time before 1970 is no error, nor an empty name in
        // a PAX record: it leaves the header's.
        parser.set_ignore_pax_errors(true);
        parser.set_allow_empty_path(true);
        Members {
            input,
            buffer: vec![0; READ_AHEAD],
            start: 0,
            end: 0,
            position: 0,
            parser,
            content: Content::default(),
            ended: false,
            end_marker: false,
        }
    }

    /// Whether the archive ended with the zero blocks that tar puts there.
    pub fn end_marker(&self) -> bool {
        self.end_marker
    }

    /// Steps to the next member, past whatever of the current one's content is unread.
    ///
    /// `None` at the end of the archive.
    #[expect(
        clippy::indexing_slicing,
        reason = "`start` and `end` lie within the buffer, in this order"
    )]
    pub fn next(&mut self) -> Result<Option<Member>> {
        self.skip_content()?;
        if self.ended {
            return Ok(None);
        }
        loop {
            let wanted = match self.parser.parse(&self.buffer[self.start..self.end]) {
                Ok(ParseEvent::NeedData { min_bytes }) => min_bytes,
                Ok(ParseEvent::Entry { consumed, entry }) => {
                    let offset = self.position + consumed as u64;
                    let label = entry.entry_type == EntryType::Other(b'V');
                    let (member, content) = plain_member(&entry, offset)?;
                    self.consume(consumed);
                    self.content = content;
                    if label {
                        self.skip_content()?;
                        continue;
                    }
                    return Ok(Some(member));
                }
                Ok(ParseEvent::SparseEntry {
                    consumed,
                    entry,
                    sparse_map,
                    real_size,
                }) => {
                    let offset = self.position + consumed as u64;
                    let (member, content) = sparse_member(&entry, &sparse_map, real_size, offset)?;
                    self.consume(consumed);
                    self.content = content;
                    return Ok(Some(member));
                }
                // Defaults for all later members: containerd and Docker pass over them as well.
                Ok(ParseEvent::GlobalExtensions { consumed, .. }) => {
                    self.consume(consumed);
                    continue;
                }
                Ok(ParseEvent::End { consumed }) => {
                    self.consume(consumed);
                    self.ended = true;
                    self.end_marker = true;
                    return Ok(None);
                }
                Err(error) => match overridden(&error) {
                    Some(flag) if self.drop_header(flag) => continue,
                    _ => return Err(parse_failure(error, self.position)),
                },
            };
            if !self.fill(wanted)? {
                self.ended = true;
                let rest = self.buffered();
                if rest.is_empty() {
                    return Ok(None);
                }
                if rest.len() == 512 && rest.iter().all(|byte| *byte == 0) {
                    self.end_marker = true;
                    return Ok(None);
                }
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "the archive is cut off inside a header at byte {}",
                        self.position
                    ),
                ));
            }
        }
    }

    /// Reads content of the current member; 0 at its end.
    ///
    /// # Errors
    ///
    /// `Corrupt` when the archive ends before the content does.
    pub fn read_content(&mut self, into: &mut [u8]) -> Result<usize> {
        let most = self.content.unread.min(into.len() as u64) as usize;
        let (into, _) = into.split_at_mut(most);
        if into.is_empty() {
            return Ok(0);
        }
        let buffered = self.buffered();
        let count = if buffered.is_empty() {
            let count = read_retrying(&mut self.input, into)?;
            self.position += count as u64;
            count
        } else {
            let mut buffered = buffered;
            let count = read_retrying(&mut buffered, into)?;
            self.consume(count);
            count
        };
        if count == 0 {
            return Err(self.cut_off());
        }
        self.content.unread -= count as u64;
        Ok(count)
    }

    /// Reads what follows the end of the archive, so that the source sees all of its bytes pass.
    pub fn drain(&mut self) -> Result<()> {
        self.start = self.end;
        loop {
            let count = read_retrying(&mut self.input, &mut self.buffer)?;
            if count == 0 {
                return Ok(());
            }
            self.position += count as u64;
        }
    }

    /// Takes the first header of type `flag` in front of the next member out of the buffer, with
    /// its data: a later one of the type stands in its place, as GNU tar and Go read it.
    fn drop_header(&mut self, flag: u8) -> bool {
        const TYPE_AT: usize = 156;
        let mut at = self.start;
        loop {
            let Some(block) = self
                .buffer
                .get(at..self.end)
                .and_then(|rest| rest.first_chunk::<512>())
            else {
                return false;
            };
            let size = tar_core::Header::from_bytes(block).entry_size().ok();
            let size = size.and_then(|size| size.checked_next_multiple_of(512));
            let Some(size) = size.and_then(|size| usize::try_from(size).ok()) else {
                return false;
            };
            let is_zero = block.iter().all(|byte| *byte == 0);
            let next = at.saturating_add(if is_zero { 512 } else { 512 + size });
            if next > self.end {
                return false;
            }
            if block.get(TYPE_AT) == Some(&flag) && !is_zero {
                self.buffer
                    .copy_within(self.start..at, self.start + next - at);
                self.consume(next - at);
                return true;
            }
            at = next;
        }
    }

    fn cut_off(&self) -> Error {
        Error::new(
            ErrorKind::Corrupt,
            format!(
                "the archive is cut off at byte {}: {} bytes of this member are missing",
                self.position, self.content.unread
            ),
        )
    }

    fn skip_content(&mut self) -> Result<()> {
        let mut left = self.content.left();
        while left > 0 {
            if self.start == self.end && !self.fill(1)? {
                // Padding after the last member is missing in some archives.
                if left <= self.content.padding {
                    break;
                }
                self.content.unread = left - self.content.padding;
                return Err(self.cut_off());
            }
            let step = left.min((self.end - self.start) as u64) as usize;
            self.consume(step);
            left -= step as u64;
        }
        self.content = Content::default();
        Ok(())
    }

    /// What was read and not used yet.
    #[expect(
        clippy::indexing_slicing,
        reason = "`start` and `end` lie within the buffer, in this order"
    )]
    fn buffered(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn consume(&mut self, count: usize) {
        assert!(count <= self.end - self.start, "more is used than was read");
        self.start += count;
        self.position += count as u64;
    }

    /// Reads until `wanted` bytes are buffered, or at least one more than now; `false` at the end.
    fn fill(&mut self, wanted: usize) -> Result<bool> {
        let have = self.end - self.start;
        let wanted = wanted.max(have + 1);
        if wanted > MAX_HEADERS {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "the headers of the member at byte {} take more than {MAX_HEADERS} bytes",
                    self.position
                ),
            ));
        }
        self.buffer.copy_within(self.start..self.end, 0);
        self.start = 0;
        self.end = have;
        // Doubling keeps the cost of parsing long headers again and again linear.
        let size = wanted
            .max(if have > 0 { have * 2 } else { 0 })
            .max(READ_AHEAD);
        if self.buffer.len() < size {
            self.buffer.resize(size, 0);
        }
        while self.end < wanted {
            let (_, space) = self.buffer.split_at_mut(self.end);
            let count = read_retrying(&mut self.input, space)?;
            assert!(
                count <= space.len(),
                "a source gives more than it is asked for"
            );
            if count == 0 {
                return Ok(false);
            }
            self.end += count;
        }
        Ok(true)
    }
}

fn read_retrying(input: &mut impl Read, into: &mut [u8]) -> Result<usize> {
    loop {
        match input.read(into) {
            Ok(count) => return Ok(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(read_failure("reading the archive", error)),
        }
    }
}

/// The type of header that came twice for one member, where that is the error.
fn overridden(error: &ParseError) -> Option<u8> {
    match error {
        ParseError::DuplicatePaxHeader => Some(b'x'),
        ParseError::DuplicateGnuLongName => Some(b'L'),
        ParseError::DuplicateGnuLongLink => Some(b'K'),
        _ => None,
    }
}

fn parse_failure(error: ParseError, position: u64) -> Error {
    let kind = match error {
        ParseError::PathTooLong { .. }
        | ParseError::MetadataTooLarge { .. }
        | ParseError::TooManySparseEntries { .. } => ErrorKind::InvalidInput,
        _ => ErrorKind::Corrupt,
    };
    Error::with_source(kind, format!("bad tar header near byte {position}"), error)
}

fn content(stored: u64, path: &[u8]) -> Result<Content> {
    let padded = stored
        .checked_next_multiple_of(512)
        .ok_or_else(|| corrupt(path, format!("impossible size {stored}")))?;
    Ok(Content {
        unread: stored,
        padding: padded - stored,
    })
}

/// The name of a member. An empty one in a PAX record takes that record back.
fn name_of<'a>(entry: &'a ParsedEntry<'_>) -> Result<Cow<'a, [u8]>> {
    if !entry.path.is_empty() {
        return Ok(Cow::Borrowed(&entry.path));
    }
    let name = entry.header.path_bytes();
    let prefix = entry.header.prefix().filter(|prefix| !prefix.is_empty());
    match prefix {
        Some(prefix) => Ok(Cow::Owned(join(prefix, name))),
        None if name.is_empty() => Err(Error::new(
            ErrorKind::Corrupt,
            "the archive has a member without a name",
        )),
        None => Ok(Cow::Borrowed(name)),
    }
}

fn plain_member(entry: &ParsedEntry<'_>, offset: u64) -> Result<(Member, Content)> {
    let name: &[u8] = &name_of(entry)?;
    let records = Records::read(entry, name)?;
    let device = || -> (u32, u32) {
        // As GNU tar reads a header of the old format, which has no such fields.
        (entry.dev_major.unwrap_or(0), entry.dev_minor.unwrap_or(0))
    };
    let target = match &entry.link_target {
        // An empty PAX record takes itself back.
        Some(empty) if empty.is_empty() => Some(entry.header.link_name_bytes()),
        target => target.as_deref(),
    };
    let link = |what: &str| -> Result<Vec<u8>> {
        match target.filter(|target| !target.is_empty()) {
            Some(target) if target.len() > MAX_PATH => {
                Err(refuse(name, format!("its {what} is too long")))
            }
            Some(target) if target.contains(&0) => {
                Err(refuse(name, format!("its {what} has a zero byte in it")))
            }
            Some(target) => Ok(target.to_vec()),
            None => Err(corrupt(name, format!("it has no {what}"))),
        }
    };
    let kind = match entry.entry_type {
        // Before ustar, a trailing slash was all that told a directory from a file.
        EntryType::Regular | EntryType::Continuous if name.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous => Kind::File {
            size: entry.size,
            extents: None,
        },
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink(link("link target")?),
        EntryType::Link => {
            let target = link("link target")?;
            let target = normalise(&target)
                .map_err(|why| refuse(name, format!("its link target is refused: {why}")))?;
            Kind::HardLink(target)
        }
        EntryType::Char => {
            let (major, minor) = device();
            Kind::CharDevice { major, minor }
        }
        EntryType::Block => {
            let (major, minor) = device();
            Kind::BlockDevice { major, minor }
        }
        EntryType::Fifo => Kind::Fifo,
        EntryType::Other(b'V') => Kind::Fifo,
        other => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "archive member {} is of type {:?}, which this program does not unpack",
                    shown(name),
                    char::from(other.to_byte())
                ),
            ));
        }
    };
    // Only files have content; what other headers say about a size is noise, as in Go's tar.
    let stored = match kind {
        Kind::File { .. } => entry.size,
        _ => 0,
    };
    let content = content(stored, name)?;
    let node = node(entry, name, kind, records)?;
    Ok((Member { node, offset }, content))
}

fn sparse_member(
    entry: &ParsedEntry<'_>,
    map: &[SparseEntry],
    real_size: u64,
    offset: u64,
) -> Result<(Member, Content)> {
    let name: &[u8] = &name_of(entry)?;
    let records = Records::read(entry, name)?;
    let mut extents = Vec::with_capacity(map.len());
    let mut reached = 0;
    let mut stored: u64 = 0;
    for run in map {
        let extent = Extent {
            offset: run.offset,
            length: run.length,
        };
        let end = extent.end().filter(|end| *end <= real_size);
        let (Some(end), true) = (end, extent.offset >= reached) else {
            return Err(corrupt(
                name,
                "its sparse map is out of order or reaches beyond the end of the file",
            ));
        };
        reached = end;
        // In order and within the file, so their sum is too.
        stored += extent.length;
        if extent.length > 0 {
            extents.push(extent);
        }
    }
    // With a PAX size record the parser's size still includes the map in front of the data.
    if entry.size != stored && !records.size {
        return Err(corrupt(
            name,
            format!(
                "its sparse map lists {stored} bytes, its header {}",
                entry.size
            ),
        ));
    }
    let content = content(stored, name)?;
    let kind = Kind::File {
        size: real_size,
        extents: Some(extents),
    };
    let node = node(entry, name, kind, records)?;
    Ok((Member { node, offset }, content))
}

fn node(entry: &ParsedEntry<'_>, name: &[u8], kind: Kind, records: Records) -> Result<Node> {
    let path = normalise(name).map_err(|why| refuse(name, format!("name refused: {why}")))?;
    let id = |record: Option<i64>, header: u64, what: &str| -> Result<u32> {
        let id = record.unwrap_or_else(|| signed(header));
        owner(id).ok_or_else(|| refuse(name, format!("its {what} {id} is beyond Linux's 32 bits")))
    };
    Ok(Node {
        path,
        kind,
        mode: entry.mode & PERMISSIONS,
        uid: id(records.uid, entry.uid, "owner")?,
        gid: id(records.gid, entry.gid, "group")?,
        mtime: records.mtime.unwrap_or(Time {
            // A time before 1970 is a negative base-256 number.
            seconds: entry.mtime.cast_signed(),
            nanoseconds: 0,
        }),
        atime: records.atime,
        xattrs: records.xattrs,
    })
}

/// The number in an 8-byte field of a header: the parser leaves the sign of a negative base-256
/// number in bit 62.
fn signed(field: u64) -> i64 {
    match field >> 62 {
        1 => (field | 1 << 63).cast_signed(),
        _ => field.cast_signed(),
    }
}

/// A number as the kernel takes an owner, and as umoci and containerd hand it over: negative ones
/// wrap around, and −1, which stands for no change in chown(2), leaves root.
fn owner(id: i64) -> Option<u32> {
    match id {
        -1 => Some(0),
        0.. => u32::try_from(id).ok().filter(|id| *id != u32::MAX),
        _ => i32::try_from(id).ok().map(i32::cast_unsigned),
    }
}

impl Members<super::slice::Slice> {
    /// Passes over the current member's content without reading it.
    pub fn seek_past_content(&mut self) {
        let left = self.content.left();
        let buffered = self.end - self.start;
        let step = left.min(buffered as u64);
        self.consume(step as usize);
        self.position += self.input.skip(left - step);
        self.content = Content::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_stream_and_a_bare_end_marker_hold_no_member() {
        let mut members = Members::new(&[][..]);
        assert!(members.next().unwrap().is_none());
        assert!(!members.end_marker());
        for size in [512, 1024, 10240] {
            let zeros = vec![0; size];
            let mut members = Members::new(&zeros[..]);
            assert!(members.next().unwrap().is_none());
            assert!(members.end_marker());
            assert!(members.next().unwrap().is_none());
        }
    }

    #[test]
    fn bytes_that_are_no_tar_are_an_error_that_says_where() {
        let noise = [b'x'; 2048];
        let error = Members::new(&noise[..]).next().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("byte 0"), "{error}");
        let error = Members::new(&noise[..100]).next().unwrap_err();
        assert!(error.to_string().contains("cut off"), "{error}");
    }
}
