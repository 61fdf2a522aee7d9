//! What an artifact says of its image, plain or encrypted: docs/encryption.md, "Bytes".

use serde::{Deserialize, Serialize};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_registry::artifact::{DIGEST_ANNOTATION, LayerKey, Salt, TEMPLATE_ANNOTATION, Table};
use vellum_registry::{Descriptor, Identities, Recipients};
use zeroize::Zeroizing;

use super::description::Description;
use super::layout::{Layout, digest_of};

/// With what a push encrypts.
#[derive(Debug)]
pub(super) struct Sealing {
    pub recipients: Recipients,
    pub salt: Salt,
}

/// What must not be public of an encrypted layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Secret {
    /// As registries write it.
    pub digest: String,
    /// The key of the empty file system that the layer is, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    pub key: LayerKey,
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    description: Description,
    layers: Vec<Secret>,
}

/// The configuration of an encrypted artifact.
///
/// # Errors
/// [`ErrorKind::Internal`].
pub(super) fn seal(
    description: Description,
    layers: Vec<Secret>,
    recipients: &Recipients,
) -> Result<Vec<u8>> {
    let sealed = Sealed {
        description,
        layers,
    };
    let json = serde_json::to_vec(&sealed).map(Zeroizing::new);
    let json =
        json.map_err(|error| Error::internal(format!("an image cannot be described: {error}")))?;
    recipients.encrypt(&json)
}

/// A configuration that was read.
pub(super) struct Opened {
    pub description: Description,
    /// Of each layer; `None` of an artifact that is not encrypted.
    secrets: Option<Vec<Secret>>,
}

impl Opened {
    /// Reads what anybody may have written.
    ///
    /// # Errors
    /// As [`Description::decode`].
    pub fn plain(bytes: &[u8]) -> Result<Self> {
        Ok(Opened {
            description: Description::decode(bytes)?,
            secrets: None,
        })
    }

    /// Reads what anybody may have encrypted to one of these.
    ///
    /// # Errors
    /// As [`Opened::plain`] and [`Identities::decrypt`].
    pub fn encrypted(bytes: &[u8], identities: &Identities) -> Result<Self> {
        let json = identities.decrypt(bytes)?;
        let sealed: Sealed = serde_json::from_slice(&json).map_err(|error| {
            // Where the fault is, and not what is there: it may be a key.
            let (line, column) = (error.line(), error.column());
            let text = format!(
                "what the encrypted artifact says of its image makes no sense (line {line}, column {column})"
            );
            Error::new(ErrorKind::Corrupt, text)
        })?;
        sealed.description.check()?;
        Ok(Opened {
            description: sealed.description,
            secrets: Some(sealed.layers),
        })
    }

    /// Whether it is of so many layers.
    pub fn is_of(&self, layers: usize) -> bool {
        let secrets = self.secrets.as_ref().map_or(layers, Vec::len);
        self.description.layers.len() == layers && secrets == layers
    }

    /// The key of a layer, which is the bottommost for 0; `None` where the artifact is not encrypted.
    pub fn key(&self, layer: usize) -> Option<LayerKey> {
        self.secret(layer).map(|secret| secret.key.clone())
    }

    fn secret(&self, layer: usize) -> Option<&Secret> {
        self.secrets.as_ref()?.get(layer)
    }

    /// The key of the empty file system that a layer is, if it is one; `entry` is the table's.
    pub fn template<'a>(&'a self, layer: usize, entry: &'a Descriptor) -> Option<&'a str> {
        match self.secret(layer) {
            Some(secret) => secret.template.as_deref(),
            None => entry.annotation(TEMPLATE_ANNOTATION),
        }
    }

