//! The file `have`: which windows of a lazy layer are here. format.md, section 8.

use std::path::Path;

use super::super::codec::{Reader, Writer, check_crc, count};
use super::super::header::Header;
use super::super::table::DIGEST_LEN;
use vellum_base::block::{Block, BlockState, Blocks, Run, WindowPower, in_memory};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{Storage, StorageFile};

/// The file's name.
pub(in crate::layer) const HAVE_FILE: &str = "have";

const MAGIC: &[u8; 8] = b"VELLUMHV";
/// Without a file of checksums.
const UNCHECKED: u32 = 1;
const VERSION: u32 = 2;
/// Of the header, and of a page.
const PAGE: usize = 4096;
/// Bytes of a page that are bits.
const BITS_LEN: usize = 4088;
const BITS: u64 = BITS_LEN as u64 * 8;

/// The header of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HaveHeader {
    /// The size of windows.
    pub power: WindowPower,
    /// What the layer's digest is when it is whole.
    pub digest: [u8; DIGEST_LEN],
    /// The layer has a file of checksums: one of version 1 has none.
    pub checked: bool,
}

impl HaveHeader {
    /// As it lies on disk.
    pub fn encode(&self, header: &Header) -> Vec<u8> {
        let mut out = Writer::with_capacity(PAGE);
        out.bytes(MAGIC);
        out.u32(match self.checked {
            true => VERSION,
            false => UNCHECKED,
        });
        out.u32(self.power.get());
        out.bytes(header.uuid.as_bytes());
        out.u64(header.virtual_size);
        out.bytes(&self.digest);
        out.pad_to(PAGE - 4);
        out.crc();
        out.into_bytes()
    }

