//! Where an image is, as a user says it: in a registry, or in an OCI layout. docs/object-stores.md, "References".

use std::fmt;
use std::path::PathBuf;

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_image::blob_name;

use super::reference::Reference;

/// The longest tag, as the distribution specification has it.
const MAX_TAG: usize = 128;

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// In a registry.
    Registry(Reference),
    /// In an OCI layout, which is a directory or lies in a bucket.
    Layout(LayoutReference),
}

/// What holds an OCI layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// A directory of this host: `file`.
    Directory,
    /// A bucket of Amazon's S3, or what speaks as it does: `s3`.
    S3,
    /// A bucket of Google Cloud Storage: `gs`.
    Google,
    /// A container of Azure Blob Storage: `az`.
    Azure,
}

/// One image of an OCI layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutReference {
    /// What holds the layout.
    pub(crate) holder: Holder,
    /// Of a directory its path; else the bucket, and behind a `/` what the names of all objects begin with.
    pub(crate) path: String,
    tag: Option<String>,
    digest: Option<String>,
    /// What is said of the object store: its address and the like.
    pub(crate) settings: Vec<(String, String)>,
}

impl Holder {
    fn scheme(self) -> &'static str {
        match self {
            Holder::Directory => "file",
            Holder::S3 => "s3",
            Holder::Google => "gs",
            Holder::Azure => "az",
        }
    }

    /// What a reference may say of such a store, behind its `?`. None of it is a secret.
    pub(crate) fn settings(self) -> &'static [&'static str] {
        match self {
            Holder::Directory => &[],
            Holder::S3 => &["endpoint", "region"],
            Holder::Google => &["endpoint"],
            Holder::Azure => &["account", "endpoint"],
        }
    }
}

impl Location {
    /// Reads what a user wrote: what begins with the scheme of a holder is a layout's, all else a registry's.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`].
    pub fn parse(text: &str) -> Result<Self> {
        let holders = [Holder::Directory, Holder::S3, Holder::Google, Holder::Azure];
        let scheme = text.split_once("://");
        let Some((scheme, rest)) = scheme else {
            return Reference::parse(text).map(Location::Registry);
        };
        let Some(holder) = holders.into_iter().find(|one| one.scheme() == scheme) else {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{text:?}: images are in registries (HOST[:PORT]/REPOSITORY[:TAG], without a scheme) and below \
                     file://, s3://, gs:// and az://, not {scheme}://"
                ),
            ));
        };
        LayoutReference::parse(holder, rest)
            .map(Location::Layout)
            .map_err(|error| error.context(format!("{text:?}")))
    }

    /// The digest that was asked for.
    pub fn digest(&self) -> Option<&str> {
        match self {
            Location::Registry(reference) => reference.digest(),
            Location::Layout(reference) => reference.digest.as_deref(),
        }
    }

    /// What holds this image and those that belong together with it: a registry and namespace, or a layout.
    /// docs/encryption.md, "The salt".
    pub fn namespace(&self) -> String {
        match self {
            Location::Layout(reference) => reference.layout(),
            Location::Registry(reference) => match reference.repository().rsplit_once('/') {
                Some((namespace, _)) => format!("{}/{namespace}", reference.registry()),
                None => reference.registry().to_owned(),
            },
        }
    }

    /// What an image from there is called here, where nobody says and it was written as `text`. Digests are shortened.
    pub fn name(&self, text: &str) -> String {
        let text = text.split_once('?').map_or(text, |(text, _)| text);
        let Some((kind, digits)) = self.digest().and_then(|digest| digest.split_once(':')) else {
            return text.to_owned();
        };
        let digits: String = digits.chars().take(12).collect();
        let (place, _) = text.split_once('@').unwrap_or((text, ""));
        format!("{place}:{kind}-{digits}")
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Registry(reference) => reference.fmt(f),
            Location::Layout(reference) => reference.fmt(f),
        }
    }
}

impl LayoutReference {
    /// Reads what stands behind `SCHEME://`.
    fn parse(holder: Holder, text: &str) -> Result<Self> {
        let (text, settings) = match text.split_once('?') {
            Some((text, settings)) => (text, parse_settings(holder, settings)?),
            None => (text, Vec::new()),
        };
        let (text, digest) = match text.rsplit_once('@') {
            Some((text, digest)) => {
                blob_name(digest)?;
                (text, Some(digest.to_owned()))
            }
            None => (text, None),
        };
        let (path, tag) = match text.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => {
                check_tag(tag)?;
                (path, Some(tag.to_owned()))
            }
            _ => (text, None),
        };
        let path = path.trim_end_matches('/').to_owned();
        check_path(holder, &path)?;
        Ok(LayoutReference {
            holder,
            path,
            tag,
            digest,
            settings,
        })
    }

    /// The digest, or else the tag, by which the index has it; `None` where neither is said.
    pub(crate) fn identifier(&self) -> Option<&str> {
        self.digest.as_deref().or(self.tag.as_deref())
    }

    /// The tag by which it is pushed.
    pub(crate) fn tag(&self) -> &str {
        self.tag.as_deref().unwrap_or("latest")
    }

    /// A directory's path.
    pub(crate) fn dir(&self) -> PathBuf {
        PathBuf::from(&self.path)
    }

    /// The bucket, and what the names of its objects begin with.
    pub(crate) fn bucket(&self) -> (&str, &str) {
        self.path.split_once('/').unwrap_or((&self.path, ""))
    }

    /// What is said of the store under a name.
    pub(crate) fn setting(&self, name: &str) -> Option<&str> {
        let mut found = self.settings.iter().filter(|(key, _)| key == name);
        found.next().map(|(_, value)| value.as_str())
    }

    /// The layout, without the image in it.
    pub(crate) fn layout(&self) -> String {
        format!("{}://{}", self.holder.scheme(), self.path)
    }
}

