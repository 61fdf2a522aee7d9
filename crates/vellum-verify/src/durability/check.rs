//! The checking half: what was acknowledged must be there.

use serde::Serialize;
use uuid::Uuid;

use super::block::{self, SECTOR, Sector};
use super::log::{Acknowledged, Log};
use super::target::{AlignedBuf, Target};
use vellum_base::error::Result;

/// Bytes read at a time: whole blocks of every size.
const CHUNK: u64 = 1 << 20;
/// So many losses are described one by one.
const MAX_LOSSES: usize = 20;

/// What became of a block of which a version was acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// Nothing that this tool wrote is there.
    Missing,
    /// An older version is there.
    Stale,
    /// Some sectors are there, others are missing or older.
    Torn,
    /// A block of another place or an earlier run is there.
    Foreign,
    /// A sector contradicts its own checksum.
    Damaged,
    /// It cannot be read.
    Unreadable,
}

/// A block that is not as it was acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// Number of the block.
    pub block: u64,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// What became of it.
    pub kind: LossKind,
    /// The version that was acknowledged, by its sequence number; `None` for a block of which none
    /// was, but which holds what was written elsewhere.
    pub acknowledged: Option<u64>,
    /// What is there, for people.
    pub found: String,
}

/// What a check found.
#[derive(Debug, Clone, Serialize)]
pub struct CheckReport {
    /// The run that was looked for.
    pub run: Uuid,
    /// Writes of blocks that the log says were acknowledged.
    pub acknowledged_writes: u64,
    /// Blocks that they went to.
    pub acknowledged_blocks: u64,
    /// Of these, blocks that hold the version that was acknowledged last.
    pub intact: u64,
    /// Of these, blocks that hold newer sectors, whole or in part: a write was under way.
    pub newer: u64,
    /// Blocks that hold a version of which no acknowledgement is in the log.
    pub unacknowledged: u64,
    /// Blocks lost, all kinds.
    pub lost: u64,
    /// Of these: nothing is there.
    pub missing: u64,
    /// Of these: an older version is there.
    pub stale: u64,
    /// Of these: torn.
    pub torn: u64,
    /// Of these: holds what belongs elsewhere, or to an earlier run.
    pub foreign: u64,
    /// Of these: contradicts its checksum.
    pub damaged: u64,
    /// Of these: cannot be read.
    pub unreadable: u64,
    /// The first of them.
    pub losses: Vec<Loss>,
    /// The run ended by itself: nothing was killed while it wrote.
    pub ended: bool,
    /// Lines of the log that cannot be read; what they acknowledged was not looked for.
    pub damaged_log_lines: u64,
    /// The target could be read through the page cache only, which may hide what is not on the
    /// disk.
    pub cached: bool,
    /// The target is a directory without the file that was written: either what was tested is not
    /// mounted there, or all of it is lost.
    pub absent: bool,
}

impl CheckReport {
    /// True when all that was acknowledged is there.
    pub fn is_lossless(&self) -> bool {
        self.lost == 0
    }

    fn add(&mut self, loss: Loss) {
        self.lost += 1;
        let count = match loss.kind {
            LossKind::Missing => &mut self.missing,
            LossKind::Stale => &mut self.stale,
            LossKind::Torn => &mut self.torn,
            LossKind::Foreign => &mut self.foreign,
            LossKind::Damaged => &mut self.damaged,
            LossKind::Unreadable => &mut self.unreadable,
        };
        *count += 1;
        if self.losses.len() < MAX_LOSSES {
            self.losses.push(loss);
        }
    }
}

