//! `vellum images`

use serde::Serialize;

use super::Context;
use super::output::{human_size, table};
use crate::error::Result;
use crate::store::ImageRecord;

/// Arguments of `images`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    image: ImageRecord,
    /// Bytes of data in all of its layers.
    size: u64,
}

pub(super) fn run(_: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let bytes = |layer| store.layer_info(layer).map_or(0, |info| info.bytes);
    let rows: Vec<Row> = store
        .images()?
        .into_iter()
        .map(|image| Row {
            size: image.layers.iter().copied().map(bytes).sum(),
            image,
        })
        .collect();
    context.out.print(&rows, |rows| {
        let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
        table(&["IMAGE", "LAYERS", "SIZE", "VIRTUAL", "CREATED"], &cells)
    })
}

fn cells(row: &Row) -> Vec<String> {
    vec![
        row.image.name.clone(),
        row.image.layers.len().to_string(),
        human_size(row.size),
        human_size(row.image.virtual_size),
        row.image.created.clone(),
    ]
}
