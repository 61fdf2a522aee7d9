//! `vellum ps`

use super::Context;
use super::list::{Filter, Template};
use super::output::{Output, human_size, table};
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
    /// Accepted for docker's users: those that do not run are always there
    #[arg(short, long)]
    all: bool,
    /// Those alone for which it holds: status=running (created, exited, mounted, served), exited=N, name=PART,
    /// ancestor=IMAGE, volume=NAME; of several with one key any, of several keys all
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<Filter>,
    /// How a container is printed, like '{{.Names}} {{.Status}}'; with "table " before it under a header; json
    ///
    /// Fields are .Names, .ID, .Image, .Command, .CreatedAt, .Status, .State, .Size, .Mounts and .Ports, as docker's.
    #[arg(long, value_name = "TEMPLATE")]
    format: Option<Template>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let sized = args.size || args.format.as_ref().is_some_and(Template::wants_size);
    let mut snapshots = store.snapshots(Store::warn_damaged)?;
    snapshots.sort_by(|a, b| a.key.cmp(&b.key));
    let known = Known::new(&store, &snapshots);
    let mut rows: Vec<Row> = store
        .containers()?
        .into_iter()
        .map(|record| status(&known, record, sized).map(|row| Row::Container(Box::new(row))))
        .collect::<Result<_>>()?;
    let ours_alone = args.format.is_some() || (context.out.quiet && !context.out.json);
    // containerd's are seen, and not what commands on containers are about.
    for record in snapshots
        .iter()
        .filter(|r| r.kind != SnapshotKind::Committed && !ours_alone)
    {
        let row = snapshot_status(&known, record, args.size)?;
        rows.push(Row::Snapshot(Box::new(row)));
    }
    rows.retain(|row| match row {
        Row::Container(row) => Filter::all_hold(&args.filter, row),
        Row::Snapshot(_) => args.filter.is_empty(),
    });
    let json = context.out.json || args.format.as_ref().is_some_and(Template::is_json);
    let out = Output {
        json,
        ..context.out
    };
    out.print(&rows, |rows| {
        let containers = rows.iter().filter_map(|row| match row {
            Row::Container(row) => Some(&**row),
            Row::Snapshot(_) => None,
        });
        if let Some(template) = &args.format {
            return template.fill(containers);
        }
        if context.out.quiet {
            return containers
                .map(|row| format!("{}\n", row.record.name))
                .collect();
        }
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
