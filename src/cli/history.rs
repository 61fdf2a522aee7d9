//! `vellum history IMAGE`

use serde::Serialize;

use super::Context;
use super::output::{human_size, table};
use vellum_base::error::Result;
use vellum_engine::template;
use vellum_image::HistoryEntry;

/// Arguments of `history`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image
    #[arg(add = super::completions::images())]
    image: String,
}

/// One step: of the configuration alone, or with the layer it made.
#[derive(Serialize)]
struct Step {
    #[serde(flatten)]
    entry: HistoryEntry,
    layer: Option<uuid::Uuid>,
    size: Option<u64>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let image = store.image(&args.image)?;
    // A file system that the driver made comes before the image's own steps.
    let own = template::count(&store, &image.layers);
    let size = |layer| store.layer_info(layer).map_or(0, |info| info.bytes);
    let mut steps: Vec<Step> = Vec::new();
    for &layer in image.layers.iter().take(own) {
        let created_by = store
            .layer_info(layer)
            .map(|info| info.origin)
            .unwrap_or_default();
        steps.push(Step {
            entry: HistoryEntry {
                created_by: Some(created_by),
                ..HistoryEntry::default()
            },
            layer: Some(layer),
            size: Some(size(layer)),
        });
    }
    for step in image.config.history_steps(image.layers.len() - own) {
        let layer = step
            .layer
            .and_then(|index| image.layers.get(own + index))
            .copied();
        steps.push(Step {
            entry: step.entry,
            layer,
            size: layer.map(size),
        });
    }
    steps.reverse();
    context.out.print(&steps, |steps| {
        let rows: Vec<Vec<String>> = steps.iter().map(cells).collect();
        let header = ["CREATED", "LAYER", "SIZE", "CREATED BY", "REMARK"];
        // Most images have none.
        let remarks = steps.iter().any(|step| remark(step).is_some());
        let shown = header.len() - usize::from(!remarks);
        let rows: Vec<Vec<String>> = rows
            .into_iter()
            .map(|mut row| {
                row.truncate(shown);
                row
            })
            .collect();
        table(header.get(..shown).unwrap_or(&header), &rows)
    })
}

/// What somebody remarked on a step, beside what made it.
fn remark(step: &Step) -> Option<&String> {
    let remark = step
        .entry
        .comment
        .as_ref()
        .filter(|remark| !remark.is_empty());
    remark.filter(|_| step.entry.created_by.is_some())
}

fn cells(step: &Step) -> Vec<String> {
    let layer = step.layer.map_or("<none>".into(), |layer| {
        layer.simple().to_string().chars().take(12).collect()
    });
    let by = step
        .entry
        .created_by
        .clone()
        .or_else(|| step.entry.comment.clone());
    vec![
        step.entry.created.clone().unwrap_or_else(|| "-".into()),
        layer,
        step.size.map_or("0B".into(), human_size),
        by.unwrap_or_default().replace(char::is_control, " "),
        remark(step).map_or(String::new(), |remark| {
            remark.replace(char::is_control, " ")
        }),
    ]
}
