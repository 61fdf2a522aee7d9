//! `vellum inspect NAME…`

use serde_json::{Value, json};
use uuid::Uuid;

use super::Context;
use super::output::Output;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::layer::{Header, SealedLayer};
use vellum_engine::known::Known;
use vellum_engine::snapshot::find;
use vellum_engine::status;
use vellum_image::hex;
use vellum_store::Store;

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Images, containers, keys of containerd's snapshots, or UUIDs of layers
    #[arg(required = true)]
    #[arg(add = super::completions::containers_and_images())]
    names: Vec<String>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    let found: Vec<Value> = args
        .names
        .iter()
        .map(|name| inspect(&store, name))
        .collect::<Result<_>>()?;
    // JSON with or without --json: there is too much for a table.
    Output {
        json: true,
        ..context.out
    }
    .print(&found, |_| String::new())
}

fn inspect(store: &Store, name: &str) -> Result<Value> {
    if let Ok(container) = store.container(name) {
        let resolved = store.resolve(&container)?;
        let layers = layers(store, resolved.sealed.iter().chain([&resolved.top]));
        let status = status::status(&Known::new(store, &[]), container, true)?;
        return Ok(json!({ "type": "container", "container": status, "layers": layers }));
    }
    if let Some(found) = find(store, name)? {
        let layers = layers(store, found.layers.iter());
        return Ok(
            json!({ "type": "container snapshot", "snapshot": found.snapshot, "layers": layers }),
        );
    }
    if let Ok(image) = store.image(name) {
        let layers = layers(store, image.layers.iter());
        return Ok(json!({ "type": "image", "image": image, "layers": layers }));
    }
    let snapshots = store.snapshots(Store::warn_damaged)?;
    if let Some(record) = snapshots.iter().find(|record| record.key == name) {
        let chain = store.ancestry(Some(record.top()))?;
        return Ok(json!({
            "type": "snapshot",
            "snapshot": record,
            "status": status::snapshot_status(&Known::new(store, &snapshots), record, true)?,
            "counters": status::snapshot_stats(store, record).ok(),
            "layers": layers(store, chain.iter()),
        }));
    }
    match Uuid::parse_str(name) {
        Ok(layer) => Ok(json!({ "type": "layer", "layer": describe(store, layer)? })),
        Err(_) => Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "there is no container, image, snapshot or layer {name}: see `vellum ps` and `vellum images`"
            ),
        )),
    }
}

/// From the bottom up; one that cannot be read says why.
fn layers<'a>(store: &Store, layers: impl Iterator<Item = &'a Uuid>) -> Vec<Value> {
    layers
        .map(|layer| {
            describe(store, *layer)
                .unwrap_or_else(|error| json!({ "uuid": layer, "error": error.to_string() }))
        })
        .collect()
}

fn describe(store: &Store, layer: Uuid) -> Result<Value> {
    let dir = store.layer_dir(layer);
    let storage = &**store.storage();
    let header = Header::read(storage, &dir)?;
    let sealed = if header.sealed {
        Some(SealedLayer::open(storage, &dir)?)
    } else {
        None
    };
    let digest = sealed
        .as_ref()
        .and_then(SealedLayer::digest)
        .map(|digest| format!("sha256:{}", hex(&digest)));
    let allocated = sealed
        .as_ref()
        .map(SealedLayer::allocated_bytes)
        .transpose()?;
    Ok(json!({
        "uuid": header.uuid,
        "parent": header.parent,
        "virtual_size": header.virtual_size,
        "sealed": header.sealed,
        // Not every path is text that JSON can carry.
        "directory": dir.display().to_string(),
        "info": store.layer_info(layer)?,
        "digest": digest,
        "data_blocks": sealed.as_ref().map(|sealed| sealed.data_blocks().get()),
        "allocated_bytes": allocated,
    }))
}
