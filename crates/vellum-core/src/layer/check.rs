//! Looks a layer over without changing it, explains what is wrong, and repairs what needs no guess.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::data::{DataFiles, layout, segment_name};
use super::files::{remove_if_there, sync_names};
use super::header::{HEADER_FILE, Header};
use super::index::Index;
use super::journal::AREA_FILES;
use super::lazy::{HAVE_FILE, SUMS_FILE};
use super::live::LIVE_FILE;
use super::map_file::MAP_FILE;
use super::recovery::{data_blocks, load_for_check};
use super::sealed::{SEAL_FILE, SealedLayer, seal_in_place};
use super::space::RESERVE_FILE;
use vellum_base::block::{BlockState, Blocks, part_mut};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::{OpenMode, Storage};

/// Blocks read at a time: 1 MiB.
const READ: Blocks = Blocks::new(256);

/// Space beyond the blocks of a layer that is not worth a word: the host's own blocks, and what a layer
/// in use takes ahead of first touches.
const SLACK: u64 = 1 << 20;
const SLACK_WRITABLE: u64 = 17 << 20;

/// How bad a [`Finding`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing is wrong: the next open or seal sees to it, or it only takes space.
    Note,
    /// The layer works, but lacks something that it should have.
    Warning,
    /// Content is lost or cannot be trusted.
    Damage,
}

/// What [`repair_layer`] does about a [`Finding`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Repair {
    /// Removes the file, whose content is elsewhere or was never used.
    Remove,
    /// Reads every block and writes the seal.
    MakeSeal,
}

/// Something about a layer that its owner should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The file, or the layer's directory.
    pub file: PathBuf,
    /// What was found.
    pub what: String,
    /// How it comes about, and what to do.
    pub why: String,
    /// What can be done about it without guessing; `None`: nothing.
    pub repair: Option<Repair>,
}

impl fmt::Display for Finding {
    /// One line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.file.display(), self.what, self.why)
    }
}

/// Collects findings about one layer.
struct Check<'a> {
    storage: &'a dyn Storage,
    dir: &'a Path,
    findings: Vec<Finding>,
}

/// Looks at every file of the layer in `dir`; with `deep`, reads every data block too. Changes
/// nothing. The layer must not be open for writing.
pub fn check_layer(storage: &dyn Storage, dir: &Path, deep: bool) -> Vec<Finding> {
    let mut check = Check {
        storage,
        dir,
        findings: Vec::new(),
    };
    check.names();
    match Header::read(storage, dir) {
        Err(error) => check.damage(
            HEADER_FILE,
            error.to_string(),
            "without its header nothing of the layer can be used; restore it from its image",
        ),
        Ok(header) => {
            let whole = check.segments(&header);
            if header.sealed {
                check.sealed(whole && deep);
            } else {
                check.writable(&header, whole && deep);
            }
        }
    }
    check.findings
}

/// Does what [`check_layer`] proposes, and returns what was done. The layer must not be open.
///
/// # Errors
/// Where the host refuses; what was done before stays done.
pub fn repair_layer(storage: &dyn Storage, dir: &Path) -> Result<Vec<Finding>> {
    let mut done = Vec::new();
    for finding in check_layer(storage, dir, false) {
        match finding.repair {
            None => continue,
            Some(Repair::MakeSeal) => drop(seal_in_place(storage, dir, |_| {})?),
            Some(Repair::Remove) => {
                // What makes the file superfluous may be in memory only.
                sync_names(storage, dir)?;
                // The seal may have taken it along.
                remove_if_there(storage, &finding.file)?;
            }
        }
        done.push(finding);
    }
    Ok(done)
}

