//! Printing: tables and lines for people, JSON for programs.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
pub(super) use vellum_base::size::human_size;

/// How to print.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    pub(super) json: bool,
    pub(super) quiet: bool,
}

impl Output {
    /// Prints `value` as JSON, or what `text` makes of it.
    pub(super) fn print<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<()> {
        let text = if self.json {
            let mut text = serde_json::to_string_pretty(value).map_err(|error| {
                Error::with_source(ErrorKind::Io, "the answer cannot be encoded", error)
            })?;
            text.push('\n');
            text
        } else {
            text(value)
        };
        write_out(text.as_bytes())
    }

    /// Prints `value` as JSON on one line.
    pub(super) fn print_line<T: Serialize>(self, value: &T) -> Result<()> {
        let mut text = serde_json::to_string(value).map_err(|error| {
            Error::with_source(ErrorKind::Io, "the answer cannot be encoded", error)
        })?;
        text.push('\n');
        write_out(text.as_bytes())
    }

    /// True when a progress bar helps somebody.
    pub(super) fn shows_progress(self) -> bool {
        !self.quiet && io::IsTerminal::is_terminal(&io::stderr())
    }

    /// A remark for people who watch.
    pub(super) fn note(self, text: &str) {
        if !self.quiet && !self.json {
            say(text);
        }
    }
}

/// Writes to standard output, all of it, and nothing stays behind: on a full disk that is a failure.
pub(super) fn write_out(bytes: &[u8]) -> Result<()> {
    written(|out| out.write_all(bytes))
}

/// As [`write_out`], by whoever prints to standard output itself.
pub(super) fn written(print: impl FnOnce(&mut io::Stdout) -> io::Result<()>) -> Result<()> {
    let mut out = io::stdout();
    match print(&mut out).and_then(|()| out.flush()) {
        // The reader has seen enough: `vellum images | head -1`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context(|| "cannot write to standard output"),
    }
}

/// Says on standard error why something failed, on one line.
pub(super) fn complain(error: &Error) {
    let text = match interrupt::signal() {
        // A program that it had started got the signal too, or a call was cut off.
        Some(signal) if error.kind() != ErrorKind::Interrupted => {
            format!("vellum: interrupted by {signal}: {error}")
        }
        _ => format!("vellum: {error}"),
    };
    say(&text.replace(char::is_control, "?"));
}

/// Of several things that were tried: the first failure, after saying the others.
pub(super) fn first_of(failures: Vec<Error>) -> Result<()> {
    let mut failures = failures.into_iter();
    let Some(first) = failures.next() else {
        return Ok(());
    };
    for error in failures {
        complain(&error);
    }
    Err(first)
}

/// A line on standard error. Where that cannot be written nobody is there to be told.
pub(super) fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// A number of things: `1 layer`, `2 layers`.
pub(super) fn counted(number: impl Display, thing: &str) -> String {
    let number = number.to_string();
    let plural = if number == "1" { "" } else { "s" };
    format!("{number} {thing}{plural}")
}

/// A table with columns as wide as their content; the last is not padded.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    let mut out = String::new();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (cell, &width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_lines_up_and_ends_lines_without_spaces() {
        let rows = [
            vec!["a".to_owned(), "b".to_owned()],
            vec!["long".to_owned(), String::new()],
        ];
        assert_eq!(table(&["X", "Y"], &rows), "X     Y\na     b\nlong\n");
    }
}
