//! Blocks laid out on a grid of cells.

use super::block_map::BlockMap;
use crate::device::{HOLE, ZERO};

/// The order in which blocks fill the grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// Along a Hilbert curve, from the upper left to the upper right corner: what is near on the
    /// device is near on the picture.
    #[default]
    Hilbert,
    /// Row by row, as text is read.
    Rows,
}

/// What the blocks of one cell are, by their sources.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cell {
    /// (source as in [`BlockMap::runs`], blocks), in no order.
    pub parts: Vec<(i64, u64)>,
}

impl Cell {
    fn add(&mut self, source: i64, blocks: u64) {
        match self.parts.iter_mut().find(|(of, _)| *of == source) {
            Some((_, count)) => *count += blocks,
            None => self.parts.push((source, blocks)),
        }
    }

    /// The highest layer of the cell, or zero, or a hole: what a cell of one sign shows.
    pub fn highest(&self) -> i64 {
        let highest = self.parts.iter().map(|(source, _)| *source).max();
        match highest {
            // Zero is more than a hole.
            Some(HOLE) if self.parts.iter().any(|(source, _)| *source == ZERO) => ZERO,
            Some(source) => source,
            None => HOLE,
        }
    }
}

/// A map as cells.
#[derive(Debug, Clone)]
pub struct Grid {
    /// Cells in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Blocks of a cell, on average.
    pub blocks_per_cell: f64,
    /// Row by row.
    pub cells: Vec<Cell>,
}

impl Grid {
    /// Lays a map out on a grid of `width` × `height` cells, at most 4096 each; for a Hilbert
    /// curve the smaller of both, as a power of two, counts in both directions.
    #[expect(
        clippy::indexing_slicing,
        reason = "both orders have a place for each cell"
    )]
    pub fn new(map: &BlockMap, layout: Layout, width: usize, height: usize) -> Self {
        let (mut width, mut height) = (width.clamp(1, 4096), height.clamp(1, 4096));
        let mut order = 0;
        if layout == Layout::Hilbert {
            order = width.min(height).ilog2() as u8;
            width = 1 << order;
            height = width;
        }
        let blocks = (map.virtual_size / map.block_size).max(1);
        let mut cells = vec![Cell::default(); width * height];
        let count = cells.len() as u64;
        // The cell that block b lies in is b * count / blocks: no cell is more than one block larger.
        let mut at = 0u64;
        for &(len, source) in &map.runs {
            let end = (at + len).min(blocks);
            while at < end {
                let cell = scale(at, count, blocks);
                // The first block of the next cell.
                let next = div_ceil(cell + 1, blocks, count).min(end).max(at + 1);
                cells[place(cell, layout, order, width)].add(source, next - at);
                at = next;
            }
        }
        // A device of fewer blocks than cells: a cell shows the block that it is a part of.
        if blocks < count {
            fill_between(&mut cells, layout, order, width, blocks);
        }
        Grid {
            width,
            height,
            blocks_per_cell: blocks as f64 / count as f64,
            cells,
        }
    }
}

/// Where a cell lies among those of the grid, row by row.
fn place(cell: u64, layout: Layout, order: u8, width: usize) -> usize {
    match layout {
        Layout::Rows => cell as usize,
        Layout::Hilbert => {
            let (x, y) = fast_hilbert::h2xy::<u32>(cell, order.max(1));
            y as usize * width + x as usize
        }
    }
}

/// a · b / c without overflow.
fn scale(a: u64, b: u64, c: u64) -> u64 {
    (u128::from(a) * u128::from(b) / u128::from(c.max(1))) as u64
}

/// ⌈a · b / c⌉ without overflow.
fn div_ceil(a: u64, b: u64, c: u64) -> u64 {
    (u128::from(a) * u128::from(b)).div_ceil(u128::from(c.max(1))) as u64
}

#[expect(
    clippy::indexing_slicing,
    reason = "both orders have a place for each cell; `first` is a cell that is not after `cell`"
)]
fn fill_between(cells: &mut [Cell], layout: Layout, order: u8, width: usize, blocks: u64) {
    let count = cells.len() as u64;
    let place = |cell| place(cell, layout, order, width);
    for cell in 0..count {
        let first = scale(scale(cell, blocks, count), count, blocks);
        if cells[place(cell)].parts.is_empty() {
            cells[place(cell)] = cells[place(first)].clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(blocks: u64, runs: &[(u64, i64)]) -> BlockMap {
        BlockMap {
            schema: 1,
            name: String::new(),
            virtual_size: blocks * 4096,
            block_size: 4096,
            layers: Vec::new(),
            hole_blocks: 0,
            zero_blocks: 0,
            runs: runs.to_vec(),
        }
    }

    #[test]
    fn every_block_lies_in_one_cell_whatever_the_sizes() {
        for layout in [Layout::Hilbert, Layout::Rows] {
            for blocks in [1u64, 5, 1000, 4096, 1 << 20, 2_621_440, 12_345_678] {
                let runs = [
                    (blocks / 3, 0),
                    (blocks / 3, 2),
                    (blocks - blocks / 3 * 2, HOLE),
                ];
                let grid = Grid::new(&map(blocks, &runs), layout, 64, 70);
                assert!(grid.cells.iter().all(|cell| !cell.parts.is_empty()));
                if blocks >= grid.cells.len() as u64 {
                    for (len, source) in runs {
                        let parts = grid.cells.iter().flat_map(|cell| &cell.parts);
                        let of_it = parts.filter(|(of, _)| *of == source);
                        assert_eq!(of_it.map(|(_, n)| n).sum::<u64>(), len, "{blocks}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_are_in_the_order_of_the_device_and_neighbours_on_the_curve_touch() {
        let runs: Vec<(u64, i64)> = (0..64).map(|number| (1, number)).collect();
        let rows = Grid::new(&map(64, &runs), Layout::Rows, 8, 8);
        let order: Vec<i64> = rows.cells.iter().map(Cell::highest).collect();
        assert_eq!(order, (0..64).collect::<Vec<_>>());
        let curve = Grid::new(&map(64, &runs), Layout::Hilbert, 8, 8);
        let place = |number: i64| {
            let at = curve.cells.iter().position(|c| c.highest() == number);
            let at = at.unwrap();
            (at % 8, at / 8)
        };
        assert_eq!(place(0), (0, 0));
        for number in 1..64 {
            let ((a, b), (c, d)) = (place(number - 1), place(number));
            assert_eq!(a.abs_diff(c) + b.abs_diff(d), 1, "{number}");
        }
    }

    #[test]
    fn a_cell_of_several_sources_shows_the_highest() {
        let mut cell = Cell::default();
        cell.add(HOLE, 7);
        assert_eq!(cell.highest(), HOLE);
        cell.add(ZERO, 1);
        assert_eq!(cell.highest(), ZERO);
        cell.add(3, 1);
        cell.add(0, 5);
        assert_eq!(cell.highest(), 3);
    }
}
