//! Which hosts are asked for what is in a registry: `hosts.toml` as containerd has it (its docs/hosts.md).
//! docs/registry.md, "Mirrors: hosts.toml".

mod all;
mod file;

pub use all::{HostsFile, all_hosts_files};

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::Url;
use reqwest::header::HeaderMap;
use vellum_base::error::{Error, ErrorKind, Result};

use super::reference::{host_of, is_local};
use super::tls::Trust;
use file::File;

/// Names other directories than these, with `:` between them.
const VARIABLE: &str = "VELLUM_CERTS_D";
const PLACES: [&str; 2] = ["/etc/vellum/certs.d", "/etc/containerd/certs.d"];
/// The directory for registries that have none.
const DEFAULT: &str = "_default";
pub(crate) const FILE: &str = "hosts.toml";
/// How long a connection may take to come about, where nothing is said.
const CONNECT: Duration = Duration::from_secs(10);
/// The longest file that is read.
const MAX_FILE: u64 = 1 << 20;
/// What was warned about in this process.
static WARNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// What a host is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// What is asked for by its digest.
    pub pull: bool,
    /// Tags.
    pub resolve: bool,
    pub push: bool,
}

impl Capabilities {
    const ALL: Capabilities = Capabilities {
        pull: true,
        resolve: true,
        push: true,
    };
}

/// A host, and how it is spoken to.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// What its credentials are kept under.
    pub name: String,
    /// The address of its API, with a slash behind it.
    pub base: Url,
    pub capabilities: Capabilities,
    pub trust: Trust,
    pub headers: HeaderMap,
    /// How long a connection may take to come about.
    pub connect: Duration,
    pub proxy: Option<Url>,
    /// The registry whose images are asked for, where it is another one.
    pub namespace: Option<String>,
}

/// The address of a registry's own API.
fn own_base(registry: &str, plain: bool) -> Result<Url> {
    let scheme = match plain || is_local(registry) {
        true => "http",
        false => "https",
    };
    Url::parse(&format!("{scheme}://{}/v2/", host_of(registry))).map_err(|error| {
        let text = format!("{registry:?} is not the name of a registry: write HOST[:PORT]");
        Error::with_source(ErrorKind::InvalidInput, text, error)
    })
}

/// Where directories of registries are.
pub(crate) fn places() -> Vec<PathBuf> {
    match std::env::var_os(VARIABLE) {
        Some(named) => std::env::split_paths(&named).collect(),
        None => PLACES.iter().map(PathBuf::from).collect(),
    }
}

/// What the directory of a registry may be called.
pub(crate) fn directories(registry: &str) -> Vec<String> {
    match registry.rsplit_once(':') {
        Some((host, port)) => vec![format!("{host}_{port}_"), registry.to_owned()],
        None => vec![registry.to_owned()],
    }
}

