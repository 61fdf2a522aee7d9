//! What a device may hold after a power cut: for each sector, every value that it was given since
//! the last flush that was acknowledged.

use std::sync::Arc;

pub const SECTOR: usize = 512;

type Sector = [u8; SECTOR];

#[derive(Clone)]
pub struct Model {
    /// What a client reads.
    now: Vec<Arc<Sector>>,
    /// What a cut may leave; always contains `now`.
    may: Vec<Vec<Arc<Sector>>>,
}

impl Model {
    pub fn new(size: u64) -> Self {
        let zero: Arc<Sector> = Arc::new([0; SECTOR]);
        let sectors = size as usize / SECTOR;
        Model {
            now: vec![zero.clone(); sectors],
            may: vec![vec![zero]; sectors],
        }
    }

    /// The sectors that a change of bytes touches, with their new content.
    fn merged(&self, offset: u64, bytes: &[u8]) -> Vec<(usize, Arc<Sector>)> {
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        (start / SECTOR..end.div_ceil(SECTOR))
            .map(|sector| {
                let base = sector * SECTOR;
                let mut content = *self.now[sector];
                let (from, to) = (start.max(base), end.min(base + SECTOR));
                content[from - base..to - base].copy_from_slice(&bytes[from - start..to - start]);
                (sector, Arc::new(content))
            })
            .collect()
    }

    /// A write begins: from now on a cut may leave it.
    pub fn begin(&mut self, offset: u64, bytes: &[u8]) {
        for (sector, content) in self.merged(offset, bytes) {
            self.may[sector].push(content);
        }
    }

    /// The write is complete: a client reads it.
    pub fn complete(&mut self, offset: u64, bytes: &[u8]) {
        for (sector, content) in self.merged(offset, bytes) {
            self.now[sector] = content;
        }
    }

    /// Durable from now on: what a client reads of a range.
    pub fn acknowledge(&mut self, offset: u64, len: u64) {
        let sectors = offset as usize / SECTOR..(offset + len).div_ceil(SECTOR as u64) as usize;
        for sector in sectors {
            self.may[sector] = vec![self.now[sector].clone()];
        }
    }

    pub fn acknowledge_all(&mut self) {
        self.acknowledge(0, (self.now.len() * SECTOR) as u64);
    }

    /// What a client reads.
    pub fn content(&self) -> Vec<u8> {
        self.now.iter().flat_map(|sector| **sector).collect()
    }

    /// A client that comes back reads this. It stays as uncertain as it was.
    pub fn adopt(&mut self, content: &[u8]) {
        for (sector, bytes) in content.chunks_exact(SECTOR).enumerate() {
            if *bytes != *self.now[sector] {
                self.now[sector] = Arc::new(bytes.try_into().unwrap());
            }
        }
    }

    /// Whether a cut may leave this.
    pub fn check(&self, content: &[u8]) -> Result<(), String> {
        for (sector, bytes) in content.chunks_exact(SECTOR).enumerate() {
            if !self.may[sector].iter().any(|may| **may == *bytes) {
                return Err(format!(
                    "sector {} of block {}: found {}, but it may hold only {}",
                    sector % 8,
                    sector / 8,
                    describe(bytes),
                    self.may[sector]
                        .iter()
                        .map(|may| describe(&may[..]))
                        .collect::<Vec<_>>()
                        .join(" or "),
                ));
            }
        }
        Ok(())
    }
}

/// Names a sector's content by the operations that wrote it.
fn describe(bytes: &[u8]) -> String {
    let mut tags: Vec<u16> = bytes
        .chunks_exact(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
        .collect();
    tags.dedup();
    format!("{tags:?}")
}

/// The bytes that write number `tag` writes.
pub fn pattern(tag: u16, offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len)
        .map(|at| tag.to_le_bytes()[at as usize % 2])
        .collect()
}
