//! gRPC: containerd's requests to compare, for the proxy plugin of the type diff.

use std::collections::BTreeMap;

use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::{Request, Response, Status};

use super::content::{Naming, signed};
use super::diff::WantedLayer;
use super::failure::{Failure, Result, not_ours};
use super::operations::MountSpec;
use super::proto::services::diff::v1 as api;
use super::proto::types::{Descriptor, Mount};
use super::service::Service;
use api::diff_server::Diff;
use vellum_image::Compression;

/// How a layer of this media type is compressed: of those that containerd's own differ makes, which makes
/// gzip where nobody says.
fn compression(media_type: &str) -> Result<Compression> {
    if media_type.is_empty() {
        return Ok(Compression::Gzip);
    }
    [Compression::None, Compression::Gzip, Compression::Zstd]
        .into_iter()
        .find(|one| one.layer_media_type() == media_type)
        .ok_or_else(|| {
            not_ours(format!(
                "layers of the type {media_type:?} are not made here"
            ))
        })
}

/// A field of a request's head.
fn field(metadata: &MetadataMap, name: &str) -> Option<AsciiMetadataValue> {
    metadata
        .get(name)
        .filter(|value| !value.is_empty())
        .cloned()
}

/// The mount that a list of one says, as we hand it out; `None` for an empty list.
fn spec(mounts: &[Mount]) -> Result<Option<MountSpec>> {
    let mount = match mounts {
        [] => return Ok(None),
        [mount] => mount,
        _ => {
            return Err(not_ours(
                "a list of several mounts is none of a snapshot here",
            ));
        }
    };
    let device = match mount.r#type.as_str() {
        "bind" => false,
        "ext4" => true,
        other => {
            return Err(not_ours(format!(
                "a mount of the type {other:?} is not from here"
            )));
        }
    };
    let shifted = |option: &String| option.starts_with("uidmap=") || option.starts_with("gidmap=");
    if !mount.target.is_empty() || mount.options.iter().any(shifted) {
        return Err(not_ours(
            "a mount in another's directory, or with other owners of files, is not from here",
        ));
    }
    Ok(Some(MountSpec {
        source: mount.source.clone().into(),
        device,
        read_only: mount.options.iter().any(|option| option == "ro"),
    }))
}

fn wanted(metadata: &MetadataMap, request: api::DiffRequest) -> Result<WantedLayer> {
    let compression = compression(&request.media_type)?;
    let newer = spec(&request.right)?
        .ok_or_else(|| not_ours("what is compared with nothing is no snapshot from here"))?;
    let labels: BTreeMap<String, String> = request.labels.into_iter().collect();
    Ok(WantedLayer {
        older: spec(&request.left)?,
        newer,
        compression,
        naming: Naming {
            reference: request.r#ref,
            labels,
        },
        newest: request.source_date_epoch.map(|time| time.seconds),
        namespace: field(metadata, "containerd-namespace"),
        lease: field(metadata, "containerd-lease"),
    })
}

#[tonic::async_trait]
impl Diff for Service {
    /// containerd's own differ unpacks layers into any mount.
    async fn apply(
        &self,
        _: Request<api::ApplyRequest>,
    ) -> std::result::Result<Response<api::ApplyResponse>, Status> {
        Err(Status::unimplemented(
            "layers are unpacked by another differ: put \"walking\" behind this one in the diff service's list",
        ))
    }

    async fn diff(
        &self,
        request: Request<api::DiffRequest>,
    ) -> std::result::Result<Response<api::DiffResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let source = request.right.first().map(|mount| mount.source.clone());
        let wanted = wanted(&metadata, request);
        let content = self.content.clone();
        self.run("diff", &source.unwrap_or_default(), move |snapshotter| {
            let wanted = wanted?;
            let blob = snapshotter.diff(&wanted, &content)?;
            let diff = Descriptor {
                media_type: wanted.compression.layer_media_type(),
                digest: format!("sha256:{}", blob.digest),
                size: signed(blob.size)?,
                annotations: std::collections::HashMap::new(),
            };
            Ok::<_, Failure>(api::DiffResponse { diff: Some(diff) })
        })
        .await
    }
}
