//! What all files of this crate begin with: magic, version and features, and a CRC at the end of the header.

use crate::record::corrupt;
use vellum_base::block::{part, u32_at, u64_at};
use vellum_base::error::{Error, ErrorKind, Result};

/// The beginning of a kind of file.
pub(crate) struct Front {
    pub magic: &'static [u8; 8],
    /// What it is called in messages.
    pub what: &'static str,
    /// The command that writes it.
    pub made_by: &'static str,
    pub version: u32,
    /// Features that this build knows.
    pub known_incompatible: u64,
}

impl Front {
    /// Looks at a whole header.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for another kind of file, version or feature; [`ErrorKind::Corrupt`] for
    /// the CRC.
    pub(crate) fn check(&self, header: &[u8]) -> Result<()> {
        let Front { what, made_by, .. } = self;
        if !header.starts_with(self.magic) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("not a {what} that {made_by} wrote (wrong magic)"),
            ));
        }
        let (version, known) = (u32_at(header, 8), self.version);
        if version != known {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{what} format version {version}; this build reads version {known}: use the vellum that \
                     made it"
                ),
            ));
        }
        let crc_at = header.len() - 4;
        if crc32fast::hash(part(header, 0, crc_at)) != u32_at(header, crc_at) {
            return Err(corrupt("the header does not match its CRC"));
        }
        check_features(u64_at(header, 16), self.known_incompatible, what)
    }
}

/// Refuses features beyond those that are known.
fn check_features(incompatible: u64, known: u64, what: &str) -> Result<()> {
    let unknown = incompatible & !known;
    if unknown == 0 {
        return Ok(());
    }
    let bits = (0..64).filter(|bit| unknown >> bit & 1 == 1);
    let bits: Vec<String> = bits.map(|bit| bit.to_string()).collect();
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "incompatible feature bit(s) {} of the {what} are unknown to this build: use a newer vellum",
            bits.join(", ")
        ),
    ))
}