impl Check<'_> {
    fn add(
        &mut self,
        severity: Severity,
        file: &str,
        what: impl Into<String>,
        why: &str,
        repair: Option<Repair>,
    ) {
        self.findings.push(Finding {
            severity,
            file: self.dir.join(file),
            what: what.into(),
            why: why.into(),
            repair,
        });
    }

    fn damage(&mut self, file: &str, what: impl Into<String>, why: &str) {
        self.add(Severity::Damage, file, what, why, None);
    }

    fn exists(&mut self, file: &str) -> bool {
        match self.storage.exists(&self.dir.join(file)) {
            Ok(exists) => exists,
            Err(error) => {
                self.damage(
                    file,
                    format!("cannot be looked at: {error}"),
                    "the host refuses it",
                );
                false
            }
        }
    }

    /// Files that do not belong here.
    fn names(&mut self) {
        let entries = match self.storage.list(self.dir) {
            Ok(entries) => entries,
            Err(error) => {
                return self.damage(
                    "",
                    format!("cannot be listed: {error}"),
                    "the directory is missing, or the host refuses it",
                );
            }
        };
        for entry in entries {
            let name = entry.name.as_str();
            let ours = [
                HEADER_FILE,
                MAP_FILE,
                SEAL_FILE,
                LIVE_FILE,
                RESERVE_FILE,
                HAVE_FILE,
                SUMS_FILE,
            ];
            let ours = ours.contains(&name)
                || AREA_FILES.contains(&name)
                || (0..8).any(|segment| segment_name(segment) == name);
            if ours && !entry.is_dir {
                continue;
            }
            if name.ends_with(".tmp") && !entry.is_dir {
                self.add(
                    Severity::Note,
                    name,
                    "a file that was being written when something stopped",
                    "nothing reads it, it only takes space",
                    Some(Repair::Remove),
                );
            } else {
                self.add(
                    Severity::Note,
                    name,
                    "not a file of a layer",
                    "something else put it there; it is left alone",
                    None,
                );
            }
        }
    }

    /// True when every data file is there and as long as it should be.
    fn segments(&mut self, header: &Header) -> bool {
        let mut whole = true;
        for (segment, expected) in layout(header.virtual_size) {
            let name = segment_name(segment);
            let len = self
                .storage
                .open(&self.dir.join(&name), OpenMode::Read)
                .and_then(|file| file.len());
            let what = match len {
                Ok(len) if len == expected => continue,
                Ok(len) if len > expected && !header.sealed => {
                    self.add(
                        Severity::Note,
                        &name,
                        format!("{len} bytes where {expected} belong"),
                        "the layer was to grow when something stopped; the next open cuts it",
                        None,
                    );
                    continue;
                }
                Ok(len) => format!("{len} bytes where {expected} belong"),
                Err(error) => format!("cannot be opened: {error}"),
            };
            whole = false;
            self.damage(
                &name,
                what,
                "blocks are lost; restore the layer from its image or a backup",
            );
        }
        whole
    }

    fn writable(&mut self, header: &Header, read: bool) {
        if self.exists(SEAL_FILE) {
            self.damage(
                SEAL_FILE,
                "a seal in a layer that is not sealed",
                "its header was replaced by an older one; do not write to it",
            );
        }
        let loaded = match load_for_check(self.storage, self.dir, header) {
            Ok(loaded) => loaded,
            Err(error) => {
                return self.damage(
                    MAP_FILE,
                    error.to_string(),
                    "which blocks the layer holds cannot be told; restore it from a backup",
                );
            }
        };
        for name in AREA_FILES {
            if !self.exists(name) {
                continue;
            }
            if loaded.records == 0 {
                self.add(
                    Severity::Note,
                    name,
                    "a journal that holds nothing new",
                    "everything in it is in the map; the next open removes it",
                    Some(Repair::Remove),
                );
            } else {
                self.add(
                    Severity::Note,
                    name,
                    "the layer was not closed",
                    "the next open brings it up to date",
                    None,
                );
            }
        }
        let allocated = DataFiles::open(self.storage, self.dir, header, OpenMode::Read)
            .and_then(|data| data.allocated());
        self.space(
            data_blocks(&loaded.index),
            allocated,
            SLACK_WRITABLE,
            "a crash may have left it; the next unmount, or the end of what serves it, gives it back",
        );
        if read {
            self.read_blocks(header, &loaded.index);
        }
    }

    fn sealed(&mut self, read: bool) {
        let layer = match SealedLayer::open_unsynced(self.storage, self.dir) {
            Ok(layer) => layer,
            Err(error) => {
                return self.damage(
                    SEAL_FILE,
                    error.to_string(),
                    "the layer cannot be opened; restore it from its image",
                );
            }
        };
        if layer.is_checksummed() {
            self.left_beside_a_seal(layer.header());
        } else {
            self.without_checksums(layer.is_lazy());
        }
        self.space(
            layer.data_blocks(),
            layer.allocated_bytes(),
            SLACK,
            "discards before a crash may not have reached the disk; flattening or copying the layer \
             gives the space back",
        );
        if !read {
            return;
        }
        match layer.scrub(|_| {}) {
            Err(error) => self.damage(SEAL_FILE, error.to_string(), "it cannot be trusted"),
            Ok(report) if !report.corrupt.is_empty() => {
                let some: Vec<String> = report
                    .corrupt
                    .iter()
                    .take(10)
                    .map(ToString::to_string)
                    .collect();
                let more = if report.corrupt.len() > some.len() {
                    ", …"
                } else {
                    ""
                };
                self.damage(
                    "data",
                    format!(
                        "{} block(s) do not match their checksum: {}{more}",
                        report.corrupt.len(),
                        some.join(", ")
                    ),
                    "the disk lost or changed them: reading them is an error; restore the layer \
                     from its image",
                );
            }
            Ok(_) => {}
        }
    }

    /// What a seal replaces, where a crash left it.
    fn left_beside_a_seal(&mut self, header: &Header) {
        for name in [MAP_FILE, RESERVE_FILE, HAVE_FILE, SUMS_FILE]
            .iter()
            .chain(&AREA_FILES)
        {
            if self.exists(name) {
                self.add(
                    Severity::Note,
                    name,
                    "left over from before the layer was sealed",
                    "the seal holds it all",
                    Some(Repair::Remove),
                );
            }
        }
        if header.lazy {
            self.add(
                Severity::Note,
                HEADER_FILE,
                "it calls the layer lazy, and all of it is here",
                "a crash came between the seal and the header",
                Some(Repair::MakeSeal),
            );
        }
    }

    fn without_checksums(&mut self, lazy: bool) {
        if lazy {
            return self.add(
                Severity::Note,
                HAVE_FILE,
                "a lazy layer: not all of its blocks have come yet",
                "they come as they are read, or all of them by `vellum complete IMAGE`",
                None,
            );
        }
        self.add(
            Severity::Warning,
            SEAL_FILE,
            "missing: the layer is sealed, but has no checksums yet",
            "the server of a container that lies on it makes them, or `vellum prune`",
            Some(Repair::MakeSeal),
        );
    }

    /// Space that the data files take for blocks that the layer does not hold.
    fn space(
        &mut self,
        held_blocks: Blocks,
        allocated: Result<u64>,
        slack: u64,
        advice: &'static str,
    ) {
        let held = held_blocks.bytes();
        if let Ok(allocated) = allocated
            && allocated > held + held / 8 + slack
        {
            self.add(
                Severity::Note,
                "data",
                format!("{allocated} bytes taken for {held} bytes of blocks"),
                advice,
                None,
            );
        }
    }

    /// Reads the data blocks of a layer without checksums: whether the host can.
    fn read_blocks(&mut self, header: &Header, index: &Index) {
        let result = || -> Result<()> {
            let data = DataFiles::open(self.storage, self.dir, header, OpenMode::Read)?;
            let mut buf = vec![0; READ.buffer_len()];
            for run in index.iter().filter(|run| run.value == BlockState::Data) {
                for span in run.span.pieces(READ) {
                    let bytes = part_mut(&mut buf, 0, span.len().buffer_len());
                    data.read(bytes, span.offset())?;
                }
            }
            Ok(())
        };
        if let Err(error) = result() {
            self.damage("data", error.to_string(), "the host's disk fails");
        }
    }
}

/// The worst of some findings as a failure, where one of them is damage.
///
/// # Errors
/// [`ErrorKind::Corrupt`] with the first damage.
pub fn fail_on_damage(findings: &[Finding]) -> Result<()> {
    match findings
        .iter()
        .find(|finding| finding.severity == Severity::Damage)
    {
        Some(finding) => Err(Error::new(ErrorKind::Corrupt, finding.to_string())),
        None => Ok(()),
    }
}
