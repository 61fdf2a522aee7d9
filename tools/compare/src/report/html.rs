//! The report as one HTML file that needs nothing else: no script, no other file.

use anyhow::Result;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::chart::theme;
use super::{DriverReport, Report, cost, goal_table, head, section};
use crate::driver::{self, Kind};
use crate::stats::FEWEST;

const STYLE: &str = include_str!("style.css");

/// The whole report.
pub fn render(report: &Report) -> Result<String> {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "Storage drivers for containers, compared" }
                style { (PreEscaped(STYLE)) (PreEscaped(theme::style())) }
            }
            body {
                h1 { "Storage drivers for containers, compared" }
                (subtitle(report))
                (head::section(report)?)
                (contents(report))
                (reading())
                (cost::section(report)?)
                @for workload in &report.workloads { (section::section(report, workload)?) }
                (section::chains(report)?)
                (drivers(report))
                (conditions(report))
                (left_out(report))
                (goal_table::section(report))
            }
        }
    };
    Ok(page.into_string())
}

fn subtitle(report: &Report) -> Markup {
    let count = |driver: &&DriverReport| !driver.is_reference() && driver.absent.is_none();
    let drivers = report.drivers.iter().filter(count).count();
    html! {
        p.small {
            "A storage driver gives a container its own writable copy of an image. " (drivers) " of them did the \
             same work on one host (" (report.host.processors) ", " (report.host.kernel) "; "
            @for (number, place) in report.places.iter().enumerate() {
                @if number > 0 { ", " }
                (place.title)
            }
            ") on " (report.started) ", in turns, up to " (report.rounds) " rounds."
        }
    }
}

fn contents(report: &Report) -> Markup {
    html! {
        nav {
            h2 { "Contents" }
            ul {
                li { a href="#reading" { "How to read this" } }
                li { a href="#cow" { "What copy-on-write costs" } }
                @for workload in &report.workloads {
                    li { a href={ "#" (workload.id) } { (workload.title) } }
                }
                li { a href="#drivers" { "The drivers, their versions, and the flush check" } }
                li { a href="#conditions" { "The conditions" } }
                li { a href="#left-out" { "What was left out" } }
                @if !report.goals.is_empty() { li { a href="#goals" { "Goals of the project Vellum" } } }
            }
        }
    }
}

fn reading() -> Markup {
    html! {
        section #reading {
            h2 { "How to read this" }
            ul {
                li {
                    b { "Ratios" } " are speeds relative to the reference of the same round: a plain \
                    file without any copy-on-write. " b { "2.0 is twice as fast, 0.50 half as fast" }
                    "; the geometric mean over the rounds. Intervals are Student's t intervals of the \
                     logarithms, 95 %; with fewer than " (FEWEST) " rounds there is none, and single \
                     rounds are points."
                }
                li {
                    "Containers from a registry have a reference of their own: overlayfs, whose image \
                     containerd pulls whole."
                }
                li {
                    "The reference runs twice in each round. What lies within the rounds of the \
                     reference beside itself, or whose interval holds 1, is "
                    span.noise { "noise (grey)" } ". " span.faster { "Green" } " is faster, "
                    span.slower { "red" } " slower."
                }
                li {
                    b { "Durability comes first." } " A driver that answers fsync without writing is \
                    fast and loses data. Each was checked before any timing; one that failed is "
                    span.fails { "crossed out" } ": its figures stand in report.json alone."
                }
                li {
                    b { "First touch" } " is the first write to a place of the image, which is when \
                    copy-on-write costs something; " b { "steady" } " is every later one."
                }
            }
        }
    }
}

