//! Charts as SVG, drawn with plotters: rows of marks along an axis, and lines over time.

mod lines;
mod rows;
mod scale;
pub mod theme;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub use lines::{Line, lines};
pub use rows::{Look, Mark, Panel, Row, mark, panel, points, together};
pub use scale::Scale;

/// What charts are drawn on; whole pixels.
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The width of a chart that a phone shows as it is, in pixels.
pub const NARROW: i32 = 360;

/// Draws on a new SVG of this size, which `alt` describes for those who do not see it.
fn drawn(
    (width, height): (i32, i32),
    alt: &str,
    draw_on: impl FnOnce(&Area<'_>) -> Result<()>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let size = (u32::try_from(width)?, u32::try_from(height)?);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        draw_on(&area)?;
        draw(area.present())?;
    }
    Ok(theme::themed(&svg, alt))
}

/// How a text stands at its point.
#[derive(Debug, Clone, Copy)]
enum Align {
    Left,
    Middle,
    Right,
}

/// A text of `size` pixels, its middle at this height.
fn text(
    area: &Area<'_>,
    (x, y): (i32, i32),
    content: &str,
    (size, colour, align): (f64, RGBColor, Align),
) -> Result<()> {
    text_of(
        area,
        (x, y),
        content,
        (size, colour, align),
        FontStyle::Normal,
    )
}

fn text_of(
    area: &Area<'_>,
    at: (i32, i32),
    content: &str,
    (size, colour, align): (f64, RGBColor, Align),
    style: FontStyle,
) -> Result<()> {
    let across = match align {
        Align::Left => HPos::Left,
        Align::Middle => HPos::Center,
        Align::Right => HPos::Right,
    };
    // The backend writes a font's size divided by this.
    let font = FontDesc::new(FontFamily::SansSerif, size * 1.24, style);
    let style = font.color(&colour).pos(Pos::new(across, VPos::Center));
    draw(area.draw(&Text::new(content.to_owned(), at, style)))
}

/// A straight line.
fn stroke(area: &Area<'_>, from: (i32, i32), to: (i32, i32), style: ShapeStyle) -> Result<()> {
    draw(area.draw(&PathElement::new(vec![from, to], style)))
}

/// The errors of drawing hold references; their text does not.
fn draw<T, E: std::error::Error>(result: Result<T, E>) -> Result<T> {
    result.map_err(|error| anyhow!("drawing: {error}"))
}
