//! A bitmap of one group.

use vellum_base::block::{part, part_mut};

/// Bits, of which a set one stands for a block or an inode in use.
#[derive(Debug, Clone)]
pub(super) struct Bits {
    bytes: Vec<u8>,
    /// How many count.
    len: u64,
}

impl Bits {
    /// The first `len` bits of `bytes` count. All behind them are set, as ext4 wants it.
    pub fn new(bytes: Vec<u8>, len: u64) -> Self {
        let mut bits = Bits { bytes, len };
        for bit in len..bits.bytes.len() as u64 * 8 {
            bits.put(bit, true);
        }
        bits
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn byte(&self, bit: u64) -> u8 {
        let byte = part(&self.bytes, (bit / 8) as usize, 1);
        byte.iter().fold(0, |_, byte| *byte)
    }

    pub fn is_set(&self, bit: u64) -> bool {
        self.byte(bit) >> (bit % 8) & 1 == 1
    }

    pub fn put(&mut self, bit: u64, set: bool) {
        let mask = 1 << (bit % 8);
        for byte in part_mut(&mut self.bytes, (bit / 8) as usize, 1) {
            *byte = if set { *byte | mask } else { *byte & !mask };
        }
    }

    /// The first bit from `at` on that is not set.
    pub fn next_clear(&self, at: u64) -> Option<u64> {
        let mut bit = at;
        while bit < self.len {
            if bit.is_multiple_of(8) && self.byte(bit) == 0xFF {
                bit += 8;
            } else if self.is_set(bit) {
                bit += 1;
            } else {
                return Some(bit);
            }
        }
        None
    }

    /// How many bits from `at` on are not set, counted up to `most`.
    pub fn clear_run(&self, at: u64, most: u64) -> u64 {
        let end = self.len.min(at + most);
        let mut bit = at;
        while bit < end && !self.is_set(bit) {
            let whole = bit.is_multiple_of(8) && self.byte(bit) == 0;
            bit += if whole { 8 } else { 1 };
        }
        bit.min(end) - at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_at_set_bits_at_the_end_and_where_they_are_long_enough() {
        let mut bits = Bits::new(vec![0; 8], 60);
        assert!(bits.is_set(60) && bits.is_set(63) && !bits.is_set(59));
        for bit in (0..17).chain([40]) {
            bits.put(bit, true);
        }
        assert_eq!(bits.next_clear(0), Some(17));
        assert_eq!(bits.clear_run(17, 100), 23);
        assert_eq!(bits.clear_run(17, 5), 5);
        assert_eq!(bits.clear_run(41, 100), 19);
        bits.put(40, false);
        assert_eq!(bits.clear_run(17, 100), 43);
        for bit in 0..60 {
            bits.put(bit, true);
        }
        assert_eq!(bits.next_clear(3), None);
    }
}
