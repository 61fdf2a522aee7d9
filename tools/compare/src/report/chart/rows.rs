//! Rows of marks along one axis: a row for each driver.

use anyhow::Result;
use plotters::prelude::*;

use super::theme::{BAD, BAND, GRID, INK, OTHER, OWN, PAPER, SOFT};
use super::{Align, Area, NARROW, Scale, draw, drawn, stroke, text, text_of};

/// How a row is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// This project's.
    Own,
    /// Any other.
    Other,
    /// Crossed out: it did not keep what it acknowledged.
    NotComparable,
}

/// A figure with what is known of it.
#[derive(Debug, Clone)]
pub struct Mark {
    /// The figure.
    pub at: f64,
    /// Its confidence interval, as a bar.
    pub interval: Option<[f64; 2]>,
    /// Its single rounds, as points.
    pub points: Vec<f64>,
    /// As a ring instead of a dot: of the first touch.
    pub hollow: bool,
    /// Beside the row, in the column of that number.
    pub shown: (usize, String),
}

/// A row.
#[derive(Debug, Clone)]
pub struct Row {
    /// Before it.
    pub label: String,
    /// How it is drawn.
    pub look: Look,
    /// Its figures.
    pub marks: Vec<Mark>,
    /// Instead of figures: why there are none.
    pub note: Option<String>,
}

/// A chart of rows.
#[derive(Debug, Clone)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// What its figures are.
    pub unit: String,
    /// Along it.
    pub scale: Scale,
    /// A line to compare with.
    pub line: Option<f64>,
    /// What lies within is noise.
    pub band: Option<[f64; 2]>,
    /// Heads of the columns of figures, from the left.
    pub columns: Vec<String>,
    /// Its rows.
    pub rows: Vec<Row>,
}

impl Panel {
    /// One of medians beside their single rounds, with nothing to compare with.
    pub fn of_medians(title: String, unit: String, rows: Vec<Row>) -> Self {
        Panel {
            title,
            unit,
            scale: Scale::for_values(points(&rows)),
            line: None,
            band: None,
            columns: vec!["median".to_owned()],
            rows,
        }
    }
}

/// The single rounds of all rows.
pub fn points(rows: &[Row]) -> impl Iterator<Item = f64> {
    let marks = rows.iter().flat_map(|row| &row.marks);
    marks.flat_map(|mark| mark.points.iter().copied())
}

const LEFT: i32 = 112;
const COLUMN: i32 = 50;
const ROW: i32 = 21;
const TOP: i32 = 56;
const BELOW: i32 = 30;
/// Of all text but titles, in pixels.
const SMALL: f64 = 12.0;

impl Panel {
    fn height(&self) -> i32 {
        TOP + ROW * self.rows.len() as i32 + BELOW
    }

    /// Where the axis ends.
    fn right(&self) -> i32 {
        NARROW - 8 - COLUMN * self.columns.len() as i32
    }

    fn x(&self, value: f64) -> i32 {
        let at = self.scale.at(value).clamp(0.0, 1.0);
        LEFT + (at * f64::from(self.right() - LEFT)).round() as i32
    }

    fn draw(&self, area: &Area<'_>) -> Result<()> {
        let bold = (13.5, INK, Align::Left);
        text_of(area, (2, 12), &self.title, bold, FontStyle::Bold)?;
        text(area, (2, 30), &self.unit, (SMALL, SOFT, Align::Left))?;
        self.behind(area)?;
        for (number, head) in self.columns.iter().enumerate() {
            text(
                area,
                (self.column(number), 46),
                head,
                (SMALL, SOFT, Align::Right),
            )?;
        }
        for (number, row) in self.rows.iter().enumerate() {
            let y = TOP + ROW * i32::try_from(number)? + ROW / 2;
            self.row(area, row, y)?;
        }
        Ok(())
    }

    fn column(&self, number: usize) -> i32 {
        self.right() + 6 + COLUMN * (number as i32 + 1)
    }

