//! `vellum images`

use std::collections::BTreeMap;

use serde::Serialize;

use super::Context;
use super::output::{human_size, table};
use vellum_base::error::Result;
use vellum_engine::known::Known;
use vellum_engine::status::{SnapshotStatus, snapshot_status};
use vellum_store::{ImageRecord, SnapshotKind, Store};

/// Arguments of `images`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

/// An image of ours, or a committed snapshot of containerd's.
#[derive(Serialize)]
#[serde(untagged)]
enum Row {
    Image {
        #[serde(flatten)]
        image: Box<ImageRecord>,
        /// Bytes of data in all of its layers.
        size: u64,
    },
    Snapshot(Box<Snapshot>),
}

#[derive(Serialize)]
struct Snapshot {
    #[serde(flatten)]
    status: SnapshotStatus,
    /// containerd's labels.
    labels: BTreeMap<String, String>,
}

pub(super) fn run(_: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let mut snapshots = store.snapshots(Store::warn_damaged)?;
    snapshots.sort_by(|a, b| a.key.cmp(&b.key));
    let known = Known::new(&store, &snapshots);
    let mut rows: Vec<Row> = store
        .images()?
        .into_iter()
        .map(|image| Row::Image {
            size: known.bytes_of(&image.layers),
            image: Box::new(image),
        })
        .collect();
    let committed = snapshots
        .iter()
        .filter(|r| r.kind == SnapshotKind::Committed);
    for record in committed {
        rows.push(Row::Snapshot(Box::new(Snapshot {
            status: snapshot_status(&known, record, true)?,
            labels: record.labels.clone(),
        })));
    }
    context.out.print(&rows, |rows| {
        let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
        table(&["IMAGE", "LAYERS", "SIZE", "VIRTUAL", "CREATED"], &cells)
    })
}

fn cells(row: &Row) -> Vec<String> {
    let (name, layers, size, virtual_size, created) = match row {
        Row::Image { image, size } => (
            &image.name,
            image.layers.len(),
            *size,
            image.disk.virtual_size,
            &image.created,
        ),
        Row::Snapshot(row) => (
            &row.status.name,
            row.status.depth,
            row.status.total_size.unwrap_or(0),
            row.status.virtual_size,
            &row.status.created,
        ),
    };
    vec![
        name.replace(char::is_control, " "),
        layers.to_string(),
        human_size(size),
        human_size(virtual_size),
        created.clone(),
    ]
}