    /// Takes a table that was fetched apart, whose entry is `entry`.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`]; also for an encrypted table of an artifact that is not, or the
    /// other way round.
    pub fn table(&self, layer: usize, entry: &Descriptor, layout: &Layout) -> Result<Table> {
        let named = |error: Error| error.context(format!("the table {}", entry.digest));
        let bytes = layout.read(&entry.digest)?;
        let (table, said) = match self.secret(layer) {
            Some(secret) => {
                let table = Table::decode_encrypted(&bytes, &secret.key);
                (table.map_err(named)?, Some(secret.digest.as_str()))
            }
            None => {
                let table = Table::decode(&bytes).map_err(named)?;
                (table, entry.annotation(DIGEST_ANNOTATION))
            }
        };
        if said != Some(&digest_of(table.digest)) {
            let text = format!(
                "the table {} is of another layer than the manifest says",
                entry.digest
            );
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vellum_base::block::{BLOCK_LEN, Block, WindowPower};
    use vellum_registry::artifact::LayerEncoder;
    use vellum_store::Store;

    use super::*;

    const IDENTITY: &str =
        "AGE-SECRET-KEY-1ZDZY73EM0K9NME3N2J7KLX8HW9DQ3GKHLVSK083ZCAZ297PS6SVQ0Z2MGX";
    const RECIPIENT: &str = "age1e8hq79vkgy7x4tk74yskpek858ws60pgrz04awjzwcjkjs8h5swqdj6xlf";

    struct Stage {
        _dir: tempfile::TempDir,
        layout: Layout,
        salt: Salt,
        table: Table,
        identities: Identities,
        recipients: Recipients,
    }

    impl Stage {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open_or_create(&dir.path().join("store")).unwrap();
            let file = dir.path().join("key");
            std::fs::write(&file, IDENTITY).unwrap();
            let salt = Salt::random().unwrap();
            let encoder = LayerEncoder::new(Vec::new(), WindowPower::USUAL, 3).unwrap();
            let mut encoder = encoder.encrypted(Some(&salt));
            encoder.data(Block::FIRST, &[1; BLOCK_LEN]).unwrap();
            let table = encoder.finish(1 << 20, [7; 32]).unwrap().table;
            Stage {
                layout: Layout::new(&store).unwrap(),
                _dir: dir,
                salt,
                table,
                identities: Identities::find(&[file]).unwrap(),
                recipients: Recipients::parse(&[RECIPIENT.to_owned()]).unwrap(),
            }
        }

        /// The table's entry, and its layer's key.
        fn encrypted(&self) -> (Descriptor, LayerKey) {
            let (bytes, key) = self.table.encode_encrypted(&self.salt).unwrap();
            (self.add(&bytes), key)
        }

        fn add(&self, bytes: &[u8]) -> Descriptor {
            let blob = self.layout.add(bytes).unwrap();
            let entry = json!({ "mediaType": "x", "digest": blob.digest, "size": blob.size });
            serde_json::from_value(entry).unwrap()
        }

        fn opened(&self, digest: [u8; 32], key: LayerKey) -> Opened {
            let secret = Secret {
                digest: digest_of(digest),
                template: None,
                key,
            };
            let description = serde_json::from_value(description()).unwrap();
            let sealed = seal(description, vec![secret], &self.recipients).unwrap();
            Opened::encrypted(&sealed, &self.identities).unwrap()
        }
    }

    fn description() -> serde_json::Value {
        json!({ "virtual_size": 1 << 20, "config": {}, "layers": [{ "origin": "a test" }] })
    }

    #[test]
    fn a_table_is_taken_by_its_key_if_it_is_of_the_layer_that_the_configuration_says() {
        let stage = Stage::new();
        let (entry, key) = stage.encrypted();
        let opened = stage.opened([7; 32], key.clone());
        assert!(opened.is_of(1) && !opened.is_of(2));
        let table = opened.table(0, &entry, &stage.layout).unwrap();
        assert_eq!(table, stage.table);
        let other = stage.opened([8; 32], key);
        let error = other.table(0, &entry, &stage.layout).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("another layer"), "{error}");
    }

    #[test]
    fn plain_and_encrypted_parts_are_not_mixed() {
        let stage = Stage::new();
        let (entry, key) = stage.encrypted();
        let plain = serde_json::to_vec(&description()).unwrap();
        let plain = Opened::plain(&plain).unwrap();
        let error = plain.table(0, &entry, &stage.layout).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
        let mut table = stage.table.clone();
        table.chunks.iter_mut().for_each(|chunk| chunk.key = None);
        let entry = stage.add(&table.encode().unwrap());
        let encrypted = stage.opened([7; 32], key);
        let error = encrypted.table(0, &entry, &stage.layout).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }

    #[test]
    fn a_configuration_that_makes_no_sense_is_an_error_that_shows_nothing_of_it() {
        let stage = Stage::new();
        let secret = "\"0123456789abcdef\"";
        let text = format!(
            "{{\"description\": {}, \"layers\": {secret}}}",
            description()
        );
        let sealed = stage.recipients.encrypt(text.as_bytes()).unwrap();
        let error = Opened::encrypted(&sealed, &stage.identities).map(drop);
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(
            !format!("{error} {error:?}").contains("0123456789"),
            "{error:?}"
        );
    }
}
