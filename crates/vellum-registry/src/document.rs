//! Manifests and indexes, as registries have them: the OCI image specification 1.1, manifest.md and
//! image-index.md, and Docker's of the same form.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_image::Platform;

/// The type of an index.
pub const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
/// The type of a manifest.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// By what an index of a layout has an image: a tag, or what another program calls it. The image specification 1.1,
/// annotations.md.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The full name of an image in an archive, as containerd and Docker write it.
pub const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// What an image was called in the store that saved it.
pub const NAME_ANNOTATION: &str = "dev.vellum.image.name";
const DOCKER_INDEX_TYPE: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// What a registry is asked for.
pub(crate) const ACCEPTED: [&str; 4] = [
    INDEX_TYPE,
    MANIFEST_TYPE,
    DOCKER_INDEX_TYPE,
    DOCKER_MANIFEST_TYPE,
];

/// A reference to a blob or document.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is; Go writes an empty text where nobody said.
    pub media_type: Option<String>,
    /// What an artifact is.
    pub artifact_type: Option<String>,
    /// `sha256:…`
    pub digest: String,
    /// In bytes.
    pub size: u64,
    /// What is said of it besides.
    pub annotations: Option<BTreeMap<String, String>>,
    /// What it runs on.
    pub platform: Option<Platform>,
}

impl Descriptor {
    /// What is said of it under a name.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        let found = self.annotations.as_ref()?.get(name);
        found.map(String::as_str)
    }

    /// True for what is of this type.
    pub fn is(&self, media_type: &str) -> bool {
        self.media_type.as_deref() == Some(media_type)
    }
}

/// A manifest: a configuration and layers. Go writes `null` for what is empty.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// What it is, where it is no image.
    pub artifact_type: Option<String>,
    /// Its configuration.
    pub config: Descriptor,
    /// From the bottom up.
    pub layers: Option<Vec<Descriptor>>,
    /// What is said of it besides.
    pub annotations: Option<BTreeMap<String, String>>,
}

impl Manifest {
    /// What is said of it under a name.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        let found = self.annotations.as_ref()?.get(name);
        found.map(String::as_str)
    }

    /// Its layers, from the bottom up.
    pub fn layers(&self) -> &[Descriptor] {
        self.layers.as_deref().unwrap_or_default()
    }
}

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Option<Vec<Descriptor>>,
}

/// A manifest or index, byte for byte: its digest is of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// What it is.
    pub media_type: String,
    /// `sha256:…`
    pub digest: String,
    /// The JSON.
    pub bytes: Vec<u8>,
}

impl Document {
    /// Reads it as a manifest.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`].
    pub fn manifest(&self) -> Result<Manifest> {
        self.parse()
    }

    /// The entries of an index; `None` for a manifest.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`]; [`ErrorKind::Unsupported`] for another kind of document.
    pub fn entries(&self) -> Result<Option<Vec<Descriptor>>> {
        match self.media_type.as_str() {
            INDEX_TYPE | DOCKER_INDEX_TYPE => {
                let index: Index = self.parse()?;
                Ok(Some(index.manifests.unwrap_or_default()))
            }
            MANIFEST_TYPE | DOCKER_MANIFEST_TYPE => Ok(None),
            other => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{} is of the type {other:?}, neither an image nor an index of images (images of Docker \
                     before 1.10 have to be pushed again by a newer one)",
                    self.digest
                ),
            )),
        }
    }

    fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.bytes).map_err(|error| {
            let text = format!(
                "{} is not the JSON that the specification asks for",
                self.digest
            );
            Error::with_source(ErrorKind::Corrupt, text, error)
        })
    }
}

/// The entry of an index for a platform, as containerd chooses. What is for no machine (attestations, block
/// layers) is passed over. An entry that is alone and names no platform is for all.
///
/// # Errors
/// [`ErrorKind::NotFound`], with what there is.
pub(crate) fn choose<'a>(entries: &'a [Descriptor], wanted: &Platform) -> Result<&'a Descriptor> {
    let images: Vec<&Descriptor> = entries
        .iter()
        .filter(|entry| may_be_an_image(entry))
        .collect();
    if let [only] = images.as_slice()
        && only.platform.is_none()
    {
        return Ok(only);
    }
    let known = images
        .iter()
        .filter_map(|entry| Some((entry, entry.platform.as_ref()?)));
    let known: Vec<_> = known.collect();
    let best = wanted.best(known.iter().map(|(_, platform)| *platform));
    if let Some((entry, _)) = best.and_then(|best| known.get(best)) {
        return Ok(entry);
    }
    let mut list: Vec<String> = known
        .iter()
        .map(|(_, platform)| platform.to_string())
        .collect();
    list.dedup();
    let list = match list.is_empty() {
        true => "none for any machine".into(),
        false => list.join(", "),
    };
    Err(Error::new(
        ErrorKind::NotFound,
        format!("there is no image for {wanted} in it, but {list}: give --platform"),
    ))
}

fn may_be_an_image(entry: &Descriptor) -> bool {
    let unknown = entry
        .platform
        .as_ref()
        .is_some_and(|platform| platform.os == "unknown");
    let attests = entry.annotation("vnd.docker.reference.type").is_some();
    let artifact = entry
        .artifact_type
        .as_ref()
        .is_some_and(|kind| !kind.is_empty());
    !unknown && !attests && !artifact
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(entries: &str) -> Result<Vec<Descriptor>> {
        let document = Document {
            media_type: INDEX_TYPE.into(),
            digest: "sha256:0".into(),
            bytes: format!(r#"{{"manifests":{entries}}}"#).into_bytes(),
        };
        Ok(document.entries()?.unwrap())
    }

    #[test]
    fn the_image_for_the_platform_is_chosen_and_nothing_that_is_for_no_machine() {
        let entries = index(
            r#"[{"digest":"a","size":1,"platform":{"os":"unknown","architecture":"unknown"}},
                {"digest":"b","size":1,"platform":{"os":"linux","architecture":"arm64"},"annotations":null},
                {"digest":"c","size":1,"platform":{"os":"linux","architecture":"amd64"}},
                {"digest":"d","size":1,"artifactType":"x/y"}]"#,
        )
        .unwrap();
        let chosen = |platform: &str| {
            let platform: Platform = platform.parse().unwrap();
            choose(&entries, &platform).map(|entry| entry.digest.clone())
        };
        assert_eq!(chosen("linux/amd64").unwrap(), "c");
        assert_eq!(chosen("linux/arm64/v8").unwrap(), "b");
        let error = chosen("linux/riscv64").unwrap_err();
        assert!(error.to_string().contains("linux/arm64"), "{error}");
        assert_eq!(
            choose(
                &index(r#"[{"digest":"e","size":1}]"#).unwrap(),
                &Platform::host()
            )
            .unwrap()
            .digest,
            "e"
        );
        assert!(index("null").unwrap().is_empty());
        assert_eq!(index("[{}]").unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
