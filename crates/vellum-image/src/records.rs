//! The PAX records of a tar member: times to the nanosecond and extended attributes.

use tar_core::PaxExtensions;
use tar_core::parse::ParsedEntry;

use super::acl;
use super::node::{Time, Xattrs, shown};
use vellum_base::{Error, ErrorKind, Result};

/// The longest xattr value that Linux takes (`XATTR_SIZE_MAX`), in bytes.
const MAX_XATTR_VALUE: usize = 64 * 1024;

/// The longest xattr name that Linux takes (`XATTR_NAME_MAX`), in bytes.
const MAX_XATTR_NAME: usize = 255;

/// An error about a member that is well-formed but not acceptable.
pub(super) fn refuse(path: &[u8], why: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!("archive member {}: {why}", shown(path)),
    )
}

/// An error about a member that is damaged.
pub(super) fn corrupt(path: &[u8], why: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("archive member {}: {why}", shown(path)),
    )
}

/// What the PAX records of a member say beyond its header.
#[derive(Default)]
pub(super) struct Records {
    pub mtime: Option<Time>,
    pub atime: Option<Time>,
    /// Whether one of them gives the size.
    pub size: bool,
    /// Owner and group; negative ones are for the caller to judge.
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    pub xattrs: Xattrs,
}

impl Records {
    /// Reads those in front of `entry`, which is called `name`.
    pub fn read(entry: &ParsedEntry<'_>, name: &[u8]) -> Result<Records> {
        let mut records = Records::default();
        // Other dialects' forms of an attribute, for where the plain one is missing.
        let mut others = Xattrs::new();
        for record in PaxExtensions::new(entry.pax.unwrap_or_default()) {
            let record = record.map_err(|error| corrupt(name, error))?;
            let value = record.value_bytes();
            let text = || {
                std::str::from_utf8(value).map_err(|_| corrupt(name, "a PAX number is not text"))
            };
            let time = || -> Result<Time> {
                let text = text()?;
                Time::parse_pax(text)
                    .ok_or_else(|| corrupt(name, format!("{text:?} is not a PAX time")))
            };
            let number = || -> Result<i64> {
                let text = text()?;
                text.parse().map_err(|_| {
                    let key = String::from_utf8_lossy(record.key_bytes());
                    corrupt(name, format!("{text:?} is not a PAX {key}"))
                })
            };
            match record.key_bytes() {
                // An empty value takes earlier ones back: what the header says counts.
                b"mtime" | b"atime" | b"size" | b"uid" | b"gid" if value.is_empty() => {}
                b"mtime" => records.mtime = Some(time()?),
                b"atime" => records.atime = Some(time()?),
                b"uid" => records.uid = Some(number()?),
                b"gid" => records.gid = Some(number()?),
                // The parser has used it, but passes over one that it cannot read.
                b"size" => {
                    let size = number()?;
                    if size < 0 {
                        return Err(corrupt(name, format!("{size} is not a PAX size")));
                    }
                    records.size = true;
                }
                key => {
                    if let Some(attribute) = key.strip_prefix(b"SCHILY.xattr.") {
                        let attribute = unescape_gnu(attribute);
                        check_xattr(name, &attribute, value.len())?;
                        records.xattrs.insert(attribute, value.to_vec());
                    } else if let Some(attribute) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                        let attribute = unescape_url(attribute);
                        let value = decode_base64(value).ok_or_else(|| {
                            corrupt(name, "an xattr of libarchive's form is not base64")
                        })?;
                        check_xattr(name, &attribute, value.len())?;
                        others.insert(attribute, value);
                    } else if let Some(kind) = key.strip_prefix(b"SCHILY.acl.")
                        && let Some((attribute, value)) = acl::attribute(kind, text()?)
                    {
                        others.insert(attribute.to_vec(), value);
                    }
                }
            }
        }
        for (attribute, value) in others {
            records.xattrs.entry(attribute).or_insert(value);
        }
        Ok(records)
    }
}

fn check_xattr(member: &[u8], attribute: &[u8], length: usize) -> Result<()> {
    if attribute.is_empty() || attribute.len() > MAX_XATTR_NAME || attribute.contains(&0) {
        return Err(refuse(
            member,
            "an extended attribute has an impossible name",
        ));
    }
    if length > MAX_XATTR_VALUE {
        return Err(refuse(
            member,
            format!(
                "its extended attribute {} has {length} bytes; Linux takes {MAX_XATTR_VALUE}",
                shown(attribute)
            ),
        ));
    }
    Ok(())
}

/// GNU tar writes `=` as `%3D` and `%` as `%25` in the name of an xattr.
fn unescape_gnu(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((first, tail)) = rest.split_first() {
        if let Some(tail) = rest.strip_prefix(b"%3D") {
            out.push(b'=');
            rest = tail;
        } else if let Some(tail) = rest.strip_prefix(b"%25") {
            out.push(b'%');
            rest = tail;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

fn unescape_url(name: &[u8]) -> Vec<u8> {
    let hex = |byte: u8| char::from(byte).to_digit(16);
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    loop {
        match rest {
            [b'%', high, low, tail @ ..]
                if let (Some(high), Some(low)) = (hex(*high), hex(*low)) =>
            {
                out.push((high * 16 + low) as u8);
                rest = tail;
            }
            [first, tail @ ..] => {
                out.push(*first);
                rest = tail;
            }
            [] => return out,
        }
    }
}

fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 3);
    let (mut bits, mut count) = (0u32, 0u32);
    for byte in text.iter().filter(|byte| **byte != b'=') {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'\n' => continue,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_with_and_without_padding_decodes() {
        assert_eq!(decode_base64(b"AQAAAg==").unwrap(), [1, 0, 0, 2]);
        assert_eq!(decode_base64(b"AQAAAg").unwrap(), [1, 0, 0, 2]);
        assert_eq!(decode_base64(b""), Some(vec![]));
        assert_eq!(decode_base64(b"A*"), None);
    }

    #[test]
    fn xattr_names_are_unescaped_in_both_dialects() {
        assert_eq!(unescape_gnu(b"user.a%3Db%25c%41"), b"user.a=b%c%41");
        assert_eq!(unescape_url(b"user.%41%zz%4"), b"user.A%zz%4");
    }
}
