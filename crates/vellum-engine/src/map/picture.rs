//! A map as a PNG or SVG file, with a legend.

use std::fmt::Write;

use base64::Engine;
use embedded_graphics::mono_font::iso_8859_1::{FONT_9X18_BOLD, FONT_10X20};

use super::block_map::BlockMap;
use super::canvas::Canvas;
use super::grid::{Grid, Layout};
use super::palette::{Palette, Rgb};
use vellum_base::error::Result;

/// Pixels of the longer side of the map itself, about.
const SIDE: usize = 1024;
/// Cells of a side at most: smaller ones are not seen.
const CELLS: usize = 512;
const MARGIN: usize = 24;
const LINE: usize = 28;
const SWATCH: usize = 18;
const TITLE: usize = 64;
const WHITE: Rgb = Rgb(255, 255, 255);
const BLACK: Rgb = Rgb(0x22, 0x22, 0x22);
const GREY: Rgb = Rgb(0x66, 0x66, 0x66);

/// What is written on a picture.
struct Texts {
    title: String,
    note: String,
    /// Colour, name, size.
    legend: Vec<(Option<Rgb>, String, String)>,
}

fn cells(map: &BlockMap) -> usize {
    let blocks = (map.virtual_size / map.block_size).max(1);
    // No more cells than blocks, but for very small devices.
    let side = ((blocks as f64).sqrt() as usize).next_power_of_two();
    side.clamp(16, CELLS)
}

fn texts(map: &BlockMap, palette: &Palette, grid: &Grid, layout: Layout) -> Texts {
    let all = (map.virtual_size / map.block_size).max(1);
    let order = match layout {
        Layout::Hilbert => "along a Hilbert curve, upper left to upper right",
        Layout::Rows => "row by row",
    };
    let cell = if grid.blocks_per_cell >= 1.5 {
        format!(
            "a cell is {}",
            binary(grid.blocks_per_cell * map.block_size as f64)
        )
    } else {
        "a cell is one block or less".into()
    };
    let legend = palette.legend(map).into_iter().map(|entry| {
        let bytes = binary((entry.blocks * map.block_size) as f64);
        let percent = entry.blocks as f64 * 100.0 / all as f64;
        (entry.colour, entry.name, format!("{bytes}  {percent:.2} %"))
    });
    Texts {
        title: format!("{}: where its blocks come from", map.name),
        note: format!(
            "{} of 4 KiB blocks, {order}; {cell}",
            binary(map.virtual_size as f64)
        ),
        legend: legend.collect(),
    }
}

/// Bytes for people, in powers of 1024: devices have such sizes.
#[expect(clippy::indexing_slicing, reason = "the loop ends with the last unit")]
fn binary(bytes: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS[unit];
    if value.fract() < 0.005 || value >= 100.0 {
        format!("{value:.0} {name}")
    } else {
        format!("{value:.1} {name}")
    }
}

fn draw_cells(
    canvas: &mut Canvas,
    x: usize,
    y: usize,
    scale: usize,
    grid: &Grid,
    colours: &Palette,
) {
    for (at, cell) in grid.cells.iter().enumerate() {
        let (column, row) = (at % grid.width, at / grid.width);
        let (left, top) = (x + column * scale, y + row * scale);
        canvas.fill(left, top, scale, scale, colours.mix(cell));
    }
}

/// Shortens a text to so many characters.
fn fitted(text: &str, chars: usize) -> String {
    if text.chars().count() <= chars {
        return text.to_owned();
    }
    let kept: String = text.chars().take(chars.saturating_sub(3)).collect();
    format!("{kept}...")
}