/// Compares `target` with what `log` says was acknowledged. Writes nothing.
///
/// # Errors
/// Where the log or the target cannot be opened. Losses are in the answer.
pub fn check(target: &Target, log: &Log) -> Result<CheckReport> {
    let expected = Acknowledged::read(log)?;
    let mut reader = target.open_for_check()?;
    let mut report = CheckReport {
        run: expected.run,
        acknowledged_writes: expected.writes,
        acknowledged_blocks: expected.versions.len() as u64,
        intact: 0,
        newer: 0,
        unacknowledged: 0,
        lost: 0,
        missing: 0,
        stale: 0,
        torn: 0,
        foreign: 0,
        damaged: 0,
        unreadable: 0,
        losses: Vec::new(),
        ended: expected.ended,
        damaged_log_lines: expected.damaged_lines,
        cached: reader.is_cached(),
        absent: reader.is_absent(),
    };
    let block_len = expected.region.block as usize;
    let len = expected.region.blocks * expected.region.block;
    let mut buf = AlignedBuf::new(CHUNK as usize);
    for offset in (0..len).step_by(CHUNK as usize) {
        let chunk = buf.get((len - offset).min(CHUNK) as usize);
        let whole = reader.read(chunk, offset).is_ok();
        for (index, bytes) in chunk.chunks_mut(block_len).enumerate() {
            let block = offset / expected.region.block + index as u64;
            let acknowledged = expected.versions.get(&block).copied();
            let at = block * expected.region.block;
            let loss = |kind, found| Loss {
                block,
                offset: at,
                kind,
                acknowledged,
                found,
            };
            // Which of its blocks cannot be read?
            if !whole && let Err(error) = read_block(&mut reader, bytes, at) {
                if acknowledged.is_some() {
                    report.add(loss(LossKind::Unreadable, error.to_string()));
                }
                continue;
            }
            match judge(bytes, expected.run, block, acknowledged) {
                Judgement::Intact => report.intact += 1,
                Judgement::Newer => report.newer += 1,
                Judgement::Unacknowledged => report.unacknowledged += 1,
                Judgement::Untouched => {}
                Judgement::Lost(kind, found) => report.add(loss(kind, found)),
            }
        }
    }
    Ok(report)
}

