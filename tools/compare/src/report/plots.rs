//! Plots as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// A bar with what all its rounds gave.
pub struct Bar<'a> {
    /// Before the bar.
    pub label: &'a str,
    /// Its length.
    pub median: f64,
    /// A dot for each round.
    pub rounds: Vec<f64>,
    /// How it is drawn.
    pub look: Look,
}

/// How a bar is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// The reference.
    Reference,
    /// This project's.
    Own,
    /// Any other.
    Other,
    /// Not comparable: it did not keep what it acknowledged.
    NotComparable,
}

impl Look {
    fn colour(self) -> RGBColor {
        match self {
            Look::Reference => RGBColor(150, 150, 150),
            Look::Own => OWN,
            Look::Other => RGBColor(230, 159, 0),
            Look::NotComparable => RGBColor(235, 215, 215),
        }
    }
}

/// What is this project's.
const OWN: RGBColor = RGBColor(0, 114, 178);
const TEXT: &str = "sans-serif";
const LABELS: i32 = 190;
const ROW: i32 = 24;

/// Bars that lie, one under the other, from zero on.
pub fn bars(unit: &str, bars: &[Bar<'_>]) -> Result<String> {
    let highest = bars
        .iter()
        .flat_map(|bar| bar.rounds.iter().copied())
        .fold(0.0, f64::max);
    if highest <= 0.0 {
        return Ok(String::new());
    }
    let width: i32 = 760;
    let height = ROW * i32::try_from(bars.len())? + 30;
    let mut svg = String::new();
    {
        let root =
            SVGBackend::with_string(&mut svg, (width as u32, height as u32)).into_drawing_area();
        let plot = f64::from(width - LABELS - 90);
        let x = |value: f64| LABELS + (value / highest * plot) as i32;
        let text = |size: i32| (TEXT, size).into_font().color(&BLACK);
        for (number, bar) in bars.iter().enumerate() {
            let top = ROW * i32::try_from(number)? + 4;
            let middle = top + (ROW - 6) / 2;
            let label = text(13).pos(Pos::new(HPos::Right, VPos::Center));
            draw(root.draw(&Text::new(
                bar.label.to_owned(),
                (LABELS - 8, middle),
                label,
            )))?;
            let area = [
                (LABELS, top),
                (x(bar.median).max(LABELS + 1), top + ROW - 6),
            ];
            draw(root.draw(&Rectangle::new(area, bar.look.colour().filled())))?;
            if bar.look == Look::NotComparable {
                draw(root.draw(&Rectangle::new(area, RGBColor(180, 60, 60).stroke_width(1))))?;
            }
            let low = bar.rounds.iter().copied().fold(f64::INFINITY, f64::min);
            let high = bar.rounds.iter().copied().fold(0.0, f64::max);
            let line = vec![(x(low), middle), (x(high), middle)];
            draw(root.draw(&PathElement::new(line, BLACK.stroke_width(1))))?;
            for &value in &bar.rounds {
                draw(root.draw(&Circle::new((x(value), middle), 2, BLACK.filled())))?;
            }
            let after = x(bar.median.max(high)) + 8;
            let style = text(12).pos(Pos::new(HPos::Left, VPos::Center));
            draw(root.draw(&Text::new(short(bar.median), (after, middle), style)))?;
        }
        let bottom = height - 16;
        let axis = vec![(LABELS, bottom - 4), (x(highest), bottom - 4)];
        draw(root.draw(&PathElement::new(
            axis,
            RGBColor(120, 120, 120).stroke_width(1),
        )))?;
        let style = text(12).pos(Pos::new(HPos::Left, VPos::Center));
        draw(root.draw(&Text::new(
            format!("0 – {} {unit}", short(highest)),
            (LABELS, bottom + 6),
            style,
        )))?;
        draw(root.present())?;
    }
    Ok(svg)
}

/// A line of a plot.
pub struct Line<'a> {
    /// In the legend.
    pub label: &'a str,
    /// Its points.
    pub points: Vec<(f64, f64)>,
}

/// What lies along an axis.
#[derive(Clone, Copy)]
pub struct Axis<'a> {
    /// Its name.
    pub label: &'a str,
    /// How its figures are shown.
    pub shown: fn(f64) -> String,
}