    fn decode(bytes: &[u8], header: &Header) -> Result<Self> {
        let corrupt = |what: String| Err(Error::new(ErrorKind::Corrupt, what));
        let Some(front) = bytes.get(..PAGE) else {
            return corrupt("it ends in its header".into());
        };
        let mut input = Reader::new(front);
        if input.take(8)? != MAGIC {
            let text = "not the windows of a lazy layer (wrong magic)";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let version = input.u32()?;
        if !(UNCHECKED..=VERSION).contains(&version) {
            let text = format!(
                "version {version}; this build reads versions {UNCHECKED} to {VERSION}: use a newer vellum"
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        check_crc(front, "header")?;
        let power = input.u32()?;
        let (uuid, virtual_size) = (input.uuid()?, input.u64()?);
        if uuid != header.uuid || virtual_size != header.virtual_size {
            return corrupt(format!(
                "it is of the layer {uuid} of {virtual_size} bytes, not of {} of {}",
                header.uuid, header.virtual_size
            ));
        }
        let Some(power) = WindowPower::new(power) else {
            return corrupt(format!("windows of two to the power of {power} bytes"));
        };
        Ok(HaveHeader {
            power,
            digest: input.array()?,
            checked: version != UNCHECKED,
        })
    }
}

/// How many windows so many blocks have.
fn windows_in(blocks: Blocks, power: WindowPower) -> u64 {
    blocks.get().div_ceil(power.blocks().get())
}

/// A set of windows of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WindowSet(Vec<u64>);

impl WindowSet {
    /// The empty set, of a layer of so many blocks.
    pub fn none(blocks: Blocks, power: WindowPower) -> Self {
        WindowSet(vec![0; in_memory(windows_in(blocks, power).div_ceil(64))])
    }

    /// Those that have data blocks.
    pub fn with_data(
        blocks: Blocks,
        power: WindowPower,
        runs: impl Iterator<Item = Run<BlockState>>,
    ) -> Self {
        let mut set = WindowSet::none(blocks, power);
        for run in runs.filter(|run| run.value == BlockState::Data && !run.is_empty()) {
            let last = Block::new(run.end().get() - 1);
            (power.window_of(run.start())..=power.window_of(last)).for_each(|one| set.insert(one));
        }
        set
    }

    /// The words of 64 windows each, from the lowest bit on.
    pub fn words(&self) -> &[u64] {
        &self.0
    }

    /// Whether a window is in it. One that the layer does not have is not.
    pub fn has(&self, window: u32) -> bool {
        let word = self.0.get(window as usize / 64);
        word.is_some_and(|word| word >> (window % 64) & 1 == 1)
    }

    /// Adds a window that the layer has.
    pub fn insert(&mut self, window: u32) {
        let word = self.0.get_mut(window as usize / 64);
        assert!(word.is_some(), "a window beyond the end of the layer");
        if let Some(word) = word {
            *word |= 1 << (window % 64);
        }
    }

    /// Takes a window out.
    pub fn remove(&mut self, window: u32) {
        if let Some(word) = self.0.get_mut(window as usize / 64) {
            *word &= !(1 << (window % 64));
        }
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Takes what the pages of the file say that can be read.
    fn take_pages(&mut self, bytes: &[u8]) -> Result<()> {
        let pages = bytes.chunks_exact(PAGE).skip(1).enumerate();
        for (number, page) in pages.filter(|(number, page)| fits(page, *number)) {
            let from = number * in_memory(BITS / 64);
            let mut input = Reader::new(page);
            let words = self.0.iter_mut().skip(from).take(in_memory(BITS / 64));
            for word in words {
                *word = input.u64()?;
            }
        }
        Ok(())
    }

    /// Those that are not in `other`, in order.
    pub fn without(&self, other: &WindowSet) -> Vec<u32> {
        let words = self.0.iter().zip(&other.0).enumerate();
        let mut out = Vec::new();
        for (index, (mine, theirs)) in words {
            let mut left = mine & !theirs;
            while left != 0 {
                out.push(count(index) * 64 + left.trailing_zeros());
                left &= left - 1;
            }
        }
        out
    }
}

/// How many pages a set has.
pub(super) fn pages_of(set: &WindowSet) -> u64 {
    (set.words().len() as u64 * 64).div_ceil(BITS)
}

/// The page that a window's bit is in.
pub(super) fn page_of(window: u32) -> u64 {
    u64::from(window) / BITS
}

/// Where a page lies in the file.
pub(super) fn page_offset(page: u64) -> u64 {
    (page + 1) * PAGE as u64
}

/// A page of a set, as it lies on disk.
pub(super) fn encode_page(set: &WindowSet, page: u64) -> Vec<u8> {
    // Pages hold whole words.
    let words = in_memory(BITS / 64);
    let from = in_memory(page) * words;
    let mut out = Writer::with_capacity(PAGE);
    let here = set.words().iter().skip(from).take(words);
    here.for_each(|word| out.u64(*word));
    out.pad_to(BITS_LEN);
    out.u32(count(in_memory(page)));
    out.crc();
    out.into_bytes()
}

/// Writes all pages of a set into the file that is open, durably.
///
/// # Errors
/// Where the host refuses.
pub(super) fn write_pages(file: &dyn StorageFile, set: &WindowSet) -> std::io::Result<()> {
    for page in 0..pages_of(set) {
        file.write_at(&encode_page(set, page), page_offset(page))?;
    }
    file.sync_data()
}

/// Reads the file: its header, and the windows that are here. What of the pages is not there or does not fit says
/// nothing.
///
/// # Errors
/// [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`] for the header; the message names the file.
pub(super) fn read(
    storage: &dyn Storage,
    dir: &Path,
    header: &Header,
) -> Result<(HaveHeader, WindowSet)> {
    let path = dir.join(HAVE_FILE);
    let named = || format!("cannot read {}", path.display());
    let pages = windows_in(header.blocks(), WindowPower::LEAST).div_ceil(BITS);
    let bytes = storage.read_all(&path, page_offset(pages)).context(named)?;
    let have = HaveHeader::decode(&bytes, header).context(named)?;
    let mut set = WindowSet::none(header.blocks(), have.power);
    set.take_pages(&bytes)?;
    Ok((have, set))
}

/// Reads the windows that are here once more, of a file that is open: its bytes are put into `set` anew.
///
/// # Errors
/// Where the host refuses.
pub(super) fn read_again(file: &dyn StorageFile, set: &mut WindowSet) -> Result<()> {
    let len = file.len().context(|| HAVE_FILE)?;
    let most = page_offset(pages_of(set));
    let mut bytes = vec![0; in_memory(len.min(most))];
    file.read_at(&mut bytes, 0).context(|| HAVE_FILE)?;
    set.0.fill(0);
    set.take_pages(&bytes)
}

fn fits(page: &[u8], number: usize) -> bool {
    let own = page.get(BITS_LEN..BITS_LEN + 4);
    own == Some(count(number).to_le_bytes().as_slice()) && check_crc(page, "page").is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use vellum_base::storage::{FileStorage, OpenMode};

    fn layer(size: u64) -> (Header, HaveHeader) {
        let header = Header::new(None, size).unwrap();
        let have = HaveHeader {
            power: WindowPower::LEAST,
            digest: [7; 32],
            checked: true,
        };
        (header, have)
    }

    fn write(dir: &Path, header: &Header, have: &HaveHeader, set: &WindowSet) -> PathBuf {
        let path = dir.join(HAVE_FILE);
        let file = FileStorage.open(&path, OpenMode::Create).unwrap();
        file.write_at(&have.encode(header), 0).unwrap();
        for page in 0..pages_of(set) {
            file.write_at(&encode_page(set, page), page_offset(page))
                .unwrap();
        }
        path
    }

    /// docs/format.md, section 8: these places never change.
    #[test]
    fn the_bytes_are_those_of_the_format_page() {
        let (mut header, have) = layer(1 << 30);
        header.uuid = uuid::Uuid::from_bytes([5; 16]);
        let bytes = have.encode(&header);
        assert_eq!(bytes.len(), 4096);
        assert_eq!(&bytes[..8], b"VELLUMHV");
        assert_eq!(bytes[8..16], [2, 0, 0, 0, 16, 0, 0, 0]);
        assert_eq!(bytes[16..32], [5; 16]);
        assert_eq!(bytes[32..40], (1_u64 << 30).to_le_bytes());
        assert_eq!(bytes[40..72], [7; 32]);
        assert!(bytes[72..4092].iter().all(|byte| *byte == 0));
        assert_eq!(bytes[4092..], crc32fast::hash(&bytes[..4092]).to_le_bytes());
        let mut set = WindowSet::none(Blocks::whole_in(5 << 30), have.power);
        set.insert(32704 + 9);
        let page = encode_page(&set, 1);
        assert_eq!(page.len(), 4096);
        assert_eq!(page[..4], [0, 2, 0, 0]);
        assert_eq!(page[4088..4092], [1, 0, 0, 0]);
        assert_eq!(page[4092..], crc32fast::hash(&page[..4092]).to_le_bytes());
    }

    #[test]
    fn a_file_of_version_1_is_of_a_layer_without_checksums() {
        let (header, mut have) = layer(1 << 30);
        have.checked = false;
        let bytes = have.encode(&header);
        assert_eq!(bytes[8..12], [1, 0, 0, 0]);
        assert_eq!(HaveHeader::decode(&bytes, &header).unwrap(), have);
    }

    #[test]
    fn windows_are_read_as_they_were_written_over_several_pages() {
        let dir = tempfile::tempdir().unwrap();
        let (header, have) = layer(5 << 30);
        let mut set = WindowSet::none(header.blocks(), have.power);
        for window in [0, 1, 63, 64, 32703, 32704, 70000, 81919] {
            set.insert(window);
        }
        write(dir.path(), &header, &have, &set);
        assert_eq!(
            read(&FileStorage, dir.path(), &header).unwrap(),
            (have, set)
        );
    }

    #[test]
    fn a_page_that_is_torn_or_missing_says_that_nothing_of_it_is_here() {
        let dir = tempfile::tempdir().unwrap();
        let (header, have) = layer(5 << 30);
        let mut set = WindowSet::none(header.blocks(), have.power);
        (0..81920).for_each(|window| set.insert(window));
        let path = write(dir.path(), &header, &have, &set);
        let file = FileStorage.open(&path, OpenMode::Write).unwrap();
        file.write_at(&[0], page_offset(1) + 5).unwrap();
        file.set_len(page_offset(2)).unwrap();
        let (_, found) = read(&FileStorage, dir.path(), &header).unwrap();
        let here: Vec<u32> = (0..81920).filter(|window| found.has(*window)).collect();
        assert_eq!(here, (0..32704).collect::<Vec<_>>());
    }

    /// Where a page was written in another's place.
    #[test]
    fn a_page_with_another_number_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (header, have) = layer(5 << 30);
        let mut set = WindowSet::none(header.blocks(), have.power);
        set.insert(3);
        let path = write(dir.path(), &header, &have, &set);
        let file = FileStorage.open(&path, OpenMode::Write).unwrap();
        file.write_at(&encode_page(&set, 0), page_offset(1))
            .unwrap();
        let (_, found) = read(&FileStorage, dir.path(), &header).unwrap();
        assert_eq!(found, set);
    }

    #[test]
    fn a_header_of_another_layer_version_or_kind_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let (header, have) = layer(1 << 30);
        let set = WindowSet::none(header.blocks(), have.power);
        let path = write(dir.path(), &header, &have, &set);
        let (other, _) = layer(1 << 30);
        let error = read(&FileStorage, dir.path(), &other).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        for (at, kind) in [
            (0, ErrorKind::Unsupported),
            (8, ErrorKind::Unsupported),
            (50, ErrorKind::Corrupt),
        ] {
            let path = write(dir.path(), &header, &have, &set);
            let file = FileStorage.open(&path, OpenMode::Write).unwrap();
            file.write_at(&[0xff], at).unwrap();
            let error = read(&FileStorage, dir.path(), &header).unwrap_err();
            assert_eq!(error.kind(), kind, "{at}: {error}");
        }
        let file = FileStorage.open(&path, OpenMode::Write).unwrap();
        file.set_len(100).unwrap();
        assert!(read(&FileStorage, dir.path(), &header).is_err());
    }
}
