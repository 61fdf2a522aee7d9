//! Lines over one axis.

use anyhow::Result;
use plotters::prelude::*;

use super::theme::{GRID, INK, LINES, OWN, SOFT};
use super::{Align, Area, Scale, draw, drawn, stroke, text, text_of};
use crate::report::words::figure;

/// A line of a chart.
#[derive(Debug, Clone)]
pub struct Line {
    /// In the legend.
    pub label: String,
    /// This project's: thicker, and of the same colour in every chart.
    pub own: bool,
    /// Its points.
    pub points: Vec<(f64, f64)>,
}

/// The axes of a chart of lines.
#[derive(Debug, Clone)]
pub struct Axes<'a> {
    /// Above the chart.
    pub title: &'a str,
    /// What goes up.
    pub up: &'a str,
    /// What goes to the right.
    pub across: &'a str,
    /// Marks at the doubles of each other, instead of at equal steps.
    pub doubling: bool,
}

const LEFT: i32 = 52;
const TOP: i32 = 46;
const PLOT: i32 = 190;
const SMALL: f64 = 12.0;

/// Lines in a drawing of this width; empty without two points to draw a line between.
pub fn lines(
    (title, up, across): (&str, &str, &str),
    width: i32,
    lines: &[Line],
) -> Result<String> {
    let axes = Axes {
        title,
        up,
        across,
        doubling: across == "layers",
    };
    let all = || lines.iter().flat_map(|line| line.points.iter().copied());
    let right = all().map(|(x, _)| x).fold(0.0, f64::max);
    let left = all().map(|(x, _)| x).fold(f64::INFINITY, f64::min);
    if right <= left {
        return Ok(String::new());
    }
    let across_scale = if axes.doubling {
        Scale::log(left, right)
    } else {
        Scale::linear(right, if width > 500 { 8 } else { 4 })
    };
    let up_scale = Scale::for_values(all().map(|(_, y)| y));
    let columns = (width - 8) / 118;
    let legend = (lines.len() as i32 + columns - 1) / columns * 20;
    let height = TOP + PLOT + 42 + legend;
    drawn((width, height), axes.title, |area| {
        let plot = Plot {
            area,
            right: width - 10,
            across: across_scale,
            up: up_scale,
        };
        plot.axes(&axes)?;
        for (number, line) in lines.iter().enumerate() {
            let colour = colour(number, line);
            plot.line(line, colour)?;
            let at = i32::try_from(number)?;
            let x = 4 + 118 * (at % columns);
            let y = TOP + PLOT + 50 + 20 * (at / columns);
            stroke(area, (x, y), (x + 18, y), colour.stroke_width(3))?;
            text(area, (x + 23, y), &line.label, (SMALL, INK, Align::Left))?;
        }
        Ok(())
    })
}

fn colour(number: usize, line: &Line) -> RGBColor {
    let colour = LINES.get(number % LINES.len()).copied().unwrap_or(INK);
    if line.own { OWN } else { colour }
}

struct Plot<'a, 'b> {
    area: &'a Area<'b>,
    right: i32,
    across: Scale,
    up: Scale,
}

impl Plot<'_, '_> {
    fn at(&self, (x, y): (f64, f64)) -> (i32, i32) {
        let along = (self.across.at(x) * f64::from(self.right - LEFT)).round() as i32;
        let up = (self.up.at(y).clamp(0.0, 1.0) * f64::from(PLOT)).round() as i32;
        (LEFT + along, TOP + PLOT - up)
    }

    fn axes(&self, axes: &Axes<'_>) -> Result<()> {
        let area = self.area;
        let bold = (13.5, INK, Align::Left);
        text_of(area, (2, 12), axes.title, bold, FontStyle::Bold)?;
        text(area, (2, 30), axes.up, (SMALL, SOFT, Align::Left))?;
        let bottom = TOP + PLOT;
        for &tick in self.up.ticks() {
            let y = bottom - (self.up.at(tick) * f64::from(PLOT)).round() as i32;
            stroke(area, (LEFT, y), (self.right, y), GRID.stroke_width(1))?;
            text(
                area,
                (LEFT - 6, y),
                &figure(tick),
                (SMALL, SOFT, Align::Right),
            )?;
        }
        stroke(
            area,
            (LEFT, bottom),
            (self.right, bottom),
            SOFT.stroke_width(1),
        )?;
        let ticks = self.across.ticks();
        for &tick in ticks {
            let x = LEFT + (self.across.at(tick) * f64::from(self.right - LEFT)).round() as i32;
            if x > self.right + 2 {
                continue;
            }
            stroke(area, (x, bottom), (x, bottom + 4), SOFT.stroke_width(1))?;
            let style = (SMALL, SOFT, Align::Middle);
            text(
                area,
                (x.min(self.right - 6), bottom + 14),
                &figure(tick),
                style,
            )?;
        }
        let style = (SMALL, SOFT, Align::Right);
        text(area, (self.right, bottom + 31), axes.across, style)
    }

    fn line(&self, line: &Line, colour: RGBColor) -> Result<()> {
        let points: Vec<(i32, i32)> = line.points.iter().map(|&point| self.at(point)).collect();
        if points.len() < 20 {
            for &point in &points {
                draw(self.area.draw(&Circle::new(point, 2, colour.filled())))?;
            }
        }
        let style = colour.stroke_width(if line.own { 3 } else { 2 });
        draw(self.area.draw(&PathElement::new(points, style)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_of_nothing_is_empty() {
        assert_eq!(lines(("t", "y", "x"), 360, &[]).unwrap(), "");
        let one = Line {
            label: "a".into(),
            own: false,
            points: vec![(1.0, 1.0)],
        };
        assert_eq!(lines(("t", "y", "x"), 360, &[one]).unwrap(), "");
    }

    #[test]
    fn our_line_has_its_own_colour_wherever_it_stands() {
        let line = |own| Line {
            label: "a".into(),
            own,
            points: vec![(0.0, 1.0), (1.0, 2.0)],
        };
        let svg = lines(("t", "y", "x"), 360, &[line(false), line(true)]).unwrap();
        assert!(svg.contains("s-own") && svg.contains("s-l0"));
    }
}