/// The file for a registry. What may not be looked at is not gone round.
fn file_for(registry: &str) -> Result<Option<PathBuf>> {
    let places = places();
    let own = directories(registry);
    let own = places
        .iter()
        .flat_map(|place| own.iter().map(|name| place.join(name)));
    let default = places.iter().map(|place| place.join(DEFAULT));
    for file in own.chain(default).map(|dir| dir.join(FILE)) {
        let there = file.try_exists();
        if there.map_err(|error| unreadable(&file, error))? {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

fn unreadable(path: &Path, error: std::io::Error) -> Error {
    let text = format!(
        "cannot read {}: look who may read it, or move it away",
        path.display()
    );
    Error::io(text, error)
}

fn read(path: &Path) -> Result<String> {
    let failed = |error| unreadable(path, error);
    let len = std::fs::metadata(path).map_err(failed)?.len();
    if len > MAX_FILE {
        let text = format!("{}: more than {MAX_FILE} bytes", path.display());
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    std::fs::read_to_string(path).map_err(failed)
}

/// The hosts that are asked for what is in a registry, in order, the registry itself or what stands in its place as the last
/// one. `plain` is said of the registry alone.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a file that is wrong; the message names it and the key.
pub(crate) fn of(registry: &str, plain: bool) -> Result<Vec<Place>> {
    let Some(path) = file_for(registry)? else {
        let base = own_base(registry, plain)?;
        return Ok(vec![Place {
            name: registry.to_owned(),
            base,
            capabilities: Capabilities::ALL,
            trust: Trust::of(registry),
            headers: HeaderMap::new(),
            connect: CONNECT,
            proxy: None,
            namespace: None,
        }]);
    };
    let text = read(&path)?;
    let file = File {
        path: &path,
        registry,
    };
    for key in file.unknown(&text)? {
        let said = format!("{}: {key} is not known here, and ignored", path.display());
        if WARNED.lock().insert(said.clone()) {
            tracing::warn!("{said}");
        }
    }
    file.places(&text, plain)
}

#[cfg(test)]
mod tests {
    use super::super::tls::ClientFiles;
    use super::all::registry_of;
    use super::*;

    fn places(registry: &str, text: &str) -> Vec<Place> {
        let path = Path::new("/etc/vellum/certs.d/x/hosts.toml");
        File { path, registry }.places(text, false).unwrap()
    }

    #[test]
    fn hosts_are_asked_in_the_order_of_the_file_and_the_server_last() {
        let text = "
            [host.'https://z.example']
              capabilities = ['pull']
            [host.'https://z.example'.header]
              x = 'y'
            [host.'http://a.example:5000']
        ";
        let found = places("docker.io", text);
        let bases: Vec<_> = found.iter().map(|place| place.base.as_str()).collect();
        let expected = [
            "https://z.example/v2/",
            "http://a.example:5000/v2/",
            "https://registry-1.docker.io/v2/",
        ];
        assert_eq!(bases, expected);
        let [z, a, server] = &found[..] else {
            panic!("{found:?}")
        };
        assert!(z.capabilities.pull && !z.capabilities.resolve && !z.capabilities.push);
        assert_eq!(a.capabilities, Capabilities::ALL);
        assert_eq!(z.headers["x"], "y");
        assert!(a.headers.is_empty() && server.headers.is_empty());
        assert_eq!((&*a.name, &*server.name), ("a.example:5000", "docker.io"));
        assert_eq!(a.namespace.as_deref(), Some("docker.io"));
        assert_eq!(server.namespace, None);
    }

    #[test]
    fn addresses_and_paths_are_those_that_containerd_makes_of_them() {
        for (registry, text, base, namespace) in [
            (
                "r.example",
                "server = 'r.example'",
                "https://r.example/v2/",
                None,
            ),
            (
                "r.example:443",
                "server = 'https://r.example'",
                "https://r.example/v2/",
                None,
            ),
            (
                "r.example",
                "server = 'http://r.example'",
                "http://r.example/v2/",
                None,
            ),
            (
                "docker.io",
                "server = 'https://docker.io'",
                "https://registry-1.docker.io/v2/",
                None,
            ),
            (
                "r.example",
                "server = 'https://m.example/v2'",
                "https://m.example/v2/",
                Some("r.example"),
            ),
            (
                "r.example",
                "server = 'https://m.example/a/'",
                "https://m.example/a/v2/",
                Some("r.example"),
            ),
            (
                "r.example",
                "server = 'https://m.example/a'\noverride_path = true",
                "https://m.example/a/",
                Some("r.example"),
            ),
        ] {
            let found = places(registry, text);
            assert_eq!(found[0].base.as_str(), base, "{text}");
            assert_eq!(found[0].namespace.as_deref(), namespace, "{text}");
        }
    }

    #[test]
    fn files_of_certificates_are_named_in_each_way_and_lie_beside_the_file() {
        let dir = Path::new("/etc/vellum/certs.d/x");
        let files = |certificate: &str, key: &str| ClientFiles {
            certificate: dir.join(certificate),
            key: dir.join(key),
        };
        for (text, roots, clients) in [
            ("ca = 'a'", vec!["a"], vec![]),
            ("ca = ['a', '/b']", vec!["a", "/b"], vec![]),
            ("client = 'c'", vec![], vec![files("c", "c")]),
            (
                "client = ['c', 'd']",
                vec![],
                vec![files("c", "c"), files("d", "d")],
            ),
            (
                "client = [['c', 'k'], ['/d', '']]",
                vec![],
                vec![files("c", "k"), files("/d", "/d")],
            ),
        ] {
            let trust = &places("r.example", text)[0].trust;
            let roots: Vec<_> = roots.into_iter().map(|name| dir.join(name)).collect();
            assert_eq!((&trust.roots, &trust.clients), (&roots, &clients), "{text}");
        }
    }

    #[test]
    fn directories_are_called_as_containerd_calls_them() {
        assert_eq!(
            directories("r.example:5000"),
            ["r.example_5000_", "r.example:5000"]
        );
        assert_eq!(directories("docker.io"), ["docker.io"]);
        assert_eq!(registry_of("r.example_5000_"), "r.example:5000");
        for same in ["docker.io", "_default", "a_b_"] {
            assert_eq!(registry_of(same), same);
        }
    }
}
