//! What an image says about itself: how to run it and how it came to be.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest, Sha256};

use vellum_base::{Error, ErrorKind, Result};

/// The configuration of an image, in the form of the OCI image specification's `config.json`.
///
/// What this program does not know (health checks, build triggers) is kept in `extra` and
/// written back as it was.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// When it was made, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Who made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// The processor in Go's spelling: `amd64`, `arm64`.
    #[serde(default, deserialize_with = "or_default")]
    pub architecture: String,
    /// The operating system in Go's spelling: `linux`.
    #[serde(default, deserialize_with = "or_default")]
    pub os: String,
    /// The variant of the processor: `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// How to run it.
    #[serde(default, deserialize_with = "or_default")]
    pub config: RunConfig,
    /// The digests of the layers' uncompressed tars, lowest first.
    #[serde(default, deserialize_with = "or_default")]
    pub rootfs: RootFs,
    /// The steps that made it, first to last.
    #[serde(default, deserialize_with = "list")]
    pub history: Vec<HistoryEntry>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

/// How to run a container of an image.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunConfig {
    /// `USER[:GROUP]`, names or numbers; empty is root.
    #[serde(
        default,
        deserialize_with = "or_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub user: String,
    /// `NAME=VALUE` each.
    #[serde(
        default,
        deserialize_with = "list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub env: Vec<String>,
    /// The program and its first arguments.
    #[serde(
        default,
        deserialize_with = "list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub entrypoint: Vec<String>,
    /// The arguments after the entry point that a user may replace.
    #[serde(
        default,
        deserialize_with = "list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub cmd: Vec<String>,
    /// Where it starts; empty is `/`.
    #[serde(
        default,
        deserialize_with = "or_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub working_dir: String,
    /// Free-form facts.
    #[serde(
        default,
        deserialize_with = "texts_by_name",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub labels: BTreeMap<String, String>,
    /// `PORT/PROTOCOL` as keys; the values are empty objects.
    #[serde(
        default,
        deserialize_with = "or_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
    /// Paths that want a volume, as keys; the values are empty objects.
    #[serde(
        default,
        deserialize_with = "or_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub volumes: BTreeMap<String, serde_json::Value>,
    /// The signal that stops it: `SIGTERM`, `15`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

/// The layers of an image by the digests of their uncompressed tars.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(
        rename = "type",
        default = "layers",
        deserialize_with = "layers_or_text"
    )]
    pub kind: String,
    /// `sha256:…` each, lowest layer first.
    #[serde(default, deserialize_with = "list")]
    pub diff_ids: Vec<String>,
}

impl Default for RootFs {
    fn default() -> Self {
        RootFs {
            kind: layers(),
            diff_ids: Vec::new(),
        }
    }
}

fn layers() -> String {
    "layers".into()
}

/// One step in the making of an image.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// When, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    /// By whom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// A remark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// Whether the step changed the configuration alone and made no layer.
    #[serde(
        default,
        deserialize_with = "or_default",
        skip_serializing_if = "std::ops::Not::not"
    )]
    pub empty_layer: bool,
    /// Everything else.
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

/// A step of the history with the layer that it made.
#[derive(Debug, Clone, PartialEq)]
pub struct HistoryStep {
    /// The step; empty for a layer that the history does not mention.
    pub entry: HistoryEntry,
    /// The index of its layer, 0 the lowest; `None` for a step that made none.
    pub layer: Option<usize>,
}

fn layers_or_text<'de, D: Deserializer<'de>>(input: D) -> std::result::Result<String, D::Error> {
    Ok(Option::<String>::deserialize(input)?.unwrap_or_else(layers))
}

/// A list, which may be `null` and have `null` in it: Go's zero value.
pub(super) fn list<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    input: D,
) -> std::result::Result<Vec<T>, D::Error> {
    let list = Option::<Vec<Option<T>>>::deserialize(input)?.unwrap_or_default();
    Ok(list.into_iter().map(Option::unwrap_or_default).collect())
}

