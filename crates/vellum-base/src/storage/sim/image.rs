//! The bytes of one simulated file, and what was done to them that is not durable yet.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use bitvec::vec::BitVec;

use super::Survival;
use crate::block::{in_memory, part, part_mut};
use crate::storage::rng::SeededRng;

/// What a disk writes whole or not at all.
const SECTOR: u64 = 512;
const SECTOR_LEN: usize = 512;
const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;

/// A sparse string of bytes; what lies in no page, or beyond the length, is zero.
#[derive(Debug, Clone, Default)]
pub(super) struct Image {
    pages: BTreeMap<u64, Arc<[u8; PAGE_LEN]>>,
    /// Pages whose space was taken ahead, by first page and number.
    reserved: Vec<(u64, u64)>,
    pub(super) len: u64,
}

/// Bytes within one page.
struct Piece {
    page: u64,
    /// The first of them in the page.
    within: usize,
    /// The first of them in the range that was split.
    start: usize,
    len: usize,
}

/// Splits a range at page borders.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= len {
            return None;
        }
        let at = offset + done;
        let within = at % PAGE;
        let piece = (PAGE - within).min(len - done);
        let item = Piece {
            page: at / PAGE,
            within: in_memory(within),
            start: in_memory(done),
            len: in_memory(piece),
        };
        done += piece;
        Some(item)
    })
}

impl Image {
    /// Fills `buf`; beyond the length it is zeros.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) {
        for at in pieces(offset, buf.len() as u64) {
            let target = part_mut(buf, at.start, at.len);
            match self.pages.get(&at.page) {
                Some(page) => target.copy_from_slice(part(page.as_slice(), at.within, at.len)),
                None => target.fill(0),
            }
        }
    }

    /// Writes, extending the length where it must.
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.len = self.len.max(offset + bytes.len() as u64);
        for at in pieces(offset, bytes.len() as u64) {
            let page = self
                .pages
                .entry(at.page)
                .or_insert_with(|| Arc::new([0; PAGE_LEN]));
            part_mut(Arc::make_mut(page).as_mut_slice(), at.within, at.len)
                .copy_from_slice(part(bytes, at.start, at.len));
        }
    }

    /// Zeros within the length.
    fn zero(&mut self, offset: u64, len: u64) {
        // A length may have been lost that what came before it was within.
        if offset >= self.len {
            return;
        }
        for at in pieces(offset, len.min(self.len - offset)) {
            if at.len == PAGE_LEN {
                self.pages.remove(&at.page);
            } else if let Some(page) = self.pages.get_mut(&at.page) {
                part_mut(Arc::make_mut(page).as_mut_slice(), at.within, at.len).fill(0);
            }
        }
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            let old = self.len;
            self.zero(len, (old - len).min(PAGE));
            let pages = len.div_ceil(PAGE);
            self.pages.split_off(&pages);
            self.reserved.retain(|(first, _)| *first < pages);
            for (first, count) in &mut self.reserved {
                *count = (*count).min(pages - *first);
            }
        }
        self.len = len;
    }

    /// True where a page of the range is in no page of ours.
    pub(super) fn has_hole(&self, offset: u64, len: u64) -> bool {
        pieces(offset, len).any(|at| !self.pages.contains_key(&at.page))
    }

    /// Takes the space of a range, and extends the length where it must.
    fn reserve(&mut self, offset: u64, len: u64) {
        self.len = self.len.max(offset + len);
        let (mut first, mut end) = (offset / PAGE, (offset + len).div_ceil(PAGE));
        // None touches another.
        self.reserved.retain(|&(there, count)| {
            let apart = there + count < first || end < there;
            if !apart {
                first = first.min(there);
                end = end.max(there + count);
            }
            apart
        });
        self.reserved.push((first, end - first));
    }

    /// Gives the space of whole pages back that was taken ahead.
    fn unreserve(&mut self, offset: u64, len: u64) {
        let (first, end) = (offset.div_ceil(PAGE), (offset + len) / PAGE);
        if first >= end {
            return;
        }
        let before = std::mem::take(&mut self.reserved);
        for (there, count) in before {
            let (left, right) = (first.min(there + count), end.max(there));
            if there < left {
                self.reserved.push((there, left - there));
            }
            if right < there + count {
                self.reserved.push((right, there + count - right));
            }
        }
    }

    fn is_reserved(&self, page: u64) -> bool {
        let mut all = self.reserved.iter();
        all.any(|(first, count)| (*first..first + count).contains(&page))
    }

    /// Bytes in pages, and of those that are reserved.
    pub(super) fn allocated(&self) -> u64 {
        let mut pages = self.pages.len() as u64;
        for (first, count) in &self.reserved {
            pages += count - self.pages.range(*first..first + count).count() as u64;
        }
        pages * PAGE
    }

    /// The bytes of the pages that [`Image::allocated`] counts.
    pub(super) fn allocated_pages(&self) -> Vec<Range<u64>> {
        let reserved = self.reserved.iter();
        let reserved = reserved.flat_map(|(first, count)| *first..first + count);
        let pages: BTreeSet<u64> = self.pages.keys().copied().chain(reserved).collect();
        let bytes = |page| page * PAGE..(page + 1) * PAGE;
        pages.into_iter().map(bytes).collect()
    }

    /// Bytes that writing a range would take.
    pub(super) fn wants(&self, offset: u64, len: u64) -> u64 {
        let pages = pieces(offset, len).map(|at| at.page);
        let new = pages.filter(|page| !self.pages.contains_key(page) && !self.is_reserved(*page));
        new.count() as u64 * PAGE
    }
}

