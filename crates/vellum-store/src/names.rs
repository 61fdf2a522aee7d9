//! Names of containers, volumes and images, and how they become file names.

use std::path::PathBuf;

use super::{RECORD_SUFFIX, Store};
use vellum_base::error::{Error, ErrorKind, Result};

/// The longest name, in bytes: encoded it still fits a file name.
const MAX_NAME: usize = 80;

/// Checks the name of a container or a volume: letters, digits, `_`, `.`, `-`, the first a letter
/// or a digit.
///
/// # Errors
/// [`ErrorKind::InvalidInput`], saying what is allowed.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    check(what, name, "_.-", "letters, digits, '_', '.' and '-'")
}

/// Checks the name of an image: as [`check_name`], with `/`, `:`, `@` and `+` as well.
///
/// # Errors
/// [`ErrorKind::InvalidInput`], saying what is allowed.
pub fn check_reference(name: &str) -> Result<()> {
    check(
        "image",
        name,
        "_.-/:@+",
        "letters, digits, '_', '.', '-', '/', ':', '@' and '+'",
    )
}

fn check(what: &str, name: &str, extra: &str, allowed: &str) -> Result<()> {
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let all_allowed = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || extra.contains(c));
    if starts_well && all_allowed && name.len() <= MAX_NAME {
        return Ok(());
    }
    let article = match what.starts_with(['a', 'e', 'i', 'o', 'u']) {
        true => "an",
        false => "a",
    };
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!(
            "{name:?} cannot be the name of {article} {what}: use at most {MAX_NAME} {allowed}, beginning \
             with a letter or a digit"
        ),
    ))
}

/// A name as a file name: everything but letters, digits, `_`, `.` and `-` as `%XX`.
pub(super) fn encode(name: &str) -> String {
    name.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

impl Store {
    /// The path of a record. The name was checked.
    pub fn record_path(&self, directory: &str, name: &str) -> PathBuf {
        self.root
            .join(directory)
            .join(format!("{}{RECORD_SUFFIX}", encode(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_store_or_hide_are_refused() {
        for bad in [
            "",
            "..",
            ".hidden",
            "/etc",
            "a\0b",
            "a b",
            "-rf",
            "a\nb",
            "ä",
            &"x".repeat(81),
        ] {
            assert!(check_name("container", bad).is_err(), "{bad:?}");
            assert!(check_reference(bad).is_err(), "{bad:?}");
        }
        assert!(check_name("container", "a/b").is_err());
        check_reference("registry:5000/library/debian:12@sha256").unwrap();
    }

    #[test]
    fn different_names_have_different_file_names_without_separators() {
        assert_eq!(encode("a/b:1"), "a%2Fb%3A1");
        assert_ne!(encode("a/b"), encode("a:b"));
        assert!(!encode("a/../b").contains('/'));
    }
}