/// Texts by name, which may be `null` and have `null` in it.
pub(super) fn texts_by_name<'de, D: Deserializer<'de>>(
    input: D,
) -> std::result::Result<BTreeMap<String, String>, D::Error> {
    let map = Option::<BTreeMap<String, Option<String>>>::deserialize(input)?.unwrap_or_default();
    let texts = map
        .into_iter()
        .map(|(key, text)| (key, text.unwrap_or_default()));
    Ok(texts.collect())
}

/// Docker writes `null` where the specification has a default.
pub(super) fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    input: D,
) -> std::result::Result<T, D::Error> {
    Ok(Option::<T>::deserialize(input)?.unwrap_or_default())
}

impl ImageConfig {
    /// A configuration for this kind of host with nothing in it. It asks for no more than every CPU
    /// of the kind has.
    pub fn for_host() -> Self {
        let host = super::Platform::host().baseline();
        ImageConfig {
            architecture: host.architecture,
            os: host.os,
            variant: host.variant,
            ..Self::default()
        }
    }

    /// Reads the JSON of an OCI or Docker image.
    ///
    /// # Errors
    ///
    /// `Corrupt` when it is not the JSON of an image configuration or a layer's digest in it is
    /// not one.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        // By way of a value, in which the last of several equal keys counts, as Go reads it.
        let value = serde_json::from_slice::<serde_json::Value>(json);
        let config = value.and_then(serde_json::from_value::<ImageConfig>);
        let config = config.map_err(|error| {
            Error::with_source(
                ErrorKind::Corrupt,
                "the image configuration is not what the OCI specification has",
                error,
            )
        })?;
        for diff_id in &config.rootfs.diff_ids {
            super::layer::parse_digest(diff_id)?;
        }
        Ok(config)
    }

    /// Writes it as JSON.
    ///
    /// # Errors
    ///
    /// `Io` when the values in `extra` cannot be written.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|error| {
            Error::with_source(ErrorKind::Io, "writing the image configuration", error)
        })
    }

    /// Brings the history into step with `layers` layers, so that what is added later stands beside
    /// its own layer: images exist whose history mentions fewer or more than there are, or none.
    /// Layers that it does not mention get a step without a word, and of too many steps that claim
    /// a layer the last ones claim none any more.
    pub fn settle_history(&mut self, layers: usize) {
        let mut made = 0;
        for entry in self.history.iter_mut().filter(|entry| !entry.empty_layer) {
            made += 1;
            entry.empty_layer = made > layers;
        }
        for _ in made..layers {
            self.history.push(HistoryEntry::default());
        }
    }

    /// Every step in order with the layer it made; `layers` is the number of layers.
    ///
    /// Where the two do not match, they do after [`ImageConfig::settle_history`].
    pub fn history_steps(&self, layers: usize) -> Vec<HistoryStep> {
        let mut settled = self.clone();
        settled.settle_history(layers);
        let mut next = 0..layers;
        let steps = settled.history.into_iter().map(|entry| HistoryStep {
            layer: if entry.empty_layer { None } else { next.next() },
            entry,
        });
        steps.collect()
    }
}

/// The name of a stack of layers: one string for the lowest of `diff_ids` with all above it.
///
/// As the OCI image specification has it: `ChainID(L0) = DiffID(L0)`,
/// `ChainID(L0|…|Ln) = sha256(ChainID(L0|…|Ln-1) + " " + DiffID(Ln))`. Empty for no layer.
pub fn chain_id(diff_ids: &[impl AsRef<str>]) -> String {
    chain_ids(diff_ids).pop().unwrap_or_default()
}

