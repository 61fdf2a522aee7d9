//! The project's goals beside what was reached, at the end of the page.

use maud::{Markup, html};

use super::Report;
use super::goals::{GoalResult, Outcome};
use super::words::times;

/// Each goal beside what was reached; nothing where no goal was measured.
pub fn section(report: &Report) -> Markup {
    let measured = |goal: &GoalResult| goal.outcome != Outcome::NotMeasured;
    if !report.goals.iter().any(measured) {
        return html! {};
    }
    html! {
        section #goals {
            h2 { "Goals of the project Vellum" }
            p {
                "What that project wants to reach, and what it did in this run: the median of the \
                 ratios of each round, with the lowest and the highest. " b { "Met" } " and "
                b { "missed" } " are said where every round says so, of at least three; all else is "
                span.noise { "noise" } "."
            }
            @for place in &report.places {
                @let rows: Vec<_> = report.goals.iter().filter(|goal| goal.place == place.id).collect();
                @let count = |outcomes: &[Outcome]| {
                    rows.iter().filter(|goal| outcomes.contains(&goal.outcome)).count()
                };
                h3 { (place.title) ": " (count(&[Outcome::Met])) " met, "
                    (count(&[Outcome::Missed])) " missed, "
                    (count(&[Outcome::NoiseMet, Outcome::NoiseMissed])) " not decided (noise), "
                    (count(&[Outcome::NotMeasured, Outcome::NotComparable])) " without a figure" }
                div.wide { table {
                    tr { th { "What" } th { "Figure" } th { "Goal" } th { "Reached" } th { "Rounds" } th { "" } }
                    @for goal in rows { (row(goal)) }
                } }
            }
        }
    }
}

fn row(goal: &GoalResult) -> Markup {
    html! {
        tr {
            td { (goal.what) }
            td.figure { code { (goal.figure) } }
            td { (goal.wanted) }
            td {
                @if let Some(reached) = goal.reached {
                    b { (times(reached.median)) }
                    @if reached.rounds >= crate::stats::FEWEST {
                        small { " " (times(reached.low)) "–" (times(reached.high)) }
                    }
                } @else { "–" }
            }
            td { (goal.reached.map_or(0, |reached| reached.rounds)) }
            td { (outcome(goal.outcome)) }
        }
    }
}

fn outcome(outcome: Outcome) -> Markup {
    let (class, text) = match outcome {
        Outcome::Met => ("faster", "✓ met"),
        Outcome::Missed => ("slower", "missed"),
        Outcome::NoiseMet => ("noise", "noise; the median reaches it"),
        Outcome::NoiseMissed => ("noise", "noise; the median misses it"),
        Outcome::NotComparable => ("noise", "not comparable: a flush check failed"),
        Outcome::NotMeasured => ("noise", "not measured"),
    };
    html! { span.said class=(class) { (text) } }
}
