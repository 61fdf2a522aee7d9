//! Which files a log of changes belongs to, and what may prove that they are still in memory as they
//! were: bytes 128 to 511 of its header. format.md, section 6.

use std::path::Path;

use super::super::codec::{Reader, Writer, check_crc, count};
use super::super::data::{DataFiles, MAX_SEGMENTS};
use super::super::header::HEADER_FILE;
use vellum_base::block::{in_memory, part};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{Evidence, FileId, OpenMode, SharedFile, Storage, StorageFile};

/// Where it is in the log's header.
pub(super) const BOND_AT: u64 = 128;
pub(super) const BOND_LEN: usize = 384;

/// Bits of the flags.
const MARKED: u32 = 1;
const ANY_HEADER: u32 = 2;

/// What ties a log to the files of its layer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Bond {
    /// Of the log itself.
    log: FileId,
    /// Of the layer's header: its inode, and when it was changed last. `None` while it is replaced.
    header: Option<(u64, u64)>,
    data: Vec<FileId>,
    evidence: Evidence,
}

/// Inode of the layer's header, and when that was changed.
fn header_state(storage: &dyn Storage, dir: &Path) -> Result<(u64, u64)> {
    let path = dir.join(HEADER_FILE);
    let look = || {
        let file = storage.open(&path, OpenMode::Read)?;
        Ok((file.id()?.inode, file.changed()?))
    };
    let found: std::io::Result<(u64, u64)> = look();
    found.context(|| format!("cannot look at {}", path.display()))
}

fn put_id(out: &mut Writer, id: FileId) {
    out.u64(id.device);
    out.u64(id.inode);
    out.u64(id.born);
}

fn take_id(input: &mut Reader<'_>) -> Result<FileId> {
    Ok(FileId {
        device: input.u64()?,
        inode: input.u64()?,
        born: input.u64()?,
    })
}

impl Bond {
    /// Of a log that is being made, or whose layer grows.
    pub(super) fn of(
        log: &dyn SharedFile,
        storage: &dyn Storage,
        dir: &Path,
        data: &DataFiles,
        with_header: bool,
    ) -> Result<Bond> {
        let what = || format!("cannot note down the files of {}", dir.display());
        Ok(Bond {
            log: log.id().context(what)?,
            header: with_header
                .then(|| header_state(storage, dir))
                .transpose()?,
            data: data.ids()?,
            evidence: log.evidence().context(what)?,
        })
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::with_capacity(BOND_LEN);
        put_id(&mut out, self.log);
        let (inode, changed) = self.header.unwrap_or((0, 0));
        out.u64(inode);
        out.u64(changed);
        out.bytes(&self.evidence.witness);
        self.evidence.mounts.iter().for_each(|id| out.u64(*id));
        let marked = if self.evidence.marked { MARKED } else { 0 };
        let any = if self.header.is_none() { ANY_HEADER } else { 0 };
        out.u32(marked | any);
        out.u32(count(self.data.len()));
        self.data.iter().for_each(|id| put_id(&mut out, *id));
        out.pad_to(BOND_LEN - 4);
        out.crc();
        out.into_bytes()
    }

    fn decode(bytes: &[u8]) -> Result<Bond> {
        check_crc(bytes, "what the log belongs to")?;
        let mut input = Reader::new(bytes);
        let log = take_id(&mut input)?;
        let header = (input.u64()?, input.u64()?);
        let witness = input.array()?;
        let mounts = [input.u64()?, input.u64()?];
        let flags = input.u32()?;
        let count = input.u32()? as usize;
        if count > MAX_SEGMENTS {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{count} data files where a layer has {MAX_SEGMENTS} at most"),
            ));
        }
        let data = (0..count)
            .map(|_| take_id(&mut input))
            .collect::<Result<_>>()?;
        Ok(Bond {
            log,
            header: (flags & ANY_HEADER == 0).then_some(header),
            data,
            evidence: Evidence {
                witness,
                mounts,
                marked: flags & MARKED != 0,
            },
        })
    }

    /// Why the log whose header is given, and which is read from `log`, does not speak of what is in
    /// memory now, if it does not.
    pub(super) fn broken(
        header: &[u8],
        log: &dyn StorageFile,
        storage: &dyn Storage,
        dir: &Path,
        data: &DataFiles,
    ) -> Result<Option<String>> {
        let Ok(bond) = Bond::decode(part(header, in_memory(BOND_AT), BOND_LEN)) else {
            return Ok(Some("its header is damaged".into()));
        };
        let what = || format!("cannot look at the log of {}", dir.display());
        if bond.log != log.id().context(what)? {
            return Ok(Some(
                "it is a copy, or was put back from a backup: it names another file".into(),
            ));
        }
        let there = data.ids()?;
        let same = bond.data.iter().zip(&there).all(|(was, is)| was == is);
        if bond.data.is_empty() || !same {
            return Ok(Some(
                "the data files are not those that it was written beside".into(),
            ));
        }
        if let Some(was) = bond.header
            && was != header_state(storage, dir)?
        {
            return Ok(Some(
                "the layer's header was changed by somebody else: files were put back, or their \
                 owner or rights changed"
                    .into(),
            ));
        }
        Ok(match log.prove(&bond.evidence).context(what)? {
            Some(proof) => {
                tracing::debug!(layer = %dir.display(), ?proof, "the page cache is what it was");
                None
            }
            None => Some(
                "nothing proves that the file system has stayed mounted since: its cache may be gone"
                    .into(),
            ),
        })
    }
}