/// Reads one block, whatever its size, past the page cache.
#[expect(
    clippy::indexing_slicing,
    reason = "`len` was rounded up from the end of the block"
)]
fn read_block(reader: &mut super::target::Reader, bytes: &mut [u8], offset: u64) -> Result<()> {
    let start = offset / 4096 * 4096;
    let within = (offset - start) as usize;
    let len = (within + bytes.len()).next_multiple_of(4096);
    let mut buf = AlignedBuf::new(len);
    let around = buf.get(len);
    reader.read(around, start)?;
    bytes.copy_from_slice(&around[within..within + bytes.len()]);
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
enum Judgement {
    Intact,
    Newer,
    Unacknowledged,
    Untouched,
    Lost(LossKind, String),
}

/// What the sectors of a block come to.
#[derive(Default)]
struct Tally {
    damaged: usize,
    foreign: Option<block::Stamp>,
    other: usize,
    zero: usize,
    oldest: Option<u64>,
    newest: Option<u64>,
}

fn judge(bytes: &[u8], run: Uuid, number: u64, acknowledged: Option<u64>) -> Judgement {
    let mut tally = Tally::default();
    for (index, sector) in bytes.chunks(SECTOR).enumerate() {
        match block::decode(sector, run, number, index) {
            Sector::Version(sequence) => {
                tally.oldest = Some(tally.oldest.map_or(sequence, |old| old.min(sequence)));
                tally.newest = tally.newest.max(Some(sequence));
            }
            Sector::Foreign(stamp) => tally.foreign = Some(stamp),
            Sector::Damaged => tally.damaged += 1,
            Sector::Other { zero } => {
                tally.other += 1;
                tally.zero += usize::from(zero);
            }
        }
    }
    let Some(acknowledged) = acknowledged else {
        return judge_unacknowledged(&tally, run);
    };
    if tally.damaged > 0 {
        let found = format!("{} sectors contradict their checksums", tally.damaged);
        return Judgement::Lost(LossKind::Damaged, found);
    }
    if let Some(stamp) = tally.foreign {
        return Judgement::Lost(LossKind::Foreign, describe(stamp, run));
    }
    let (Some(oldest), Some(newest)) = (tally.oldest, tally.newest) else {
        let found = if tally.zero == tally.other {
            "zeros"
        } else {
            "something else"
        };
        return Judgement::Lost(LossKind::Missing, found.into());
    };
    if tally.other > 0 {
        let found = format!("{} sectors were never written", tally.other);
        return Judgement::Lost(LossKind::Torn, found);
    }
    match (oldest < acknowledged, newest) {
        (true, newest) if newest < acknowledged && oldest == newest => {
            Judgement::Lost(LossKind::Stale, format!("version {newest}"))
        }
        (true, _) => Judgement::Lost(LossKind::Torn, format!("versions {oldest} to {newest}")),
        (false, newest) if newest > acknowledged => Judgement::Newer,
        _ => Judgement::Intact,
    }
}

/// Nothing was promised of the block, but what belongs elsewhere must not be there.
fn judge_unacknowledged(tally: &Tally, run: Uuid) -> Judgement {
    match tally.foreign {
        Some(stamp) if stamp.run == run => Judgement::Lost(LossKind::Foreign, describe(stamp, run)),
        _ if tally.newest.is_some() || tally.damaged > 0 => Judgement::Unacknowledged,
        _ => Judgement::Untouched,
    }
}

fn describe(stamp: block::Stamp, run: Uuid) -> String {
    if stamp.run == run {
        format!("version {} of block {}", stamp.sequence, stamp.block)
    } else {
        format!("block {} of another run, {}", stamp.block, stamp.run)
    }
}

#[cfg(test)]
mod tests {
    use super::super::block::{Stamp, encode};
    use super::*;

    const RUN: Uuid = Uuid::from_u128(3);

    fn version(run: Uuid, block: u64, sequence: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let stamp = Stamp {
            run,
            block,
            sequence,
        };
        encode(&mut bytes, stamp, 4096);
        bytes
    }

    fn mixed(first: &[u8], second: &[u8]) -> Vec<u8> {
        [&first[..1024], &second[1024..]].concat()
    }

    fn loss(bytes: &[u8]) -> LossKind {
        match judge(bytes, RUN, 7, Some(20)) {
            Judgement::Lost(kind, _) => kind,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_acknowledged_version_or_newer_sectors_are_no_loss() {
        let (now, newer) = (version(RUN, 7, 20), version(RUN, 7, 21));
        let judge = |bytes: &[u8]| judge(bytes, RUN, 7, Some(20));
        assert_eq!(judge(&now), Judgement::Intact);
        assert_eq!(judge(&newer), Judgement::Newer);
        assert_eq!(judge(&mixed(&now, &newer)), Judgement::Newer);
    }

    #[test]
    fn whatever_else_an_acknowledged_block_holds_is_a_loss_by_its_name() {
        let (now, old) = (version(RUN, 7, 20), version(RUN, 7, 4));
        let nothing = [0; 4096];
        assert_eq!(loss(&nothing), LossKind::Missing);
        assert_eq!(loss(&[9; 4096]), LossKind::Missing);
        assert_eq!(loss(&old), LossKind::Stale);
        assert_eq!(loss(&mixed(&now, &old)), LossKind::Torn);
        assert_eq!(loss(&mixed(&old, &version(RUN, 7, 30))), LossKind::Torn);
        assert_eq!(loss(&mixed(&now, &nothing)), LossKind::Torn);
        assert_eq!(loss(&version(RUN, 8, 20)), LossKind::Foreign);
        assert_eq!(loss(&version(Uuid::nil(), 7, 20)), LossKind::Foreign);
        let mut damaged = now;
        damaged[3000] ^= 1;
        assert_eq!(loss(&damaged), LossKind::Damaged);
    }

    #[test]
    fn of_an_unacknowledged_block_only_what_belongs_elsewhere_is_wrong() {
        let judge = |bytes: &[u8]| judge(bytes, RUN, 7, None);
        assert_eq!(judge(&[0; 4096]), Judgement::Untouched);
        assert_eq!(judge(&version(Uuid::nil(), 7, 1)), Judgement::Untouched);
        assert_eq!(judge(&version(RUN, 7, 1)), Judgement::Unacknowledged);
        let foreign = judge(&version(RUN, 8, 1));
        assert!(matches!(foreign, Judgement::Lost(LossKind::Foreign, _)));
    }
}