    /// The band, the axis, its marks.
    fn behind(&self, area: &Area<'_>) -> Result<()> {
        let bottom = TOP + ROW * self.rows.len() as i32;
        if let Some([low, high]) = self.band {
            let corners = [(self.x(low), TOP), (self.x(high), bottom)];
            draw(area.draw(&Rectangle::new(corners, BAND.filled())))?;
        }
        for &tick in self.scale.ticks() {
            let x = self.x(tick);
            stroke(area, (x, TOP), (x, bottom), GRID.stroke_width(1))?;
            let at = (x, bottom + 14);
            text(area, at, &tick_label(tick), (SMALL, SOFT, Align::Middle))?;
        }
        if let Some(line) = self.line {
            let x = self.x(line);
            stroke(area, (x, TOP - 4), (x, bottom + 4), INK.stroke_width(1))?;
        }
        stroke(
            area,
            (LEFT, bottom),
            (self.right(), bottom),
            SOFT.stroke_width(1),
        )
    }

    fn row(&self, area: &Area<'_>, row: &Row, y: i32) -> Result<()> {
        let colour = match row.look {
            Look::Own => OWN,
            Look::Other => OTHER,
            Look::NotComparable => BAD,
        };
        let label = (SMALL, colour, Align::Right);
        let style = match row.look {
            Look::Own => FontStyle::Bold,
            _ => FontStyle::Normal,
        };
        text_of(area, (LEFT - 8, y), &row.label, label, style)?;
        if row.look == Look::NotComparable {
            // Some six and a half pixels a character.
            let width = (row.label.chars().count() as i32 * 13 / 2).min(LEFT - 10);
            stroke(
                area,
                (LEFT - 8 - width, y),
                (LEFT - 8, y),
                BAD.stroke_width(1),
            )?;
        }
        if let Some(note) = &row.note {
            let at = (LEFT + 4, y);
            return text(area, at, note, (SMALL, colour, Align::Left));
        }
        for mark in &row.marks {
            self.mark(area, mark, y, colour)?;
            let (column, shown) = &mark.shown;
            let at = (self.column(*column), y);
            text(area, at, shown, (SMALL, colour, Align::Right))?;
        }
        Ok(())
    }

    fn mark(&self, area: &Area<'_>, mark: &Mark, y: i32, colour: RGBColor) -> Result<()> {
        if let Some([low, high]) = mark.interval {
            let (from, to) = (self.x(low), self.x(high));
            stroke(area, (from, y), (to, y), colour.stroke_width(2))?;
            // What goes on beyond the axis does not end there.
            let ends = [low, high].into_iter().filter(|end| self.holds(*end));
            for x in ends.map(|end| self.x(end)) {
                stroke(area, (x, y - 3), (x, y + 3), colour.stroke_width(1))?;
            }
        }
        // Of fewer rounds than have an interval there are points, and no more.
        let alone = mark.interval.is_none() && mark.points.len() < crate::stats::FEWEST;
        for &point in &mark.points {
            self.point(
                area,
                (point, y),
                if alone { 4 } else { 2 },
                mark.hollow,
                colour,
            )?;
        }
        if alone {
            return Ok(());
        }
        self.point(area, (mark.at, y), 5, mark.hollow, colour)
    }

    /// Whether a value lies on the axis.
    fn holds(&self, value: f64) -> bool {
        (0.0..=1.0).contains(&self.scale.at(value))
    }

    /// A ring or a dot; beyond the axis an arrow that points there.
    fn point(
        &self,
        area: &Area<'_>,
        (value, y): (f64, i32),
        size: i32,
        hollow: bool,
        colour: RGBColor,
    ) -> Result<()> {
        let x = self.x(value);
        if self.holds(value) {
            return ring_or_dot(area, (x, y), size, hollow, colour);
        }
        let way = if self.scale.at(value) < 0.0 { -1 } else { 1 };
        let arrow = vec![(x, y), (x - 8 * way, y - 5), (x - 8 * way, y + 5)];
        draw(area.draw(&Polygon::new(arrow, colour.filled())))
    }
}

fn ring_or_dot(
    area: &Area<'_>,
    at: (i32, i32),
    size: i32,
    hollow: bool,
    colour: RGBColor,
) -> Result<()> {
    if hollow {
        draw(area.draw(&Circle::new(at, size, PAPER.filled())))?;
        return draw(area.draw(&Circle::new(at, size, colour.stroke_width(2))));
    }
    draw(area.draw(&Circle::new(at, size, colour.filled())))
}

fn tick_label(tick: f64) -> String {
    crate::report::words::figure(tick)
}

/// One chart, as wide as a phone.
pub fn panel(panel: &Panel) -> Result<String> {
    let size = (NARROW, panel.height());
    drawn(size, &panel.title, |area| panel.draw(area))
}