/// Lines over one axis; the one of this project is thicker.
pub fn lines(across: Axis<'_>, up: &str, lines: &[Line<'_>], own: &str) -> Result<String> {
    let all = || lines.iter().flat_map(|line| line.points.iter().copied());
    let right = all().map(|(x, _)| x).fold(0.0, f64::max);
    let left = all().map(|(x, _)| x).fold(f64::INFINITY, f64::min);
    let top = all().map(|(_, y)| y).fold(0.0, f64::max);
    if top <= 0.0 || right <= left {
        return Ok(String::new());
    }
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (760, 340)).into_drawing_area();
        let (plot, legend) = root.split_horizontally(590);
        let mut chart = draw(
            ChartBuilder::on(&plot)
                .margin(10)
                .x_label_area_size(40)
                .y_label_area_size(64)
                .build_cartesian_2d(left..right, 0.0..top * 1.05),
        )?;
        draw(
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .x_desc(across.label)
                .y_desc(up)
                .label_style((TEXT, 12))
                .axis_desc_style((TEXT, 13))
                .x_label_formatter(&|x| (across.shown)(*x))
                .y_label_formatter(&|y| short(*y))
                .draw(),
        )?;
        for (number, line) in lines.iter().enumerate() {
            // Ours is the same in every plot, whoever else is there.
            let colour = if line.label == own {
                OWN
            } else {
                let colour = PALETTE.get(number % PALETTE.len());
                colour.copied().unwrap_or(BLACK)
            };
            let style = colour.stroke_width(if line.label == own { 3 } else { 1 });
            draw(chart.draw_series(LineSeries::new(line.points.iter().copied(), style)))?;
            if line.points.len() < 20 {
                let dots = line
                    .points
                    .iter()
                    .map(|&point| Circle::new(point, 3, colour.filled()));
                draw(chart.draw_series(dots))?;
            }
            let at = 24 + 20 * i32::try_from(number)?;
            draw(legend.draw(&PathElement::new(vec![(0, at), (22, at)], style)))?;
            let text = (TEXT, 13).into_font().color(&BLACK);
            let text = text.pos(Pos::new(HPos::Left, VPos::Center));
            draw(legend.draw(&Text::new(line.label.to_owned(), (28, at), text)))?;
        }
        draw(root.present())?;
    }
    Ok(svg)
}

/// Colours that people who see colours differently tell apart (Okabe and Ito).
const PALETTE: [RGBColor; 8] = [
    RGBColor(120, 120, 120),
    RGBColor(180, 180, 180),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(190, 170, 0),
];

/// A figure with three digits.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 1e6 => format!("{:.2} M", value / 1e6),
        size if size >= 10_000.0 => format!("{:.1} k", value / 1e3),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        0.0 => "0".to_owned(),
        size if size < 0.01 => format!("{value:.4}"),
        _ => format!("{value:.2}"),
    }
}

/// The errors of drawing hold references; their text does not.
fn draw<T, E: std::error::Error>(result: Result<T, E>) -> Result<T> {
    result.map_err(|error| anyhow!("drawing: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        let shown = [0.0, 0.0012, 0.123, 4.567, 45.67, 456.7, 45_670.0, 4.5e6].map(short);
        let wanted = [
            "0", "0.0012", "0.12", "4.57", "45.7", "457", "45.7 k", "4.50 M",
        ];
        assert_eq!(shown, wanted);
    }

    #[test]
    fn a_plot_of_nothing_is_empty() {
        assert_eq!(bars("x", &[]).unwrap(), "");
        let axis = Axis {
            label: "x",
            shown: short,
        };
        assert_eq!(lines(axis, "y", &[], "").unwrap(), "");
    }

    #[test]
    fn a_label_cannot_leave_the_text() {
        let bar = Bar {
            label: "<b>&",
            median: 1.0,
            rounds: vec![1.0],
            look: Look::Own,
        };
        let svg = bars("x", &[bar]).unwrap();
        assert!(svg.contains("&lt;b&gt;&amp;"));
    }
}