fn drivers(report: &Report) -> Markup {
    html! {
        section #drivers {
            h2 { "The drivers" }
            div.wide { table {
                tr { th { "Driver" } th { "--drivers" } th { "What it is" } th { "Version" } th { "Flush check" } }
                @for driver in &report.drivers {
                    tr {
                        th { (driver.about.title) }
                        td { code { (driver.about.id) } }
                        td { (driver.about.what) }
                        td { (driver.version.as_deref().unwrap_or("–")) }
                        td { (flush(driver)) }
                    }
                }
            } }
            p.small {
                "The check: a container writes and flushes, and the disk below is copied at once, as a \
                 power cut would leave it. The driver is opened on the copy, and all that was flushed \
                 has to be there; the disk must have been told to flush."
            }
        }
    }
}

fn flush(driver: &DriverReport) -> Markup {
    match (&driver.absent, &driver.flush) {
        (Some(reason), _) => html! { span.noise { "absent: " (reason) } },
        (None, None) if driver.about.kind == Kind::Pull => {
            html! { span.noise { "not asked: it only fetches" } }
        }
        (None, None) => html! { span.noise { "not checked" } },
        (None, Some(flush)) if flush.passed => html! { span.faster { "✓ " (flush.detail) } },
        (None, Some(flush)) => html! { span.fails { "✗ " (flush.detail) } },
    }
}

fn conditions(report: &Report) -> Markup {
    let host = &report.host;
    let load: Vec<String> = host.load.iter().map(|load| format!("{load:.2}")).collect();
    let raw = driver::reference(Kind::Files);
    html! {
        section #conditions {
            h2 { "The conditions" }
            div.wide { table.facts {
                tr { th { "Command" } td.why { code { (report.command) } } }
                tr { th { "Begun" } td { (report.started) ", took " (format!("{:.1}", report.seconds / 60.0)) " min"
                    @if let Some(limit) = report.limit { " of at most " (format!("{:.1}", limit / 60.0)) } } }
                tr { th { "Host" } td { (host.kernel) ", " (host.processors) ", "
                    (format!("{:.0}", host.memory as f64 / 1e9)) " GB of memory" } }
                tr { th { "Load" } td { (load.join(" before the run, ")) " at its end; "
                    (format!("{:.1}", host.steal * 100.0)) " % of the processors' time stolen" } }
                tr { th { "Places" } td { @for place in &report.places { (place.title) ": " code { (place.dir) } br; } } }
                tr { th { "Programs" } td { (host.versions.join("; ")) } }
            } }
            ul {
                li { "Equal for all: the work and its order, the image's files, the host, cold caches (in \
                      this host's page cache; a cache below the disk knows the image of each driver alike), \
                      ext4's shape and options where a driver's containers have an ext4, direct I/O of \
                      loop devices." }
                li { "Not equal: overlayfs, full copies and fuse-overlayfs use the host's own file system, \
                      the others bring theirs (ext4, btrfs, XFS); qcow2's loop device goes through the page \
                      cache, since QEMU's FUSE export damages data otherwise; the reference (" code { (raw) }
                      ") is an ext4 on a loop device, so a driver without these may be faster than it." }
                li { "CPU time of kernel threads, and what a disk wrote, are the whole host's: other work is \
                      in them." }
            }
            p.small { "All figures of all runs, and errors whole: report.json, beside this file." }
        }
    }
}

fn left_out(report: &Report) -> Markup {
    html! {
        section #left-out {
            h2 { "What was left out" }
            ul { @for line in &report.left_out { li { (line) } } }
            @if !report.failures.is_empty() {
                h3 { "What failed" }
                div.wide { table {
                    tr { th { "Where" } th { "Workload" } th { "Driver" } th { "Why" } }
                    @for failure in &report.failures {
                        tr { td { (failure.place) } td { (failure.workload) } td { (failure.driver) } td.why { (brief(&failure.error)) } }
                    }
                } }
            }
        }
    }
}