impl fmt::Display for LayoutReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.layout())?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        for (index, (name, value)) in self.settings.iter().enumerate() {
            write!(f, "{}{name}={value}", if index == 0 { '?' } else { '&' })?;
        }
        Ok(())
    }
}

fn bad(why: String) -> Error {
    let text = format!(
        "{why}: write file:///DIR, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX, and behind it :TAG or \
         @DIGEST"
    );
    Error::new(ErrorKind::InvalidInput, text)
}

fn parse_settings(holder: Holder, text: &str) -> Result<Vec<(String, String)>> {
    let mut settings = Vec::new();
    for pair in text.split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if !holder.settings().contains(&name) || value.is_empty() {
            let known = match holder.settings() {
                [] => "nothing".to_owned(),
                known => known.join("=… and ") + "=…",
            };
            return Err(bad(format!(
                "?{pair} says nothing of a {}:// store, of which {known} can be said",
                holder.scheme()
            )));
        }
        settings.push((name.to_owned(), value.to_owned()));
    }
    Ok(settings)
}

fn check_tag(tag: &str) -> Result<()> {
    let begins = tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let all = tag
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    match begins && all && tag.len() <= MAX_TAG {
        true => Ok(()),
        false => Err(bad(format!(
            "{tag:?} is no tag (letters, digits, '_', '.' and '-', at most {MAX_TAG})"
        ))),
    }
}

fn check_path(holder: Holder, path: &str) -> Result<()> {
    let names = match holder {
        Holder::Directory => path
            .strip_prefix('/')
            .ok_or_else(|| bad(format!("{path:?} is no absolute path")))?,
        _ => path,
    };
    let plain = |name: &str| {
        !matches!(name, "" | "." | "..") && !name.contains(|c: char| c.is_control() || c == '\\')
    };
    match names.split('/').all(plain) {
        true => Ok(()),
        false => Err(bad(format!(
            "{path:?} has an empty name, '.', '..' or characters in it that no name has"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(text: &str) -> LayoutReference {
        match Location::parse(text).unwrap() {
            Location::Layout(layout) => layout,
            Location::Registry(other) => panic!("{text} is {other} of a registry"),
        }
    }

    #[test]
    fn layouts_are_read_as_they_are_written() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for (text, place, identifier) in [
            ("file:///a/b:c", "file:///a/b", Some("c")),
            ("file:///a:b/c", "file:///a:b/c", None),
            ("s3://bucket:1", "s3://bucket", Some("1")),
            ("s3://bucket/a/b/", "s3://bucket/a/b", None),
            (
                "gs://bucket/a:x?endpoint=https://here:1",
                "gs://bucket/a",
                Some("x"),
            ),
            (
                &format!("az://box/a@{digest}"),
                "az://box/a",
                Some(digest.as_str()),
            ),
        ] {
            let read = layout(text);
            assert_eq!(read.layout(), place, "{text}");
            assert_eq!(read.identifier(), identifier, "{text}");
            assert_eq!(layout(&read.to_string()), read, "{text}");
        }
        assert_eq!(layout("s3://bucket/a/b:1").bucket(), ("bucket", "a/b"));
        assert_eq!(layout("s3://bucket").bucket(), ("bucket", ""));
        let there = layout("s3://b/p:1?endpoint=http://127.0.0.1:8333&region=x");
        assert_eq!(there.setting("endpoint"), Some("http://127.0.0.1:8333"));
        assert_eq!(there.setting("region"), Some("x"));
    }

    #[test]
    fn what_is_no_layout_is_refused_with_what_to_write() {
        for bad in [
            "file://relative:1",
            "file:///a/../b:1",
            "s3://",
            "s3:///x",
            "s3://bucket//x",
            "s3://bucket/x:-a",
            "s3://bucket/x@sha256:1",
            "s3://bucket/x?secret=1",
            "file:///x?endpoint=y",
            "https://ghcr.io/a",
        ] {
            let error = Location::parse(bad).unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Corrupt),
                "{bad}: {error}"
            );
        }
        assert!(matches!(
            Location::parse("ghcr.io/a/b:c").unwrap(),
            Location::Registry(_)
        ));
    }

    #[test]
    fn an_image_is_called_as_it_was_written_without_what_is_said_of_the_store() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, name) in [
            ("debian:12".to_owned(), "debian:12"),
            ("s3://b/p:1?region=x".to_owned(), "s3://b/p:1"),
            (format!("s3://b/p@{digest}"), "s3://b/p:sha256-aaaaaaaaaaaa"),
        ] {
            assert_eq!(Location::parse(&text).unwrap().name(&text), name);
        }
    }
}
