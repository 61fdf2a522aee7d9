//! The colours of charts, on light and on dark paper.

use std::fmt::Write as _;

use plotters::style::RGBColor;

/// A colour by its name in [`style`], with that for dark paper.
const COLOURS: [(&str, RGBColor, &str); 16] = [
    ("ink", INK, "#e6e6e6"),
    ("soft", SOFT, "#a6a6a6"),
    ("grid", GRID, "#3c3c3c"),
    ("band", BAND, "#333a40"),
    ("paper", PAPER, "#161616"),
    ("own", OWN, "#56b4e9"),
    ("other", OTHER, "#c9c9c9"),
    ("bad", BAD, "#ff8a80"),
    ("l0", LINES[0], "#b5b5b5"),
    ("l1", LINES[1], "#f0b93a"),
    ("l2", LINES[2], "#2fc79a"),
    ("l3", LINES[3], "#e39cc6"),
    ("l4", LINES[4], "#ff8f4d"),
    ("l5", LINES[5], "#b79cff"),
    ("l6", LINES[6], "#4fd0e0"),
    ("l7", LINES[7], "#d8b070"),
];

/// Text and axes.
pub const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
/// What matters less.
pub const SOFT: RGBColor = RGBColor(0x5f, 0x5f, 0x5f);
/// Lines behind the marks.
pub const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
/// What lies within is noise.
pub const BAND: RGBColor = RGBColor(0xe9, 0xee, 0xf2);
/// Behind everything.
pub const PAPER: RGBColor = RGBColor(0xff, 0xff, 0xff);
/// This project's.
pub const OWN: RGBColor = RGBColor(0x00, 0x72, 0xb2);
/// Any other.
pub const OTHER: RGBColor = RGBColor(0x44, 0x44, 0x44);
/// Not comparable.
pub const BAD: RGBColor = RGBColor(0xb3, 0x26, 0x1e);
/// Of lines beside each other, that people who see colours differently tell apart (after Okabe and
/// Ito); this project's is [`OWN`].
pub const LINES: [RGBColor; 8] = [
    RGBColor(0x80, 0x80, 0x80),
    RGBColor(0xd5, 0x8f, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xb8, 0x5a, 0x93),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x6a, 0x51, 0xa3),
    RGBColor(0x10, 0x90, 0xa0),
    RGBColor(0x8c, 0x6d, 0x31),
];

/// The rules of both papers. They stand in the page, and in each chart that is a file of its own.
pub fn style() -> String {
    let mut dark = String::new();
    for (name, _, colour) in COLOURS {
        // Writing into a string cannot fail.
        let _ = write!(
            dark,
            ".f-{name}{{fill:{colour}}}.s-{name}{{stroke:{colour}}}"
        );
    }
    format!("@media screen and (prefers-color-scheme:dark){{{dark}}}")
}

fn hex(colour: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2)
}

/// Names the colours of a drawing, so that a style can change them, and says what it shows.
pub fn themed(svg: &str, alt: &str) -> String {
    let mut svg = svg.to_owned();
    for (name, colour, _) in COLOURS {
        let hex = hex(colour);
        for (attribute, letter) in [("fill", 'f'), ("stroke", 's')] {
            let plain = format!("{attribute}=\"{hex}\"");
            svg = svg.replace(&plain, &format!("{plain} class=\"{letter}-{name}\""));
        }
    }
    let alt = maud::html! { (alt) }.into_string();
    svg.replacen("<svg ", "<svg role=\"img\" ", 1).replacen(
        '>',
        &format!("><title>{alt}</title>"),
        1,
    )
}

/// The same as a file of its own.
pub fn alone(svg: &str) -> String {
    svg.replacen("<title>", &format!("<style>{}</style><title>", style()), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_colour_of_a_drawing_can_be_changed_for_dark_paper() {
        let svg = "<svg a=\"b\">\n<text fill=\"#222222\"/><line stroke=\"#0072B2\"/></svg>";
        let found = themed(svg, "a <b>");
        assert!(found.contains("class=\"f-ink\"") && found.contains("class=\"s-own\""));
        assert!(found.contains("<title>a &lt;b&gt;</title>"));
        assert!(alone(&found).contains(".f-ink{fill:#e6e6e6}"));
    }
}
