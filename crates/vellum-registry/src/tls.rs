//! Whom registries are believed to be: the roots of this host, and what it keeps for single registries.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use vellum_base::error::{Error, ErrorKind, Result};

/// Where docker, podman and containerd look for the roots of a registry, in a directory of its name.
const PLACES: [&str; 3] = [
    "/etc/docker/certs.d",
    "/etc/containers/certs.d",
    "/etc/containerd/certs.d",
];
/// And below a user's home.
const OWN_PLACES: [&str; 2] = [".config/docker/certs.d", ".config/containers/certs.d"];

/// TLS for a registry.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a file of roots that cannot be read.
pub(crate) fn config(registry: &str) -> Result<ClientConfig> {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!("a root certificate of this host cannot be read: {error}");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    for file in files(registry) {
        let certificates = CertificateDer::pem_file_iter(&file).and_then(Iterator::collect);
        let certificates: Vec<_> = certificates.map_err(|error| unusable(&file, error))?;
        for certificate in certificates {
            let added = roots.add(certificate);
            added.map_err(|error| unusable(&file, error))?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::with_source(ErrorKind::Io, "TLS cannot be set up", error))?;
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn unusable(file: &Path, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    let text = format!(
        "{} is no file of root certificates (PEM): mend it, or move it away",
        file.display()
    );
    Error::with_source(ErrorKind::InvalidInput, text, error)
}

/// The files `*.crt` that are kept for a registry.
fn files(registry: &str) -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let own = home
        .iter()
        .flat_map(|home| OWN_PLACES.map(|place| home.join(place)));
    let places = PLACES.iter().map(PathBuf::from).chain(own);
    let mut files: Vec<PathBuf> = places
        .filter_map(|place| std::fs::read_dir(place.join(registry)).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "crt"))
        .collect();
    files.sort();
    files
}