/// Something done to a file that may or may not survive.
#[derive(Debug, Clone)]
enum Change {
    /// Whole sectors, as the page cache had them afterwards.
    Write {
        sector: u64,
        bytes: Arc<[u8]>,
        /// Sectors that no later durable write made certain.
        open: BitVec,
        /// The length that the file must have for it.
        end: u64,
    },
    /// Whole sectors that became zero.
    Zero {
        sector: u64,
        open: BitVec,
    },
    SetLen(u64),
}

/// A file as it is read now, as it is certain to be after a power cut, and all that lies between.
#[derive(Debug, Clone, Default)]
pub(super) struct SimContent {
    pub(super) live: Image,
    durable: Image,
    pending: Vec<Change>,
}

impl SimContent {
    /// A file that is on the disk as `image` says.
    fn durable(image: Image) -> Self {
        SimContent {
            live: image.clone(),
            durable: image,
            pending: Vec::new(),
        }
    }

    /// A buffered write.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.live.write(offset, bytes);
        let sector = offset / SECTOR;
        let sectors = (offset + bytes.len() as u64).div_ceil(SECTOR) - sector;
        // What reaches the disk is the page as it is in memory, never part of a sector.
        let mut whole = vec![0; in_memory(sectors * SECTOR)];
        self.live.read(&mut whole, sector * SECTOR);
        self.pending.push(Change::Write {
            sector,
            bytes: whole.into(),
            open: BitVec::repeat(true, in_memory(sectors)),
            end: offset + bytes.len() as u64,
        });
    }

    /// A hole. The ends that are no whole sectors are written as zeros.
    pub(super) fn punch(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.live.len);
        if offset >= end {
            return;
        }
        let (first, last) = (offset.next_multiple_of(SECTOR), end / SECTOR * SECTOR);
        if first >= last {
            self.write(offset, &vec![0; in_memory(end - offset)]);
            return;
        }
        self.write(offset, &vec![0; in_memory(first - offset)]);
        self.live.zero(first, last - first);
        self.live.unreserve(first, last - first);
        self.pending.push(Change::Zero {
            sector: first / SECTOR,
            open: BitVec::repeat(true, in_memory((last - first) / SECTOR)),
        });
        self.write(last, &vec![0; in_memory(end - last)]);
    }

    pub(super) fn set_len(&mut self, len: u64) {
        self.live.set_len(len);
        self.pending.push(Change::SetLen(len));
    }

    /// Takes the space of a range. After a power cut that is forgotten.
    pub(super) fn reserve(&mut self, offset: u64, len: u64) {
        if offset + len > self.live.len {
            self.set_len(offset + len);
        }
        self.live.reserve(offset, len);
    }

    /// Everything is certain now.
    pub(super) fn sync(&mut self) {
        self.pending.clear();
        self.durable = self.live.clone();
    }

    /// What was just written to the range is certain now; other writes are as uncertain as before.
    pub(super) fn sync_range(&mut self, offset: u64, len: u64) {
        if self
            .pending
            .iter()
            .any(|change| matches!(change, Change::SetLen(_)))
        {
            // The length belongs to what a synchronous write makes durable, and older contents
            // cannot be told apart from it here.
            self.sync();
            return;
        }
        let mut bytes = vec![0; in_memory(len)];
        self.live.read(&mut bytes, offset);
        self.durable.write(offset, &bytes);
        let (from, to) = (offset / SECTOR, (offset + len).div_ceil(SECTOR));
        for change in &mut self.pending {
            if let Change::Write { sector, open, .. } | Change::Zero { sector, open } = change {
                // Those of its sectors that are in the range, if any.
                let first = from.max(*sector);
                let last = to.min(*sector + open.len() as u64);
                if first < last {
                    let range = in_memory(first - *sector)..in_memory(last - *sector);
                    open[range].fill(false);
                }
            }
        }
        self.pending.retain(|change| match change {
            Change::Write { open, .. } | Change::Zero { open, .. } => open.any(),
            Change::SetLen(_) => true,
        });
    }

    /// The file after a power cut that found it written back.
    pub(super) fn kept(&self) -> SimContent {
        SimContent::durable(self.live.clone())
    }

    /// The file after a power cut: each sector of each change survived or did not.
    pub(super) fn cut(&self, survival: Survival, rng: &mut SeededRng) -> SimContent {
        let mut image = self.durable.clone();
        for change in &self.pending {
            match change {
                Change::SetLen(len) => {
                    if survival.whole(rng) {
                        image.set_len(*len);
                    }
                }
                Change::Zero { sector, open } => {
                    for at in survivors(open, survival, rng).iter_ones() {
                        image.zero((sector + at as u64) * SECTOR, SECTOR);
                    }
                }
                Change::Write {
                    sector,
                    bytes,
                    open,
                    end,
                } => {
                    if *end > image.len && survival.whole(rng) {
                        image.len = *end;
                    }
                    for at in survivors(open, survival, rng).iter_ones() {
                        let offset = (sector + at as u64) * SECTOR;
                        // Beyond the length that survived there is nothing to see.
                        let room = SECTOR.min(image.len.max(offset) - offset);
                        image.write(offset, part(bytes, at * SECTOR_LEN, in_memory(room)));
                    }
                }
            }
        }
        SimContent::durable(image)
    }
}

