//! A piece of a file as a stream.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A piece of a file as a stream.
#[derive(Debug, Clone)]
pub(super) struct Slice {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Slice {
    /// The bytes `at..end` of `file`.
    pub fn new(file: Arc<File>, at: u64, end: u64) -> Slice {
        assert!(at <= end, "a piece that ends before it begins");
        Slice { file, at, end }
    }

    /// Passes over `count` bytes, at most to the end. Returns over how many.
    pub fn skip(&mut self, count: u64) -> u64 {
        let count = count.min(self.end - self.at);
        self.at += count;
        count
    }
}

impl Read for Slice {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = (self.end - self.at).min(into.len() as u64) as usize;
        let (into, _) = into.split_at_mut(most);
        let count = self.file.read_at(into, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}
