//! The tables of docs/format.md, read as programs read them.

use std::ops::Range;
use std::path::Path;

/// A row whose place is fixed or, with `…` and formulas, not.
#[derive(Debug)]
pub struct Row {
    offset: Option<usize>,
    size: Option<usize>,
    /// What the page says of it.
    pub field: String,
}

impl Row {
    /// Its place within the structure; the row must have a fixed one.
    pub fn range(&self) -> Range<usize> {
        let (Some(offset), Some(size)) = (self.offset, self.size) else {
            panic!("no fixed place: {self:?}");
        };
        offset..offset + size
    }

    /// Its bytes, where its place is fixed.
    pub fn bytes<'a>(&self, structure: &'a [u8]) -> Option<&'a [u8]> {
        let (offset, size) = (self.offset?, self.size?);
        Some(&structure[offset..offset + size])
    }

    /// Its bytes as a little-endian number.
    pub fn number(&self, structure: &[u8]) -> Option<u64> {
        let bytes = self.bytes(structure)?;
        let mut whole = [0; 8];
        whole.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(u64::from_le_bytes(whole))
    }
}

/// One structure.
#[derive(Debug)]
pub struct Table {
    name: String,
    pub rows: Vec<Row>,
}

impl Table {
    /// The row that begins with `name`.
    pub fn row(&self, name: &str) -> &Row {
        let mut found = self.rows.iter().filter(|row| row.field.starts_with(name));
        match (found.next(), found.next()) {
            (Some(row), None) => row,
            other => panic!("{}: rows {name:?}: {other:?}", self.name),
        }
    }

    /// No two rows of fixed places overlap, and they are in order.
    pub fn assert_in_order(&self) {
        let mut end = 0;
        for row in &self.rows {
            if row.offset.is_some() && row.size.is_some() {
                let range = row.range();
                assert!(
                    range.start >= end,
                    "{}: {row:?} begins before {end}",
                    self.name
                );
                end = range.end;
            }
        }
        assert!(end > 0, "{}: no row has a fixed place", self.name);
    }
}

/// The first table of offsets below the heading that begins so.
pub fn section(heading: &str) -> Table {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/format.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let mut lines = page.lines().skip_while(|line| !line.starts_with(heading));
    assert!(lines.next().is_some(), "no heading {heading}");
    let rows = lines
        .skip_while(|line| !line.starts_with("| offset"))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let mut cells = line.trim_matches('|').split('|').map(str::trim);
            let mut cell = || cells.next().unwrap_or_default().to_owned();
            let (offset, size, field) = (cell(), cell(), cell());
            Row {
                offset: offset.parse().ok(),
                size: size.parse().ok(),
                field,
            }
        })
        .collect();
    Table {
        name: heading.to_owned(),
        rows,
    }
}

/// The number of a row such as "version, 1" that names one alone.
pub fn number_of(field: &str) -> Option<u64> {
    field
        .rsplit_once(", ")
        .and_then(|(_, number)| number.parse().ok())
}
