//! What a user calls an image of a registry.

use std::fmt;
use std::net::IpAddr;

use oci_spec::distribution;
use vellum_base::error::{Error, ErrorKind, Result};

/// The name of an image in a registry, as docker reads it: `debian` is `docker.io/library/debian:latest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference(distribution::Reference);

impl Reference {
    /// Reads what a user wrote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`].
    pub fn parse(text: &str) -> Result<Self> {
        let parsed: Result<distribution::Reference, _> = text.parse();
        let bad = |why: &str| {
            Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{text:?} is not the name of an image in a registry ({why}): write \
                     HOST[:PORT]/REPOSITORY[:TAG|@DIGEST], in lower case but for the tag"
                ),
            )
        };
        let reference = parsed.map_err(|error| bad(&error.to_string()))?;
        if reference.repository().contains(char::is_uppercase) {
            return Err(bad("the repository has capital letters"));
        }
        Ok(Reference(reference))
    }

    /// The registry, as users and files of credentials call it: `docker.io`, `localhost:5000`.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// The repository in it: `library/debian`.
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// The digest, or else the tag, by which the manifest is asked for.
    pub fn identifier(&self) -> &str {
        let named = self.0.digest().or(self.0.tag());
        named.unwrap_or("latest")
    }

    /// The digest that was asked for.
    pub fn digest(&self) -> Option<&str> {
        self.0.digest()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The host that answers for a registry.
pub(crate) fn host_of(registry: &str) -> &str {
    match registry {
        "docker.io" | "index.docker.io" => "registry-1.docker.io",
        other => other,
    }
}

/// True for a registry on this very host, which is spoken to without TLS.
pub(crate) fn is_local(registry: &str) -> bool {
    let host = match registry.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => registry.split(':').next().unwrap_or(registry),
    };
    host == "localhost"
        || host
            .parse()
            .is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_docker_reads_them() {
        for (text, registry, repository, identifier) in [
            ("debian", "docker.io", "library/debian", "latest"),
            ("me/app:1", "docker.io", "me/app", "1"),
            ("localhost:5000/a/b:c", "localhost:5000", "a/b", "c"),
            ("127.0.0.1:5000/a", "127.0.0.1:5000", "a", "latest"),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!(reference.registry(), registry, "{text}");
            assert_eq!(reference.repository(), repository, "{text}");
            assert_eq!(reference.identifier(), identifier, "{text}");
        }
        let digest = format!("sha256:{}", "0".repeat(64));
        let pinned = Reference::parse(&format!("ghcr.io/a/b:c@{digest}")).unwrap();
        assert_eq!(pinned.identifier(), digest);
        for bad in ["", "UPPER", "a b", "a/:tag", "https://ghcr.io/a"] {
            let error = Reference::parse(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{bad}");
        }
    }

    #[test]
    fn only_this_host_is_spoken_to_without_tls() {
        for local in [
            "localhost",
            "localhost:5000",
            "127.0.0.1",
            "127.9.9.9:1",
            "[::1]:5000",
        ] {
            assert!(is_local(local), "{local}");
        }
        for other in [
            "docker.io",
            "localhost.example",
            "10.0.0.1:5000",
            "[2001:db8::1]:5000",
        ] {
            assert!(!is_local(other), "{other}");
        }
    }
}
