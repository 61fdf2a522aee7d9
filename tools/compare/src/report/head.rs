//! The first screen: what was too restless, a sentence for each driver, the chart, the costs, what
//! suits what.

use anyhow::Result;
use maud::{Markup, PreEscaped, html};

use super::answer::{sentences, uses};
use super::chart;
use super::html::brief;
use super::words::{list, times};
use super::{Place, Report, calm, cost, overview};

/// All of it, for each place.
pub fn section(report: &Report) -> Result<Markup> {
    let mut parts = Vec::new();
    for place in &report.places {
        parts.push(answer(report, place)?);
    }
    Ok(html! {
        @if let Some(why) = &report.cut_short {
            p.cut { "This run did not reach its end: " (brief(why)) ". What it had measured until then is \
                     below." }
        }
        @let warnings = calm::warnings(report);
        @if !warnings.is_empty() {
            div.cut {
                b { "Not a calm host: do not quote these figures." }
                ul { @for warning in &warnings { li { (warning) } } }
            }
        }
        @for part in parts { (part) }
    })
}

fn answer(report: &Report, place: &Place) -> Result<Markup> {
    let charts: Vec<String> = overview::panels(report, place)
        .iter()
        .map(chart::panel)
        .collect::<Result<_>>()?;
    if charts.is_empty() {
        return Ok(html! {});
    }
    Ok(html! {
        @if report.places.len() > 1 { h2 { (place.title) } }
        dl.answer {
            @for sentence in sentences(report, place) {
                div {
                    dt.fails[!sentence.comparable] { (sentence.title) }
                    dd { (sentence.says) }
                }
            }
        }
        div.grid { @for chart in charts { figure { (PreEscaped(chart)) } } }
        (legend()?)
        div.beside {
            (cost::table(report, place))
            (suits(report, place))
        }
    })
}

fn legend() -> Result<Markup> {
    Ok(html! {
        p.legend {
            "Times as fast as a " b { "plain file" } " without any copy-on-write, which is the line at 1; \
             right is faster, the axis is logarithmic. "
            (PreEscaped(chart::mark(true)?)) " first touch or cold, "
            (PreEscaped(chart::mark(false)?)) " from then on or warm; bars are 95 % confidence intervals over \
             the rounds, small points single rounds, an arrow lies beyond the axis. Shaded is the plain file \
             beside itself: what lies there is noise."
        }
    })
}

fn suits(report: &Report, place: &Place) -> Markup {
    html! {
        div.wide { table {
            tr { th { "Which driver suits which use" } th { "Best here (× a plain file)" } }
            @for of in uses(report, place) {
                @let best: Vec<String> = of.best.iter()
                    .map(|(title, ratio)| format!("{title} ({})", times(*ratio)))
                    .collect();
                tr { td { (of.what) br; small { "by " (of.by) } } td { (list(&best)) @if of.doubtful { br; small { "too few rounds to be sure" } } } }
            }
        } }
    }
}
