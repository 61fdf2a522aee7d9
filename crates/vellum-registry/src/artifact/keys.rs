//! The keys of encrypted layers, and what they encrypt: docs/encryption.md, "Bytes".

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Salt as HkdfSalt};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::bytes::corrupt;
use vellum_base::error::{Error, ErrorKind, Result};

/// Length of keys and salts in bytes.
pub(super) const KEY_LEN: usize = 32;
/// Length of the tag behind what is encrypted, in bytes.
pub(super) const TAG_LEN: usize = 16;

const CHUNK_INFO: &[u8] = b"vellum chunk v1";
const LAYER_INFO: &[u8] = b"vellum layer v1";

/// What all keys of a trust domain are derived with: 32 random bytes, which only those who push there have. It is not
/// shown by `{:?}`, and is overwritten when it goes.
#[derive(Clone)]
pub struct Salt(Zeroizing<[u8; KEY_LEN]>);

impl Salt {
    /// A new one.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] where the kernel gives no random bytes.
    pub fn random() -> Result<Self> {
        let mut bytes = Zeroizing::new([0; KEY_LEN]);
        let filled = SystemRandom::new().fill(&mut bytes[..]);
        filled.map_err(|_| Error::new(ErrorKind::Missing, "the kernel gives no random bytes"))?;
        Ok(Salt(bytes))
    }

    /// Reads a file of a salt: 64 hexadecimal digits on a line, besides comments (`#`).
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text.lines().map(str::trim);
        let mut lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        match (lines.next().and_then(of_digits), lines.next()) {
            (Some(bytes), None) => Ok(Salt(bytes)),
            _ => Err(corrupt("a salt is one line of 64 hexadecimal digits")),
        }
    }

    /// As [`Salt::parse`] takes it, without an end of line.
    pub fn digits(&self) -> Zeroizing<String> {
        digits_of(&self.0)
    }

    /// The key of a chunk with this frame.
    pub fn chunk_key(&self, frame: &[u8]) -> ChunkKey {
        ChunkKey(*self.derive(Sha256::digest(frame).into(), CHUNK_INFO))
    }

    /// The key of a layer whose key section has the content `secret` behind the table `table`.
    pub(super) fn layer_key(&self, table: &[u8], secret: &[u8]) -> LayerKey {
        let mut hasher = Sha256::new();
        hasher.update(table);
        hasher.update(secret);
        LayerKey(self.derive(hasher.finalize().into(), LAYER_INFO))
    }

    fn derive(&self, of: [u8; 32], info: &[u8]) -> Zeroizing<[u8; KEY_LEN]> {
        let mut key = Zeroizing::new([0; KEY_LEN]);
        let derived = HkdfSalt::new(HKDF_SHA256, &self.0[..]).extract(&of);
        let filled = derived
            .expand(&[info], KeyLen)
            .and_then(|key_material| key_material.fill(&mut key[..]));
        assert!(filled.is_ok(), "HKDF gives 32 bytes");
        key
    }
}

impl fmt::Debug for Salt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Salt(…)")
    }
}

/// How many bytes HKDF is asked for.
struct KeyLen;

impl KeyType for KeyLen {
    fn len(&self) -> usize {
        KEY_LEN
    }
}

/// What a chunk is encrypted with. It is not shown by `{:?}`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ChunkKey(pub(super) [u8; KEY_LEN]);

impl ChunkKey {
    /// Encrypts the frame that the key was derived of, and appends the tag.
    pub(super) fn seal(&self, frame: &mut Vec<u8>) {
        seal(&self.0, &[], frame);
    }

    /// Decrypts stored bytes in place; `None` where the tag does not match.
    pub(super) fn open<'a>(&self, stored: &'a mut [u8]) -> Option<&'a [u8]> {
        open(&self.0, &[], stored)
    }
}

impl fmt::Debug for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChunkKey(…)")
    }
}

/// What the key section of a layer's table is encrypted with. It is not shown by `{:?}`, and is overwritten when it
/// goes. In JSON it is 64 hexadecimal digits.
#[derive(Clone)]
pub struct LayerKey(Zeroizing<[u8; KEY_LEN]>);

impl LayerKey {
    /// Reads 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        let key = of_digits(text.trim_end_matches('\n')).map(LayerKey);
        key.ok_or_else(|| corrupt("the key of a layer is 64 hexadecimal digits"))
    }

    /// As [`LayerKey::parse`] takes it.
    pub fn digits(&self) -> Zeroizing<String> {
        digits_of(&self.0)
    }

    /// Encrypts a key section that stands behind `table`, and appends the tag.
    pub(super) fn seal(&self, table: &[u8], secret: &mut Vec<u8>) {
        seal(&self.0, table, secret);
    }

    /// Decrypts a key section in place; `None` where it, or the table, does not match the tag.
    pub(super) fn open<'a>(&self, table: &[u8], section: &'a mut [u8]) -> Option<&'a [u8]> {
        open(&self.0, table, section)
    }
}

impl fmt::Debug for LayerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LayerKey(…)")
    }
}

