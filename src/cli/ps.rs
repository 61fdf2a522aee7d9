//! `vellum ps`

use super::Context;
use super::output::{human_size, table};
use crate::engine::status::{ContainerStatus, status};
use crate::error::Result;

/// Arguments of `ps`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Also show sizes: of the writable layer, and with the image's layers
    #[arg(short, long)]
    size: bool,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let rows: Vec<ContainerStatus> = store
        .containers()?
        .into_iter()
        .map(|record| status(&store, record, args.size))
        .collect::<Result<_>>()?;
    context.out.print(&rows, |rows| {
        let mut header = vec!["CONTAINER", "IMAGE", "CREATED", "STATUS"];
        header.extend(args.size.then_some("SIZE"));
        let cells: Vec<Vec<String>> = rows.iter().map(|row| cells(row, args.size)).collect();
        table(&header, &cells)
    })
}

fn cells(row: &ContainerStatus, size: bool) -> Vec<String> {
    let mut cells = vec![
        row.record.name.clone(),
        row.record.image.clone(),
        row.record.created.clone(),
        row.status.replace(char::is_control, " "),
    ];
    if size {
        let human = |bytes: Option<u64>| bytes.map_or("?".into(), human_size);
        cells.push(format!(
            "{} (virtual {})",
            human(row.size),
            human(row.total_size)
        ));
    }
    cells
}
