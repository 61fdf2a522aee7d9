//! Whom hosts are believed to be, and who they are shown that we are: the roots of this host, and what it keeps for single
//! registries.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use vellum_base::error::{Error, ErrorKind, Result};

use super::hosts;

/// Where docker and podman look for the files of a registry, in a directory of its name.
const PLACES: [&str; 2] = ["/etc/docker/certs.d", "/etc/containers/certs.d"];
/// And below a user's home.
const OWN_PLACES: [&str; 2] = [".config/docker/certs.d", ".config/containers/certs.d"];

/// A client's certificate and its key, which may be in the same file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClientFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// What is said of the TLS of a host.
#[derive(Debug, Clone)]
pub(crate) struct Trust {
    /// What users call it: what is kept for that name counts too.
    pub name: String,
    /// Files of roots.
    pub roots: Vec<PathBuf>,
    pub clients: Vec<ClientFiles>,
    /// Any certificate is taken.
    pub skip_verify: bool,
}

impl Trust {
    /// What is kept for a name, and no more.
    pub fn of(name: &str) -> Self {
        Trust {
            name: name.to_owned(),
            roots: Vec::new(),
            clients: Vec::new(),
            skip_verify: false,
        }
    }
}

/// TLS for a host, and for others that it sends us on to: those are not shown who we are.
#[derive(Debug, Clone)]
pub(crate) struct Configs {
    pub own: ClientConfig,
    pub elsewhere: ClientConfig,
}

/// # Errors
/// [`ErrorKind::InvalidInput`] for a file that cannot be read; the message names it.
pub(crate) fn configs(trust: &Trust) -> Result<Configs> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let failed = |error| Error::with_source(ErrorKind::Io, "TLS cannot be set up", error);
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(failed)?;
    let (kept_roots, mut kept_clients) = kept(&trust.name);
    // Nobody has named them here: a server that wants none is spoken to without.
    kept_clients.retain(|files| may_be_read(&files.key));
    let roots = roots(trust.roots.iter().chain(&kept_roots))?;
    let mut elsewhere = config.with_root_certificates(roots).with_no_client_auth();
    elsewhere.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let clients = trust.clients.iter().chain(&kept_clients);
    let clients: Vec<_> = clients
        .map(|files| client(files, &provider))
        .collect::<Result<_>>()?;
    let mut own = elsewhere.clone();
    if trust.skip_verify {
        let anybody = Arc::new(Anybody(provider));
        own.dangerous().set_certificate_verifier(anybody);
    }
    if !clients.is_empty() {
        own.client_auth_cert_resolver = Arc::new(Clients(clients));
    }
    Ok(Configs { own, elsewhere })
}

/// Whether this user may read a key; says so where not.
fn may_be_read(key: &Path) -> bool {
    match std::fs::File::open(key) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            tracing::warn!(
                "{} may not be read, and is left out: {error}",
                key.display()
            );
            false
        }
        _ => true,
    }
}

/// The roots of this host and of those files.
fn roots<'a>(files: impl Iterator<Item = &'a PathBuf>) -> Result<RootCertStore> {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!("a root certificate of this host cannot be read: {error}");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    for file in files {
        for certificate in certificates(file)? {
            let added = roots.add(certificate);
            added.map_err(|error| unusable(file, "root certificates", error))?;
        }
    }
    Ok(roots)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_file_iter(file).and_then(Iterator::collect);
    let certificates: Vec<_> =
        certificates.map_err(|error| unusable(file, "certificates", error))?;
    match certificates.is_empty() {
        true => Err(unusable(
            file,
            "certificates",
            rustls::Error::NoCertificatesPresented,
        )),
        false => Ok(certificates),
    }
}

fn client(files: &ClientFiles, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>> {
    let chain = certificates(&files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| unusable(&files.key, "a private key", error))?;
    let pair = CertifiedKey::from_der(chain, key, provider);
    let pair = pair.map_err(|error| {
        let what = format!("the key of {}", files.certificate.display());
        unusable(&files.key, &what, error)
    })?;
    Ok(Arc::new(pair))
}

fn unusable(
    file: &Path,
    what: &str,
    error: impl std::error::Error + Send + Sync + 'static,
) -> Error {
    let text = format!(
        "{} is no file of {what} (PEM): {error}: mend it, or move it away",
        file.display()
    );
    Error::with_source(ErrorKind::InvalidInput, text, error)
}

/// Certificates that a host may be shown.
#[derive(Debug)]
struct Clients(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for Clients {
    fn resolve(
        &self,
        root_hint_subjects: &[&[u8]],
        sigschemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        let signs = |pair: &&Arc<CertifiedKey>| pair.key.choose_scheme(sigschemes).is_some();
        let is_wanted = |pair: &&Arc<CertifiedKey>| {
            let mut names = root_hint_subjects.iter().filter(|name| !name.is_empty());
            // A name in DER is part of a certificate that it issued, as it is.
            names.any(|name| {
                let mut chain = pair.cert.iter();
                chain.any(|one| one.windows(name.len()).any(|part| part == *name))
            })
        };
        let first = self.0.iter().filter(signs).find(is_wanted);
        first.or_else(|| self.0.iter().find(signs)).cloned()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Takes any certificate, whose key the host has all the same.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The files that are kept for a name as docker has them: roots in `*.crt`, clients in `*.cert` and `*.key`.
fn kept(name: &str) -> (Vec<PathBuf>, Vec<ClientFiles>) {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let own = home
        .iter()
        .flat_map(|home| OWN_PLACES.map(|place| home.join(place)));
    let named = PLACES.iter().map(PathBuf::from).chain(own);
    let named = named.map(|place| place.join(name));
    let names = hosts::directories(name);
    let places = hosts::places();
    let containerds = places
        .iter()
        .flat_map(|place| names.iter().map(|name| place.join(name)))
        .filter(|dir| !dir.join(hosts::FILE).exists());
    let mut files: Vec<PathBuf> = named
        .chain(containerds)
        .filter_map(|dir| std::fs::read_dir(dir).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
        .collect();
    files.sort();
    let with = |wanted: &str| {
        let wanted = wanted.to_owned();
        move |path: &&PathBuf| {
            path.extension()
                .is_some_and(|extension| *extension == *wanted)
        }
    };
    let client = |certificate: &PathBuf| {
        let key = certificate.with_extension("key");
        ClientFiles {
            key: if key.exists() {
                key
            } else {
                certificate.clone()
            },
            certificate: certificate.clone(),
        }
    };
    let roots = files.iter().filter(with("crt")).cloned();
    let clients = files.iter().filter(with("cert")).map(client);
    (roots.collect(), clients.collect())
}