impl Serialize for LayerKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.digits())
    }
}

impl<'de> Deserialize<'de> for LayerKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        LayerKey::parse(&text).map_err(serde::de::Error::custom)
    }
}

#[expect(clippy::expect_used, reason = "32 bytes are a key of AES-256")]
fn cipher(key: &[u8; KEY_LEN]) -> LessSafeKey {
    let key = UnboundKey::new(&AES_256_GCM, key);
    LessSafeKey::new(key.expect("a key of AES-256"))
}

/// Each key encrypts one text alone, which it is derived of: so one nonce is enough.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

fn seal(key: &[u8; KEY_LEN], aad: &[u8], bytes: &mut Vec<u8>) {
    let sealed = cipher(key).seal_in_place_append_tag(nonce(), Aad::from(aad), bytes);
    assert!(sealed.is_ok(), "less than 64 GiB are encrypted");
}

fn open<'a>(key: &[u8; KEY_LEN], aad: &[u8], bytes: &'a mut [u8]) -> Option<&'a [u8]> {
    let opened = cipher(key).open_in_place(nonce(), Aad::from(aad), bytes);
    opened.ok().map(|plain| &*plain)
}

/// 64 hexadecimal digits as bytes.
fn of_digits(text: &str) -> Option<Zeroizing<[u8; KEY_LEN]>> {
    if text.len() != 2 * KEY_LEN {
        return None;
    }
    let mut bytes = Zeroizing::new([0; KEY_LEN]);
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let [high, low] = pair else { return None };
        let high = char::from(*high).to_digit(16)?;
        let low = char::from(*low).to_digit(16)?;
        *byte = (high << 4 | low) as u8;
    }
    Some(bytes)
}

fn digits_of(bytes: &[u8; KEY_LEN]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(2 * KEY_LEN));
    for byte in bytes {
        for half in [byte >> 4, byte & 15] {
            text.extend(char::from_digit(half.into(), 16));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn salt(byte: u8) -> Salt {
        Salt(Zeroizing::new([byte; KEY_LEN]))
    }

    #[test]
    fn a_salt_is_one_line_of_digits_besides_comments() {
        let made = Salt::random().unwrap();
        let text = format!("# registry.example/team\n\n{}\n", *made.digits());
        assert_eq!(*Salt::parse(&text).unwrap().0, *made.0);
        let digits = "0".repeat(64);
        for bad in [
            "".to_owned(),
            "00".to_owned(),
            format!("{digits}0"),
            format!("{digits}\n{digits}"),
            "g".repeat(64),
            format!("+{}", "0".repeat(63)),
            "é".repeat(32),
        ] {
            assert_eq!(Salt::parse(&bad).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn no_key_and_no_salt_is_shown() {
        let salt = salt(0xab);
        let layer = salt.layer_key(b"table", b"secret");
        let chunk = salt.chunk_key(b"frame");
        let shown = format!("{salt:?} {layer:?} {chunk:?}");
        assert_eq!(shown, "Salt(…) LayerKey(…) ChunkKey(…)");
        let error = LayerKey::parse("abc123").unwrap_err();
        assert!(!error.to_string().contains("abc123"), "{error}");
    }

    /// Calculated by another program (Python's `cryptography`) from docs/encryption.md.
    #[test]
    fn the_bytes_of_the_first_version_are_these_for_ever() {
        let mut counted = [0; KEY_LEN];
        counted.iter_mut().zip(0..).for_each(|(byte, n)| *byte = n);
        let salt = Salt(Zeroizing::new(counted));
        let key = salt.chunk_key(b"a frame");
        let digits = "37f818d701de83015b46eae787d9687a2aad611d65602366727df9f5683bb93d";
        assert_eq!(*digits_of(&key.0), digits);
        let mut stored = b"a frame".to_vec();
        key.seal(&mut stored);
        let shown: String = stored.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(shown, "b2bb1affdd14f878d90eee4288036910811a1022f2c4c9");
        assert_eq!(key.open(&mut stored), Some(&b"a frame"[..]));
    }

    #[test]
    fn a_key_goes_through_json() {
        let key = salt(3).layer_key(b"table", b"secret");
        let json = serde_json::to_string(&key).unwrap();
        let read: LayerKey = serde_json::from_str(&json).unwrap();
        assert_eq!(*read.0, *key.0);
        serde_json::from_str::<LayerKey>("\"12\"").unwrap_err();
    }

    #[test]
    fn each_salt_content_and_use_has_a_key_of_its_own() {
        let one = salt(1).chunk_key(b"frame");
        assert_eq!(one, salt(1).chunk_key(b"frame"));
        assert_ne!(one, salt(2).chunk_key(b"frame"));
        assert_ne!(one, salt(1).chunk_key(b"other"));
        let layer = |table: &[u8], secret: &[u8]| salt(1).layer_key(table, secret).0;
        assert_ne!(*layer(b"", b"frame"), one.0);
        assert_ne!(*layer(b"a", b"frame"), *layer(b"b", b"frame"));
    }
}
