//! The report as files: the page, the data, the charts.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::chart::theme;
use super::{Report, cost, html, overview};

/// Writes report.json, report.html and charts/*.svg, each at once or not at all.
///
/// # Errors
/// When they cannot be drawn or written.
pub fn write(report: &Report, out: &Path) -> Result<()> {
    replace(
        &out.join("report.json"),
        &serde_json::to_string_pretty(report)?,
    )?;
    replace(&out.join("report.html"), &html::render(report)?)?;
    let charts = out.join("charts");
    for (number, place) in report.places.iter().enumerate() {
        let pictures = [
            ("overview", overview::picture(report, place)?),
            ("first-touch", cost::touch_picture(report, place)?),
            ("latency", cost::latency_picture(report, place)?),
        ];
        for (name, picture) in pictures {
            let Some(picture) = picture else { continue };
            // The first place's have the plain names.
            let name = match number {
                0 => format!("{name}.svg"),
                number => format!("{name}-{}.svg", number + 1),
            };
            fs::create_dir_all(&charts).with_context(|| charts.display().to_string())?;
            replace(&charts.join(name), &theme::alone(&picture))?;
        }
    }
    Ok(())
}

fn replace(file: &Path, content: &str) -> Result<()> {
    let beside = file.with_extension("new");
    fs::write(&beside, content)
        .and_then(|()| fs::rename(&beside, file))
        .with_context(|| file.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::example;

    #[test]
    fn charts_are_files_that_need_nothing_else_and_a_second_run_replaces_them() {
        let out = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            write(&example(), out.path()).unwrap();
        }
        let svg = fs::read_to_string(out.path().join("charts/overview.svg")).unwrap();
        assert!(svg.starts_with("<svg ") && svg.contains("<style>") && !svg.contains("href"));
        assert!(
            !out.path().join("charts/latency.svg").exists(),
            "nothing to draw"
        );
        let names = fs::read_dir(out.path()).unwrap().flatten();
        assert!(
            names
                .map(|e| e.file_name())
                .all(|name| name != "report.new")
        );
    }
}
