//! `vellum ps`

use super::Context;
use super::output::{human_size, table};
use serde::Serialize;

use vellum_base::error::Result;
use vellum_engine::known::Known;
use vellum_engine::status::{ContainerStatus, SnapshotStatus, snapshot_status, status};
use vellum_store::{SnapshotKind, Store};

/// Arguments of `ps`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Also show sizes: of the writable layer, and with the image's layers
    #[arg(short, long)]
    size: bool,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let mut snapshots = store.snapshots(Store::warn_damaged)?;
    snapshots.sort_by(|a, b| a.key.cmp(&b.key));
    let known = Known::new(&store, &snapshots);
    let mut rows: Vec<Row> = store
        .containers()?
        .into_iter()
        .map(|record| status(&known, record, args.size).map(|row| Row::Container(Box::new(row))))
        .collect::<Result<_>>()?;
    for record in snapshots
        .iter()
        .filter(|r| r.kind != SnapshotKind::Committed)
    {
        let row = snapshot_status(&known, record, args.size)?;
        rows.push(Row::Snapshot(Box::new(row)));
    }
    context.out.print(&rows, |rows| {
        let mut header = vec!["CONTAINER", "IMAGE", "CREATED", "STATUS"];
        header.extend(args.size.then_some("SIZE"));
        let cells: Vec<Vec<String>> = rows.iter().map(|row| cells(row, args.size)).collect();
        table(&header, &cells)
    })
}

/// A container of ours, or one of containerd's.
#[derive(Serialize)]
#[serde(untagged)]
enum Row {
    Container(Box<ContainerStatus>),
    Snapshot(Box<SnapshotStatus>),
}

fn cells(row: &Row, size: bool) -> Vec<String> {
    let (name, image, created, status, own, total) = match row {
        Row::Container(row) => (
            &row.record.name,
            &row.record.image,
            &row.record.created,
            &row.status,
            row.size,
            row.total_size,
        ),
        Row::Snapshot(row) => (
            &row.name,
            &row.image,
            &row.created,
            &row.status,
            row.size,
            row.total_size,
        ),
    };
    let plain = |text: &String| text.replace(char::is_control, " ");
    let mut cells = vec![plain(name), plain(image), created.clone(), plain(status)];
    if size {
        let human = |bytes: Option<u64>| bytes.map_or("?".into(), human_size);
        cells.push(format!("{} (virtual {})", human(own), human(total)));
    }
    cells
}
