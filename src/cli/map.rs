//! `vellum map NAME`

use std::io::{IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use console::Term;

use super::Context;
use super::output::human_size;
use vellum_base::error::{Result, ResultExt};
use vellum_base::inherit::result_mode;
use vellum_engine::map::{BlockMap, Grid, Layout, Palette, Rgb, map, png, svg};

/// Arguments of `map`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A container, image or snapshot (C@NAME)
    #[arg(add = super::completions::containers_and_images())]
    name: String,
    /// Write a picture to this PNG file
    #[arg(long, value_name = "FILE")]
    png: Option<PathBuf>,
    /// Write a picture to this SVG file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// The order of the blocks: along a Hilbert curve, which keeps neighbours together, or in rows
    #[arg(long, value_enum, default_value_t = Order::Hilbert)]
    order: Order,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Order {
    Hilbert,
    Rows,
}

impl From<Order> for Layout {
    fn from(order: Order) -> Self {
        match order {
            Order::Hilbert => Layout::Hilbert,
            Order::Rows => Layout::Rows,
        }
    }
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let map = map(&store, &args.name)?;
    let layout = args.order.into();
    if let Some(path) = &args.png {
        write(path, &png(&map, layout)?)?;
    }
    if let Some(path) = &args.svg {
        write(path, svg(&map, layout)?.as_bytes())?;
    }
    if context.out.json {
        return context.out.print_line(&map);
    }
    for path in [&args.png, &args.svg].into_iter().flatten() {
        context.out.note(&format!("wrote {}", path.display()));
    }
    if args.png.is_some() || args.svg.is_some() {
        return Ok(());
    }
    let term = Term::stdout();
    let colours = std::io::stdout().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
    let (rows, columns) = term.size_checked().unwrap_or((48, 80));
    context.out.print(&map, |map| {
        if colours {
            coloured(map, layout, usize::from(columns), usize::from(rows))
        } else {
            plain(map, usize::from(columns))
        }
    })
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(result_mode())
        .open(path)
        .and_then(|mut file| file.write_all(bytes))
        .context(|| format!("cannot write {}", path.display()))
}

/// Two cells a character, one above the other, in 24-bit colours.
fn coloured(map: &BlockMap, layout: Layout, columns: usize, rows: usize) -> String {
    let palette = Palette::new(map);
    let (width, height) = match layout {
        Layout::Hilbert => {
            // As large as fits the width, and not much longer than the screen.
            let side = columns.min(rows * 3).clamp(16, 256);
            (side, side)
        }
        Layout::Rows => (columns.clamp(16, 256), rows.clamp(16, 64)),
    };
    let grid = Grid::new(map, layout, width, height);
    let mut out = String::new();
    let mut lines = grid.cells.chunks(grid.width);
    while let Some(upper) = lines.next() {
        let lower = lines.next().unwrap_or_default();
        let mut last = (None, None);
        for (at, cell) in upper.iter().enumerate() {
            let colours = (
                Some(palette.mix(cell)),
                lower.get(at).map(|cell| palette.mix(cell)),
            );
            for (code, colour, before) in [(38, colours.0, last.0), (48, colours.1, last.1)] {
                if let Some(Rgb(red, green, blue)) = colour.filter(|_| colour != before) {
                    out.push_str(&format!("\x1b[{code};2;{red};{green};{blue}m"));
                }
            }
            last = colours;
            out.push('▀');
        }
        out.push_str("\x1b[0m\n");
    }
    for entry in palette.legend(map) {
        let swatch = match entry.colour {
            Some(Rgb(red, green, blue)) => format!("\x1b[38;2;{red};{green};{blue}m██\x1b[0m"),
            None => "  ".into(),
        };
        out.push_str(&legend_line(&swatch, &entry.name, entry.blocks, map));
    }
    out
}

/// A sign a cell, row by row, with the place on the device in front: for pipes, logs and NO_COLOR.
fn plain(map: &BlockMap, columns: usize) -> String {
    let palette = Palette::new(map);
    let width = if columns >= 140 { 128 } else { 64 };
    let grid = Grid::new(map, Layout::Rows, width, 32);
    let mut out = String::new();
    for (row, cells) in grid.cells.chunks(grid.width).enumerate() {
        let offset = map.virtual_size / grid.height as u64 * row as u64;
        let signs: String = cells
            .iter()
            .map(|cell| palette.sign(cell.highest()))
            .collect();
        out.push_str(&format!("{:>8}  {signs}\n", human_size(offset)));
    }
    for entry in palette.legend(map) {
        let sign = entry.sign.to_string();
        out.push_str(&legend_line(
            &format!("{:>8}", sign),
            &entry.name,
            entry.blocks,
            map,
        ));
    }
    out
}

fn legend_line(sign: &str, name: &str, blocks: u64, map: &BlockMap) -> String {
    let all = (map.virtual_size / map.block_size).max(1);
    let name = name.replace(char::is_control, "?");
    format!(
        "{sign}  {name}: {} ({:.2} %)\n",
        human_size(blocks * map.block_size),
        blocks as f64 * 100.0 / all as f64
    )
}
