//! The file `index.json` of an OCI layout: the OCI image specification 1.1, image-layout.md.

use serde::Deserialize;
use serde_json::{Value, json};
use vellum_base::error::{Error, ErrorKind, Result};

use super::super::document::{Descriptor, Document, INDEX_TYPE, REF_NAME};

/// The longest that is read, in bytes.
pub(crate) const MAX_INDEX: u64 = 8 << 20;

/// An index whose other entries, and what nobody here knows of, stay as they are when it is changed.
#[derive(Debug, Clone)]
pub(crate) struct Index(Value);

impl Index {
    /// One without entries.
    pub fn empty() -> Self {
        Index(json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [] }))
    }

    /// Reads what anybody may have written.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`].
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| {
            let text = "index.json is not the JSON that the specification asks for";
            Error::with_source(ErrorKind::Corrupt, text, error)
        })?;
        let index = Index(value);
        index.entries()?;
        Ok(index)
    }

    /// What it leads to.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`].
    pub fn entries(&self) -> Result<Vec<Descriptor>> {
        let entries = match self.0.get("manifests") {
            // Go writes it for what is empty.
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(entries) => Vec::<Descriptor>::deserialize(entries),
        };
        entries.map_err(|error| {
            let text = "the entries of index.json make no sense";
            Error::with_source(ErrorKind::Corrupt, text, error)
        })
    }

    /// The entry of a tag. Without one that of `latest`, or the one that is alone.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`].
    pub fn find(&self, tag: Option<&str>) -> Result<Option<Descriptor>> {
        let mut entries = self.entries()?;
        let wanted = tag.unwrap_or("latest");
        let named = |entry: &Descriptor| entry.annotation(REF_NAME) == Some(wanted);
        if let Some(at) = entries.iter().position(named) {
            return Ok(Some(entries.swap_remove(at)));
        }
        match (tag, entries.len()) {
            (None, 1) => Ok(entries.pop()),
            _ => Ok(None),
        }
    }

    /// The tags of its entries, for a message.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`].
    pub fn tags(&self) -> Result<Vec<String>> {
        let entries = self.entries()?;
        let tags = entries
            .iter()
            .filter_map(|entry| entry.annotation(REF_NAME));
        Ok(tags.map(str::to_owned).collect())
    }

    /// Has a tag lead to a document, whatever it led to. False where it did so already.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for what is no index.
    pub fn set(&mut self, tag: &str, document: &Document) -> Result<bool> {
        let entry = json!({
            "mediaType": document.media_type,
            "digest": document.digest,
            "size": document.bytes.len(),
            "annotations": { REF_NAME: tag },
        });
        let index = self.0.as_object_mut();
        let index =
            index.ok_or_else(|| Error::new(ErrorKind::Corrupt, "index.json is no object"))?;
        let entries = index.entry("manifests").or_insert_with(|| json!([]));
        if entries.is_null() {
            *entries = json!([]);
        }
        let entries = entries.as_array_mut();
        let entries =
            entries.ok_or_else(|| Error::new(ErrorKind::Corrupt, "index.json has no list"))?;
        let named = |entry: &Value| {
            let annotations = entry.get("annotations");
            let name = annotations.and_then(|all| all.get(REF_NAME));
            name.and_then(Value::as_str) == Some(tag)
        };
        // All of the name: of several the first one counts.
        let mut of_name = entries.iter().filter(|entry| named(entry));
        if of_name.next() == Some(&entry) && of_name.next().is_none() {
            return Ok(false);
        }
        entries.retain(|entry| !named(entry));
        entries.push(entry);
        Ok(true)
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        self.0.to_string().into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(digit: &str) -> Document {
        Document {
            media_type: INDEX_TYPE.into(),
            digest: format!("sha256:{}", digit.repeat(64)),
            bytes: b"{}".to_vec(),
        }
    }

    #[test]
    fn a_tag_moves_and_all_else_stays_as_it_was() {
        let others =
            r#"{"schemaVersion":2,"x":[1],"manifests":[{"digest":"sha256:0","size":1,"y":2}]}"#;
        let mut index = Index::parse(others.as_bytes()).unwrap();
        assert!(index.set("a", &document("1")).unwrap());
        assert!(index.set("b", &document("2")).unwrap());
        assert!(index.set("a", &document("3")).unwrap());
        assert!(!index.set("a", &document("3")).unwrap());
        let read = Index::parse(&index.encode()).unwrap();
        assert_eq!(read.tags().unwrap(), ["b", "a"]);
        assert_eq!(read.0["x"], json!([1]));
        assert_eq!(read.0["manifests"][0]["y"], 2);
        let found = read.find(Some("a")).unwrap().unwrap();
        assert_eq!(found.digest, document("3").digest);
        assert!(read.find(None).unwrap().is_none());
    }

    #[test]
    fn a_tag_that_several_entries_have_becomes_that_of_one() {
        let mut index = Index::parse(br#"{"manifests":[]}"#).unwrap();
        index.set("b", &document("2")).unwrap();
        index.set("a", &document("1")).unwrap();
        // As others may write it: the first one of a name is the one that is found.
        let mut first = index.0["manifests"][0].clone();
        first["annotations"][REF_NAME] = json!("a");
        index.0["manifests"][0] = first;
        assert!(index.set("a", &document("1")).unwrap());
        assert_eq!(index.tags().unwrap(), ["a"]);
        let found = index.find(Some("a")).unwrap().unwrap();
        assert_eq!(found.digest, document("1").digest);
    }

    #[test]
    fn an_entry_that_is_alone_needs_no_tag() {
        let mut index = Index::parse(br#"{"manifests":null}"#).unwrap();
        assert!(index.find(None).unwrap().is_none());
        index.set("v1", &document("1")).unwrap();
        assert!(index.find(None).unwrap().is_some());
        assert!(index.find(Some("v2")).unwrap().is_none());
        for bad in ["", "[]x", r#"{"manifests":{}}"#, r#"{"manifests":[{}]}"#] {
            let error = Index::parse(bad.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{bad}");
        }
    }
}
