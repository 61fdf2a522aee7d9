//! POSIX ACLs as tar has them (`--acls`: text in PAX records) and as Linux keeps them (attributes).
//!
//! The text is that of acl(5); the attribute that of the kernel's `posix_acl_xattr.h`.

use nix::unistd::{Group, User};

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
/// In the place of an id where an entry has none.
const NO_ID: u32 = u32::MAX;

/// The attribute, name and value, for the PAX record `SCHILY.acl.KIND`. `None` where the text is no
/// ACL of this host, as of one that names users who are not known here: then the file goes without,
/// with a warning, as GNU tar leaves it.
pub(super) fn attribute(kind: &[u8], text: &str) -> Option<(&'static [u8], Vec<u8>)> {
    let name: &[u8] = match kind {
        b"access" => b"system.posix_acl_access",
        b"default" => b"system.posix_acl_default",
        _ => return None,
    };
    let mut entries = Vec::new();
    for line in text.split(['\n', ',']) {
        // `#` begins a comment: the effective rights.
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let Some(entry) = entry(line) else {
            tracing::warn!(
                ?text,
                "access control list left out: {line:?} is not understood"
            );
            return None;
        };
        entries.push(entry);
    }
    if entries.is_empty() {
        return None;
    }
    // The kernel wants them in this order.
    entries.sort_unstable();
    let mut value = VERSION.to_le_bytes().to_vec();
    for (tag, id, rights) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(rights.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    Some((name, value))
}

/// Reads `TAG:QUALIFIER:RIGHTS`, and star's form with the number behind: `TAG:NAME:RIGHTS:ID`.
fn entry(line: &str) -> Option<(u16, u32, u16)> {
    let mut parts = line.split(':');
    let (tag, qualifier, rights) = (parts.next()?, parts.next()?.trim(), parts.next()?.trim());
    let number = parts.next().and_then(|id| id.trim().parse::<u32>().ok());
    let mut bits = 0;
    for letter in rights.chars() {
        bits |= match letter {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return None,
        };
    }
    let id = |named: &dyn Fn(&str) -> Option<u32>| {
        number
            .or_else(|| qualifier.parse().ok())
            .or_else(|| named(qualifier))
    };
    let user = |name: &str| Some(User::from_name(name).ok()??.uid.as_raw());
    let group = |name: &str| Some(Group::from_name(name).ok()??.gid.as_raw());
    let (tag, id) = match (tag.trim(), qualifier) {
        ("user" | "u", "") => (USER_OBJ, NO_ID),
        ("user" | "u", _) => (USER, id(&user)?),
        ("group" | "g", "") => (GROUP_OBJ, NO_ID),
        ("group" | "g", _) => (GROUP, id(&group)?),
        ("mask" | "m", "") => (MASK, NO_ID),
        ("other" | "o", "") => (OTHER, NO_ID),
        _ => return None,
    };
    Some((tag, id, bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_an_acl_becomes_the_attribute_that_setfacl_makes() {
        let text = "user::rw-\nuser:1000:r--\ngroup::r--\nmask::r--\nother::---\n";
        let (name, value) = attribute(b"access", text).unwrap();
        assert_eq!(name, b"system.posix_acl_access");
        let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "0200000001000600ffffffff02000400e803000004000400ffffffff10000400ffffffff\
             20000000ffffffff"
        );
        let star = "user::rw-,user:nobody-here:r--:1000,group::r--,mask::r--,other::---";
        assert_eq!(attribute(b"access", star).unwrap().1, value);
        assert_eq!(attribute(b"default", text).unwrap().1, value);
    }

    #[test]
    fn what_is_no_acl_of_this_host_is_left_out() {
        for text in [
            "",
            "user",
            "user:no-such-user-here:rwx",
            "mask:1:rwx",
            "user::q",
        ] {
            assert_eq!(attribute(b"access", text), None, "{text}");
        }
        assert_eq!(attribute(b"other", "user::rwx"), None);
    }
}