/// The [`chain_id`] of every prefix of `diff_ids`, one for each layer.
pub fn chain_ids(diff_ids: &[impl AsRef<str>]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let diff_id = diff_id.as_ref();
        let id = match chain.last() {
            None => diff_id.to_owned(),
            Some(below) => {
                let digest = Sha256::digest(format!("{below} {diff_id}"));
                format!("sha256:{}", super::layer::hex(&digest))
            }
        };
        chain.push(id);
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_nulls_and_unknown_fields_survive() {
        let json = br#"{"architecture":"amd64","os":"linux","created":"2020-01-01T00:00:00Z",
            "config":{"Env":["A=b"],"Cmd":null,"Labels":null,"ArgsEscaped":true,
                "Healthcheck":{"Test":["NONE"]},"ExposedPorts":{"80/tcp":{}}},
            "rootfs":{"type":"layers","diff_ids":[]},"docker_version":"20",
            "history":[{"created_by":"x","empty_layer":true}]}"#;
        let config = ImageConfig::from_json(json).unwrap();
        assert_eq!(config.config.env, ["A=b"]);
        assert!(config.config.cmd.is_empty());
        assert!(config.history[0].empty_layer);
        let again: serde_json::Value = serde_json::from_slice(&config.to_json().unwrap()).unwrap();
        assert_eq!(again["docker_version"], "20");
        assert_eq!(again["config"]["Healthcheck"]["Test"][0], "NONE");
        assert_eq!(again["config"]["ArgsEscaped"], true);
        assert!(again["config"].get("Cmd").is_none());
        assert_eq!(
            again["config"]["ExposedPorts"]["80/tcp"],
            serde_json::json!({})
        );
    }

    #[test]
    fn a_bad_digest_among_the_layers_is_corrupt() {
        let json = br#"{"rootfs":{"type":"layers","diff_ids":["sha256:../x"]}}"#;
        let error = ImageConfig::from_json(json).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn chain_ids_follow_the_specification() {
        let a = format!("sha256:{}", "a".repeat(64));
        let b = format!("sha256:{}", "b".repeat(64));
        assert_eq!(chain_id(&[] as &[&str]), "");
        assert_eq!(chain_id(&[&a]), a);
        // printf 'sha256:aaa… sha256:bbb…' | sha256sum
        let two = chain_id(&[&a, &b]);
        let expected = Sha256::digest(format!("{a} {b}"));
        assert_eq!(two, format!("sha256:{}", crate::layer::hex(&expected)));
        assert_eq!(chain_ids(&[&a, &b]), [a.clone(), two.clone()]);
        assert_ne!(chain_id(&[&b, &a]), two);
    }

    #[test]
    fn history_pairs_layers_with_steps_even_when_the_counts_differ() {
        let step = |name: &str, empty_layer| HistoryEntry {
            created_by: Some(name.into()),
            empty_layer,
            ..HistoryEntry::default()
        };
        let config = ImageConfig {
            history: vec![step("a", false), step("b", true), step("c", false)],
            ..ImageConfig::default()
        };
        let layers = |count| -> Vec<Option<usize>> {
            let steps = config.history_steps(count);
            steps.iter().map(|step| step.layer).collect()
        };
        assert_eq!(layers(2), [Some(0), None, Some(1)]);
        assert_eq!(layers(1), [Some(0), None, None]);
        assert_eq!(layers(3), [Some(0), None, Some(1), Some(2)]);
    }

    #[test]
    fn a_step_after_a_settled_history_stands_beside_the_layer_that_it_made() {
        for steps in 0..5 {
            let mut config = ImageConfig {
                history: vec![HistoryEntry::default(); steps],
                ..ImageConfig::default()
            };
            config.settle_history(2);
            config.history.push(HistoryEntry {
                created_by: Some("commit".into()),
                ..HistoryEntry::default()
            });
            let all = config.history_steps(3);
            let last = all.last().unwrap();
            assert_eq!(last.entry.created_by.as_deref(), Some("commit"), "{steps}");
            assert_eq!(last.layer, Some(2), "{steps}");
        }
    }

    #[test]
    fn nulls_and_keys_that_come_twice_are_read_as_go_reads_them() {
        let json = br#"{"architecture":"arm","architecture":"amd64","os":null,"config":{
            "Labels":{"a":null,"b":"c"},"Env":["A=1",null],"Cmd":null,"StopSignal":null},
            "rootfs":{"type":null,"diff_ids":null},"history":[null,{"created_by":null}]}"#;
        let config = ImageConfig::from_json(json).unwrap();
        assert_eq!(config.architecture, "amd64");
        assert_eq!(config.config.labels["a"], "");
        assert_eq!(config.config.env, ["A=1", ""]);
        assert_eq!(config.rootfs, RootFs::default());
        assert_eq!(config.history.len(), 2);
    }
}