/// Several charts in one drawing, with a line of text above and some below.
pub fn together(panels: &[Panel], across: usize, title: &str, notes: &[&str]) -> Result<String> {
    const GAP: i32 = 24;
    let rows: Vec<&[Panel]> = panels.chunks(across.max(1)).collect();
    let heights: Vec<i32> = rows
        .iter()
        .map(|row| row.iter().map(Panel::height).max().unwrap_or(0))
        .collect();
    let width = across as i32 * (NARROW + GAP) + GAP;
    let head = 44;
    let foot = 20 * notes.len() as i32 + 12;
    let height = head + heights.iter().sum::<i32>() + 16 * rows.len() as i32 + foot;
    drawn((width, height), title, |area| {
        let bold = (16.0, INK, Align::Left);
        text_of(area, (GAP, 22), title, bold, FontStyle::Bold)?;
        let mut top = head;
        for (row, tall) in rows.iter().zip(&heights) {
            for (number, panel) in row.iter().enumerate() {
                let left = GAP + (NARROW + GAP) * i32::try_from(number)?;
                let place = area
                    .clone()
                    .shrink((left, top), (u32::try_from(NARROW)?, u32::try_from(*tall)?));
                panel.draw(&place)?;
            }
            top += tall + 16;
        }
        for (number, note) in notes.iter().enumerate() {
            let at = (GAP, top + 10 + 20 * i32::try_from(number)?);
            text(area, at, note, (SMALL, SOFT, Align::Left))?;
        }
        Ok(())
    })
}

/// A mark in the running text, for legends.
pub fn mark(hollow: bool) -> Result<String> {
    let alt = if hollow { "ring" } else { "dot" };
    drawn((14, 14), alt, |area| {
        ring_or_dot(area, (7, 7), 5, hollow, OTHER)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(at: f64, points: Vec<f64>, interval: Option<[f64; 2]>, look: Look) -> Panel {
        Panel {
            title: "<b>&".into(),
            unit: "×".into(),
            scale: Scale::log(0.1, 10.0),
            line: Some(1.0),
            band: None,
            columns: vec!["then".into()],
            rows: vec![Row {
                label: "driver".into(),
                look,
                marks: vec![Mark {
                    at,
                    interval,
                    points,
                    hollow: false,
                    shown: (0, "2.0".into()),
                }],
                note: None,
            }],
        }
    }

    #[test]
    fn a_single_round_is_a_point_and_three_have_a_bar() {
        let circles = |panel: &Panel| super::panel(panel).unwrap().matches("<circle").count();
        assert_eq!(circles(&one(2.0, vec![2.0], None, Look::Other)), 1);
        let lines = |panel: &Panel| {
            super::panel(panel).unwrap().matches("polyline").count()
                + super::panel(panel).unwrap().matches("<line").count()
        };
        let three = one(2.0, Vec::new(), Some([1.5, 2.5]), Look::Other);
        assert_eq!(
            lines(&three),
            lines(&one(2.0, vec![2.0], None, Look::Other)) + 3
        );
    }

    #[test]
    fn what_is_beyond_the_axis_is_an_arrow_with_its_figure() {
        let svg = panel(&one(100.0, Vec::new(), Some([90.0, 110.0]), Look::Own)).unwrap();
        assert!(svg.contains("<polygon") && svg.contains("2.0"));
    }

    #[test]
    fn a_title_cannot_leave_the_text() {
        let svg = panel(&one(1.0, vec![1.0], None, Look::Own)).unwrap();
        assert!(svg.contains("&lt;b&gt;&amp;") && !svg.contains("<b>"));
    }

    #[test]
    fn labels_have_twelve_pixels_or_more() {
        let svg = panel(&one(1.0, vec![1.0], None, Look::Own)).unwrap();
        for size in svg.split("font-size=\"").skip(1) {
            let size: f64 = size.split('"').next().unwrap().parse().unwrap();
            assert!(size >= 11.99, "{size}");
        }
    }

    #[test]
    fn several_charts_lie_in_one_drawing() {
        let two = [
            one(1.0, vec![1.0], None, Look::Own),
            one(1.0, vec![1.0], None, Look::Other),
        ];
        let svg = together(&two, 2, "all", &["note"]).unwrap();
        assert_eq!(svg.matches("<svg").count(), 1);
        assert!(svg.contains("note"));
    }
}
