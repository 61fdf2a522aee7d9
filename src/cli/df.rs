//! `vellum df`

use super::Context;
use super::output::{human_size, table};
use vellum_base::error::Result;
use vellum_engine::usage::{Usage, usage};

/// Arguments of `df`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
TOTAL is the data of all layers of an image or container, SHARED that of layers which another one has too, UNIQUE the \
rest: what its removal gives back. (Of several that share a layer among them alone, the removal of all gives it back.)")]
pub(super) struct Args {}

pub(super) fn run(_: &Args, context: &Context) -> Result<()> {
    context.out.print(&usage(&context.store()?)?, shown)
}

fn shown(usage: &Usage) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for part in &usage.parts {
        let sizes = [part.total, part.shared, part.unique].map(human_size);
        let name = part.name.replace(char::is_control, " ");
        rows.push([vec![part.kind.to_owned(), name], sizes.to_vec()].concat());
    }
    for volume in &usage.volumes {
        let sizes = [volume.bytes, 0, volume.bytes].map(human_size);
        rows.push(
            [
                vec!["volume".to_owned(), volume.name.clone()],
                sizes.to_vec(),
            ]
            .concat(),
        );
    }
    let table = table(&["KIND", "NAME", "TOTAL", "SHARED", "UNIQUE"], &rows);
    format!(
        "{table}all layers: {}; volumes in the store: {}\n",
        human_size(usage.layer_bytes),
        human_size(usage.volume_bytes)
    )
}
