//! The hash of names by which ext4 orders a directory: half MD4.
//!
//! Source: the kernel's fs/ext4/hash.c.

use vellum_base::block::part_from;

/// The largest hash, which stands for the end of a directory.
const END: u32 = 0xFFFF_FFFE;
/// Bytes of a name that one round takes.
const ROUND: usize = 32;
/// What a file system that has no seed begins with.
const DEFAULT_SEED: [u32; 4] = [0x6745_2301, 0xEFCD_AB89, 0x98BA_DCFE, 0x1032_5476];

/// How a file system hashes names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hasher {
    seed: [u32; 4],
    /// Bytes of names count as signed numbers.
    signed: bool,
}

impl Hasher {
    /// `seed` is that of the superblock; zeros stand for the usual one.
    pub fn new(seed: [u32; 4], signed: bool) -> Self {
        let seed = if seed == [0; 4] { DEFAULT_SEED } else { seed };
        Hasher { seed, signed }
    }

    /// The hash of a name, of which the lowest bit is 0, and the minor hash.
    pub fn hash(&self, name: &[u8]) -> (u32, u32) {
        let mut state = self.seed;
        let mut at = 0;
        while at < name.len() {
            let words = self.words(part_from(name, at));
            transform(&mut state, &words);
            at += ROUND;
        }
        let [_, major, minor, _] = state;
        let major = major & !1;
        (if major == END { END - 2 } else { major }, minor)
    }

    /// The next bytes of a name, padded with its length.
    fn words(&self, rest: &[u8]) -> [u32; 8] {
        let len = rest.len() as u32;
        let pad = len | len << 8;
        let pad = pad | pad << 16;
        let mut words = [pad; 8];
        let rest = rest.split_at(rest.len().min(ROUND)).0;
        for (word, bytes) in words.iter_mut().zip(rest.chunks(4)) {
            for byte in bytes {
                let value = if self.signed {
                    i32::from(byte.cast_signed()).cast_unsigned()
                } else {
                    u32::from(*byte)
                };
                *word = value.wrapping_add(*word << 8);
            }
        }
        words
    }
}

fn transform(state: &mut [u32; 4], words: &[u32; 8]) {
    type Mix = fn(u32, u32, u32) -> u32;
    let rounds: [(Mix, u32, [u8; 8], [u32; 4]); 3] = [
        (
            |x, y, z| z ^ (x & (y ^ z)),
            0,
            [0, 1, 2, 3, 4, 5, 6, 7],
            [3, 7, 11, 19],
        ),
        (
            |x, y, z| (x & y).wrapping_add((x ^ y) & z),
            0x5A82_7999,
            [1, 3, 5, 7, 0, 2, 4, 6],
            [3, 5, 9, 13],
        ),
        (
            |x, y, z| x ^ y ^ z,
            0x6ED9_EBA1,
            [3, 7, 2, 6, 1, 5, 0, 4],
            [3, 9, 11, 15],
        ),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (mix, constant, order, shifts) in rounds {
        for (place, shift) in order.into_iter().zip(shifts.iter().cycle()) {
            let word: u32 = words.iter().skip(place.into()).take(1).sum();
            let sum = a
                .wrapping_add(mix(b, c, d))
                .wrapping_add(word)
                .wrapping_add(constant);
            // What was d is mixed into next, and so on around.
            (a, b, c, d) = (d, sum.rotate_left(*shift), b, c);
        }
    }
    for (own, new) in state.iter_mut().zip([a, b, c, d]) {
        *own = own.wrapping_add(new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_debugfs() {
        // debugfs -R "dx_hash -h half_md4 -s 00112233-4455-6677-8899-aabbccddeeff NAME"
        let seed = [0x3322_1100, 0x7766_5544, 0xBBAA_9988, 0xFFEE_DDCC];
        let hasher = Hasher::new(seed, true);
        for (name, hash) in [
            ("a", (0x9375_2EE6, 0x578C_30BA)),
            ("libc.so.6", (0xEB93_3632, 0xAB4E_5776)),
            (
                "a-name-of-more-than-thirty-two-bytes.txt",
                (0x96BF_8BE2, 0x1EDF_AD7D),
            ),
        ] {
            assert_eq!(hasher.hash(name.as_bytes()), hash, "{name}");
        }
    }
}
