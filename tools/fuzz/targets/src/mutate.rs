//! Changed inputs for the ordinary tests: what a fuzzer does, with a seed and an end.

use vellum_base::storage::SeededRng;

const EDGES: [u64; 12] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 34,
    (1 << 48) - 1,
    i64::MAX as u64,
    u64::MAX,
];

fn place(rng: &mut SeededRng, len: usize) -> usize {
    rng.below(len.max(1) as u64) as usize
}

/// Changes `input` in one to four places; pieces may come from `other`.
pub fn mutate(rng: &mut SeededRng, input: &mut Vec<u8>, other: &[u8], max_len: usize) {
    for _ in 0..=rng.below(4) {
        if input.is_empty() {
            input.push(rng.bits() as u8);
        }
        let at = place(rng, input.len());
        match rng.below(8) {
            0 | 1 => input[at] ^= 1 << rng.below(8),
            2 => input[at] = rng.bits() as u8,
            3 | 4 => {
                let value = EDGES[place(rng, EDGES.len())].to_le_bytes();
                let mut value = value[..1 << rng.below(4)].to_vec();
                if rng.chance(1, 3) {
                    value.reverse();
                }
                for (to, from) in input[at..].iter_mut().zip(value) {
                    *to = from;
                }
            }
            5 => {
                let len = place(rng, (input.len() - at).min(64)) + 1;
                input.drain(at..(at + len).min(input.len()));
            }
            6 => {
                let from = place(rng, input.len());
                let len = place(rng, (input.len() - from).min(256)) + 1;
                let piece = input[from..(from + len).min(input.len())].to_vec();
                input.splice(at..at, piece);
            }
            _ => {
                let from = place(rng, other.len());
                let len = place(rng, (other.len() - from).min(256));
                let piece = other[from..(from + len).min(other.len())].to_vec();
                let end = (at + piece.len()).min(input.len());
                input.splice(at..end, piece);
            }
        }
    }
    input.truncate(max_len);
}