/// Which of the sectors that are open survive.
fn survivors(open: &BitVec, survival: Survival, rng: &mut SeededRng) -> BitVec {
    let whole = survival.whole(rng);
    open.iter()
        .map(|open| *open && survival.sector(whole, rng))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(content: &SimContent, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0xff; len];
        content.live.read(&mut buf, offset);
        buf
    }

    fn synced(len: u64, value: u8) -> SimContent {
        let mut content = SimContent::default();
        content.write(0, &vec![value; len as usize]);
        content.sync();
        content
    }

    /// The values that a sector takes over many cuts.
    fn values(content: &SimContent, offset: u64) -> std::collections::BTreeSet<u8> {
        (0..400)
            .map(|seed| {
                let mut rng = SeededRng::new(seed);
                let survival = Survival::pick(&mut rng);
                let sector = bytes(&content.cut(survival, &mut rng), offset, 512);
                assert!(
                    sector.iter().all(|&byte| byte == sector[0]),
                    "a torn sector"
                );
                sector[0]
            })
            .collect()
    }

    #[test]
    fn unsynced_sectors_survive_in_any_subset_and_any_version_and_synced_ones_always() {
        let mut content = synced(8192, 1);
        content.write(0, &[2; 4096]);
        content.write(0, &[3; 512]);
        assert_eq!(values(&content, 0), [1, 2, 3].into());
        assert_eq!(values(&content, 512), [1, 2].into());
        assert_eq!(values(&content, 4096), [1].into());
        content.sync();
        assert_eq!(values(&content, 0), [3].into());
    }

    #[test]
    fn a_durable_write_is_certain_and_older_writes_of_its_sectors_never_come_back() {
        let mut content = synced(8192, 1);
        content.write(0, &[2; 8192]);
        content.write(0, &[3; 4096]);
        content.sync_range(0, 4096);
        assert_eq!(values(&content, 0), [3].into());
        assert_eq!(values(&content, 4096), [1, 2].into());
    }

    #[test]
    fn a_hole_may_or_may_not_survive_and_a_length_too() {
        let mut content = synced(8192, 1);
        content.punch(0, 4096);
        assert_eq!(bytes(&content, 0, 4096), [0; 4096]);
        assert_eq!(values(&content, 0), [0, 1].into());
        content.set_len(4096);
        let lens: std::collections::BTreeSet<u64> = (0..100)
            .map(|seed| {
                let mut rng = SeededRng::new(seed);
                let survival = Survival::pick(&mut rng);
                content.cut(survival, &mut rng).live.len
            })
            .collect();
        assert_eq!(lens, [4096, 8192].into());
    }

    #[test]
    fn cutting_and_extending_leaves_zeros_behind() {
        let mut content = synced(8192, 1);
        content.set_len(100);
        content.set_len(8192);
        assert_eq!(bytes(&content, 0, 100), [1; 100]);
        assert_eq!(bytes(&content, 100, 8092), [0; 8092]);
    }
}