/// An error's beginning, which says what was done, and its end, which says what went wrong: between
/// them may be a command line of a hundred file names.
pub fn brief(error: &str) -> String {
    const BEGINNING: usize = 300;
    // As much as a failed command's own words have.
    const END: usize = 600;
    let count = error.chars().count();
    if count <= BEGINNING + END {
        return error.to_owned();
    }
    let beginning: String = error.chars().take(BEGINNING).collect();
    let end: String = error.chars().skip(count - END).collect();
    format!("{beginning} […] {end}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Failure;
    use crate::report::tests::example;

    #[test]
    fn the_report_needs_no_other_file_and_no_script() {
        let page = render(&example()).unwrap();
        for link in ["<script", "<link", "src=", "@import", "url(", "onclick"] {
            assert!(!page.contains(link), "{link}");
        }
        assert!(page.contains("<svg"));
    }

    #[test]
    fn it_opens_with_the_answer_and_ends_with_the_goals() {
        let page = render(&example()).unwrap();
        let at = |what: &str| {
            page.find(what)
                .unwrap_or_else(|| panic!("{what} is not there"))
        };
        let order = [
            "class=\"answer\"",
            "<svg",
            "What it costs",
            "Which driver suits",
            "<nav>",
            "id=\"reading\"",
            "id=\"cow\"",
            "id=\"fio-fsync\"",
            "id=\"drivers\"",
            "id=\"goals\"",
        ];
        let places: Vec<usize> = order.iter().map(|what| at(what)).collect();
        assert!(places.is_sorted(), "{places:?}");
    }

    #[test]
    fn every_line_of_the_contents_leads_somewhere() {
        let page = render(&example()).unwrap();
        for link in page.split("href=\"#").skip(1) {
            let id = link.split('"').next().unwrap();
            assert!(page.contains(&format!("id=\"{id}\"")), "{id}");
        }
    }

    #[test]
    fn a_restless_host_is_told_before_anything_else() {
        let mut report = example();
        report.host.processor_count = 1;
        report.host.load = vec![5.0];
        let page = render(&report).unwrap();
        assert!(page.find("Not a calm host").unwrap() < page.find("class=\"answer\"").unwrap());
    }

    #[test]
    fn an_absent_driver_is_listed_with_its_reason_and_cannot_add_markup() {
        let page = render(&example()).unwrap();
        assert!(page.contains("absent: qemu &lt;is&gt; not here"));
        assert!(!page.contains("<is>"));
    }

    #[test]
    fn a_long_error_is_cut_in_its_middle_on_the_page_and_whole_in_the_data() {
        let names = "ä".repeat(10_000);
        let error = format!("fio --filename={names}: exit status: 1: no space left");
        let mut report = example();
        report.failures.push(Failure {
            place: "disk".into(),
            workload: "chain-128".into(),
            driver: "raw",
            error: error.clone(),
        });
        report.cut_short = Some(error.clone());
        let page = render(&report).unwrap();
        assert_eq!(page.matches("fio --filename=ä").count(), 2);
        assert_eq!(page.matches("ä: exit status: 1: no space left").count(), 2);
        assert!(!page.contains(&"ä".repeat(1000)));
        let data = serde_json::to_value(&report).unwrap();
        assert_eq!(data["failures"][0]["error"], *error);
        assert_eq!(data["cut_short"], *error);
        // What is short stays as it is.
        assert_eq!(brief("no root"), "no root");
        assert_eq!(brief(&"ä".repeat(900)), "ä".repeat(900));
    }

    #[test]
    fn a_driver_that_fails_its_check_is_marked_wherever_it_stands() {
        let page = render(&example()).unwrap();
        assert!(page.contains("✗ btrfs"));
        assert!(page.contains("<dt class=\"fails\">btrfs"));
        assert!(page.contains("<span class=\"fails\">× 9.0"));
        assert!(page.contains("<span class=\"faster\">× 2.0"));
    }

    #[test]
    fn noise_is_shown_as_noise() {
        let page = render(&example()).unwrap();
        assert!(page.contains("<span class=\"noise\">× 1.02"));
    }
}
