//! Colours: holes nearly white, sealed layers from dark blue to green, the writable layer red.

use super::block_map::BlockMap;
use super::grid::Cell;
use crate::device::{HOLE, ZERO};

/// Red, green, blue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rgb(pub u8, pub u8, pub u8);

/// Layers that have a line of their own in the legend beside the writable one.
const LISTED: usize = 10;

const HOLE_COLOUR: Rgb = Rgb(0xee, 0xee, 0xea);
const ZERO_COLOUR: Rgb = Rgb(0xbd, 0xbd, 0xb8);
const TOP_COLOUR: Rgb = Rgb(0xe0, 0x3b, 0x24);
/// Along these, by the layer's place: told apart also by those who see red and green alike, since
/// they grow lighter.
const SEALED_COLOURS: [Rgb; 5] = [
    Rgb(0x1f, 0x2f, 0x66),
    Rgb(0x2b, 0x6a, 0x99),
    Rgb(0x2f, 0x9c, 0x95),
    Rgb(0x6c, 0xc0, 0x6b),
    Rgb(0xd2, 0xd6, 0x3e),
];

/// A line of the legend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its colour; `None` for layers that are summed up.
    pub colour: Option<Rgb>,
    /// The sign of a picture without colours.
    pub sign: char,
    /// What it is.
    pub name: String,
    /// Blocks that come from it.
    pub blocks: u64,
}

/// The colours of a map.
#[derive(Debug, Clone)]
pub struct Palette {
    sealed: usize,
    top: Option<usize>,
}

impl Palette {
    /// The colours for a map's layers.
    pub fn new(map: &BlockMap) -> Self {
        let top = map.layers.iter().position(|layer| layer.top);
        Palette {
            sealed: map.layers.len() - usize::from(top.is_some()),
            top,
        }
    }

    /// The colour of a source.
    pub fn colour(&self, source: i64) -> Rgb {
        match source {
            HOLE => HOLE_COLOUR,
            ZERO => ZERO_COLOUR,
            number if Some(number as usize) == self.top => TOP_COLOUR,
            number => {
                // The one layer of a simple image is no yellow beside red.
                let last = self.sealed.saturating_sub(1).max(2) as f64;
                along(&SEALED_COLOURS, number as f64 / last)
            }
        }
    }

    /// The sign of a source where there are no colours.
    pub fn sign(&self, source: i64) -> char {
        const SIGNS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";
        match source {
            HOLE => '.',
            ZERO => '-',
            number if Some(number as usize) == self.top => '#',
            number => SIGNS
                .get(number as usize)
                .map_or('+', |&sign| char::from(sign)),
        }
    }

    /// The colour of a cell: its sources' mixed, where what a layer holds outweighs holes and the
    /// writable layer outweighs the others, so that single blocks are seen.
    pub fn mix(&self, cell: &Cell) -> Rgb {
        let mut sum = [0.0; 4];
        for &(source, blocks) in &cell.parts {
            let weight = match source {
                HOLE | ZERO => 1.0,
                number if Some(number as usize) == self.top => 8.0,
                _ => 3.0,
            } * blocks as f64;
            let Rgb(red, green, blue) = self.colour(source);
            for (total, part) in sum.iter_mut().zip([red, green, blue].map(f64::from)) {
                *total += part * weight;
            }
            sum[3] += weight;
        }
        let [red, green, blue, weight] = sum;
        if weight == 0.0 {
            return HOLE_COLOUR;
        }
        Rgb(
            (red / weight) as u8,
            (green / weight) as u8,
            (blue / weight) as u8,
        )
    }

    /// The legend: the writable layer first, then the sealed ones from above, then zeros and
    /// holes. Of many layers those with the most blocks are listed and the rest summed up.
    pub fn legend(&self, map: &BlockMap) -> Vec<Entry> {
        let entry = |source: i64, name: String, blocks: u64| Entry {
            colour: Some(self.colour(source)),
            sign: self.sign(source),
            name,
            blocks,
        };
        let mut listed: Vec<_> = map.layers.iter().filter(|layer| !layer.top).collect();
        listed.sort_by_key(|layer| std::cmp::Reverse(layer.shown_blocks));
        let rest = listed.split_off(listed.len().min(LISTED));
        listed.sort_by_key(|layer| std::cmp::Reverse(layer.number));
        let top = map.layers.iter().filter(|layer| layer.top);
        let mut legend: Vec<Entry> = top
            .map(|layer| {
                let name = "writable layer".to_owned();
                entry(layer.number as i64, name, layer.shown_blocks)
            })
            .collect();
        legend.extend(listed.iter().map(|layer| {
            let name = format!("layer {}: {}", layer.number, layer.origin);
            entry(layer.number as i64, name, layer.shown_blocks)
        }));
        if !rest.is_empty() {
            legend.push(Entry {
                colour: None,
                sign: ' ',
                name: format!("{} further layers", rest.len()),
                blocks: rest.iter().map(|layer| layer.shown_blocks).sum(),
            });
        }
        legend.push(entry(ZERO, "zero".into(), map.zero_blocks));
        legend.push(entry(HOLE, "never written".into(), map.hole_blocks));
        legend.retain(|entry| entry.blocks > 0 || entry.name == "writable layer");
        legend
    }
}

/// The colour at `at` (0 to 1) of the way along `colours`.
#[expect(
    clippy::indexing_slicing,
    reason = "`at` is cut to the way along the colours, of which there are some"
)]
fn along(colours: &[Rgb], at: f64) -> Rgb {
    let place = at.clamp(0.0, 1.0) * (colours.len() - 1) as f64;
    let first = colours[place as usize];
    // Behind the last one there is none.
    let second = colours.get(place as usize + 1).copied().unwrap_or(first);
    let between = |a: u8, b: u8| {
        let part = place.fract();
        (f64::from(a) * (1.0 - part) + f64::from(b) * part) as u8
    };
    Rgb(
        between(first.0, second.0),
        between(first.1, second.1),
        between(first.2, second.2),
    )
}