/// The map as a PNG file: title, cells, legend.
///
/// # Errors
/// None for a map of any container; as the encoder has them.
pub fn png(map: &BlockMap, layout: Layout) -> Result<Vec<u8>> {
    let side = cells(map);
    let grid = Grid::new(map, layout, side, side);
    let palette = Palette::new(map);
    let texts = texts(map, &palette, &grid, layout);
    let scale = (SIDE / grid.width).max(1);
    let (width, height) = (grid.width * scale, grid.height * scale);
    let below = MARGIN / 2 + texts.legend.len() * LINE + MARGIN;
    let mut canvas = Canvas::new(width + 2 * MARGIN, TITLE + height + below + MARGIN, WHITE);
    // Ten pixels a character.
    let chars = width / 10;
    let title = fitted(&texts.title, chars);
    canvas.text(MARGIN, 14, &FONT_10X20, BLACK, &title);
    canvas.text(
        MARGIN,
        37,
        &FONT_9X18_BOLD,
        GREY,
        &fitted(&texts.note, width / 9),
    );
    draw_cells(&mut canvas, MARGIN, TITLE, scale, &grid, &palette);
    let mut y = TITLE + height + MARGIN / 2 + 6;
    for (colour, name, size) in &texts.legend {
        if let Some(colour) = colour {
            canvas.fill(MARGIN, y, SWATCH, SWATCH, GREY);
            canvas.fill(MARGIN + 1, y + 1, SWATCH - 2, SWATCH - 2, *colour);
        }
        let room = chars.saturating_sub(size.chars().count() + 6);
        let x = MARGIN + SWATCH + 12;
        canvas.text(x, y - 1, &FONT_10X20, BLACK, &fitted(name, room));
        let right = MARGIN + width - size.chars().count() * 10;
        canvas.text(right, y - 1, &FONT_10X20, GREY, size);
        y += LINE;
    }
    canvas.encode()
}

/// The map as an SVG file: title and legend as text, the cells as an image within.
///
/// # Errors
/// As [`png()`].
pub fn svg(map: &BlockMap, layout: Layout) -> Result<String> {
    let side = cells(map);
    let grid = Grid::new(map, layout, side, side);
    let palette = Palette::new(map);
    let texts = texts(map, &palette, &grid, layout);
    let mut canvas = Canvas::new(grid.width, grid.height, WHITE);
    draw_cells(&mut canvas, 0, 0, 1, &grid, &palette);
    let image = base64::engine::general_purpose::STANDARD.encode(canvas.encode()?);
    let (width, height) = (SIDE, SIDE * grid.height / grid.width);
    let total = TITLE + height + MARGIN / 2 + texts.legend.len() * LINE + 2 * MARGIN;
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {total}\" \
         font-family=\"sans-serif\" font-size=\"18\">\n\
         <title>{title}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{MARGIN}\" y=\"30\" font-size=\"22\" fill=\"#222\">{title}</text>\n\
         <text x=\"{MARGIN}\" y=\"52\" font-size=\"16\" fill=\"#666\">{}</text>\n\
         <image x=\"{MARGIN}\" y=\"{TITLE}\" width=\"{width}\" height=\"{height}\" \
         style=\"image-rendering:pixelated\" href=\"data:image/png;base64,{image}\"/>\n",
        width + 2 * MARGIN,
        escaped(&texts.note),
        title = escaped(&texts.title),
    );
    let mut y = TITLE + height + MARGIN / 2 + 6;
    for (colour, name, size) in &texts.legend {
        if let Some(Rgb(red, green, blue)) = colour {
            let _ = writeln!(
                out,
                "<rect x=\"{MARGIN}\" y=\"{y}\" width=\"{SWATCH}\" height=\"{SWATCH}\" \
                 fill=\"#{red:02x}{green:02x}{blue:02x}\" stroke=\"#666\"/>"
            );
        }
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{base}\" fill=\"#222\">{}</text>\
             <text x=\"{}\" y=\"{base}\" fill=\"#666\" text-anchor=\"end\">{}</text>",
            MARGIN + SWATCH + 12,
            escaped(&fitted(name, 76)),
            MARGIN + width,
            escaped(size),
            base = y + 15,
        );
        y += LINE;
    }
    out.push_str("</svg>\n");
    Ok(out)
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push('?'),
            c => out.push(c),
        }
    }
    out
}
