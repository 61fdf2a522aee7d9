//! Which hosts are asked for what is in a registry: `hosts.toml` as containerd has it (its docs/hosts.md).
//! docs/registry.md, "Mirrors: hosts.toml".

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use toml::Spanned;
use vellum_base::error::{Error, ErrorKind, Result};

use super::reference::{host_of, is_local};
use super::tls::{self, ClientFiles, Trust};

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
/// The keys of a host, and of the server at the top.
const KEYS: [&str; 8] = [
    "capabilities",
    "ca",
    "client",
    "skip_verify",
    "header",
    "override_path",
    "dial_timeout",
    "proxy",
];
/// Those at the top alone.
const TOP_KEYS: [&str; 2] = ["server", "host"];

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

#[derive(Deserialize)]
struct Top {
    server: Option<String>,
    #[serde(default)]
    host: BTreeMap<Spanned<String>, Keys>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Keys {
    capabilities: Vec<Capability>,
    ca: OneOrMany,
    client: Pairs,
    skip_verify: bool,
    header: BTreeMap<String, OneOrMany>,
    override_path: bool,
    dial_timeout: Option<String>,
    proxy: Option<String>,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Capability {
    Pull,
    Resolve,
    Push,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings is wanted")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Default for OneOrMany {
    fn default() -> Self {
        OneOrMany::Many(Vec::new())
    }
}

impl OneOrMany {
    fn all(&self) -> &[String] {
        match self {
            OneOrMany::One(one) => std::slice::from_ref(one),
            OneOrMany::Many(many) => many,
        }
    }
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "a file, a list of files, or a list of pairs of a certificate and a key is wanted"
)]
enum Pairs {
    One(String),
    Many(Vec<Pair>),
}

impl Default for Pairs {
    fn default() -> Self {
        Pairs::Many(Vec::new())
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Pair {
    Both(String),
    Apart(String, String),
}

/// A file, with what its messages need.
struct File<'a> {
    path: &'a Path,
    registry: &'a str,
}

impl File<'_> {
    fn bad(&self, key: &str, why: impl std::fmt::Display) -> Error {
        let text = format!(
            "{}: {key}: {why}: mend it (docs/registry.md says what can stand there), or move the file away",
            self.path.display()
        );
        Error::new(ErrorKind::InvalidInput, text)
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, text: &str) -> Result<T> {
        toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start.min(text.len()));
            let before = text
                .get(..start)
                .map_or(0, |before| before.matches('\n').count());
            // Not what stands there: it may be a secret.
            self.bad(&format!("line {}", before + 1), error.message())
        })
    }

    /// A file that it names.
    fn named(&self, name: &str) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("/")).join(name)
    }

    /// The hosts that it names, in order, with the server as the last one.
    fn places(&self, text: &str, plain: bool) -> Result<Vec<Place>> {
        let top: Top = self.parse(text)?;
        let keys: Keys = self.parse(text)?;
        let mut hosts: Vec<_> = top.host.into_iter().collect();
        hosts.sort_by_key(|(address, _)| address.span().start);
        let mut places = Vec::with_capacity(hosts.len() + 1);
        for (address, keys) in &hosts {
            let address = address.get_ref();
            let key = format!("host.{address:?}");
            let base = self.base(&key, address, keys.override_path)?;
            places.push(self.place(&key, base, keys)?);
        }
        places.push(match &top.server {
            Some(server) => {
                let base = self.base("server", server, keys.override_path)?;
                self.place("server", base, &keys)?
            }
            None => Place {
                name: self.registry.to_owned(),
                base: own_base(self.registry, plain)?,
                namespace: None,
                ..self.place("server", own_base(self.registry, plain)?, &keys)?
            },
        });
        Ok(places)
    }

    /// The address of a host's API.
    fn base(&self, key: &str, address: &str, override_path: bool) -> Result<Url> {
        let with_scheme = match address.contains("://") {
            true => address.to_owned(),
            false => format!("https://{address}"),
        };
        let url = Url::parse(&with_scheme).map_err(|error| self.bad(key, error))?;
        let host = url
            .host_str()
            .filter(|_| matches!(url.scheme(), "http" | "https"));
        let Some(host) = host.map(|host| host_of(host).to_owned()) else {
            return Err(self.bad(key, "it is no address of a host (https://HOST[:PORT])"));
        };
        let mut base = url.clone();
        base.set_host(Some(&host))
            .map_err(|error| self.bad(key, error))?;
        base.set_query(None);
        base.set_fragment(None);
        let path = url.path().trim_end_matches('/');
        let version = match override_path || path.ends_with("/v2") {
            true => "/",
            false => "/v2/",
        };
        base.set_path(&format!("{path}{version}"));
        Ok(base)
    }

    fn place(&self, key: &str, base: Url, keys: &Keys) -> Result<Place> {
        let sub = |name: &str| match key {
            "server" => name.to_owned(),
            key => format!("{key}.{name}"),
        };
        let Some(host) = base.host_str() else {
            return Err(self.bad(key, "it is no address of a host (https://HOST[:PORT])"));
        };
        let address = match base.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        let place = |url: &Url| {
            (
                url.host_str().map(str::to_owned),
                url.port_or_known_default(),
            )
        };
        let own = place(&own_base(self.registry, false)?) == place(&base);
        let own = own || address == host_of(self.registry);
        let name = if own {
            self.registry.to_owned()
        } else {
            address
        };
        let has = |one| keys.capabilities.is_empty() || keys.capabilities.contains(&one);
        let connect = keys.dial_timeout.as_deref().map(humantime::parse_duration);
        let connect = connect
            .transpose()
            .map_err(|error| self.bad(&sub("dial_timeout"), error))?;
        let proxy = keys.proxy.as_deref().map(Url::parse).transpose();
        let proxy = proxy.map_err(|error| self.bad(&sub("proxy"), error))?;
        if let Some(other) = proxy
            .as_ref()
            .filter(|url| !matches!(url.scheme(), "http" | "https"))
        {
            let why = format!(
                "{}: is no scheme of a proxy, but http and https are",
                other.scheme()
            );
            return Err(self.bad(&sub("proxy"), why));
        }
        let trust = Trust {
            name: name.clone(),
            roots: keys.ca.all().iter().map(|name| self.named(name)).collect(),
            clients: self.clients(&keys.client),
            skip_verify: keys.skip_verify,
        };
        Ok(Place {
            namespace: (!own).then(|| self.registry.to_owned()),
            name,
            base,
            capabilities: Capabilities {
                pull: has(Capability::Pull),
                resolve: has(Capability::Resolve),
                push: has(Capability::Push),
            },
            trust,
            headers: self.headers(&sub("header"), &keys.header)?,
            connect: connect.unwrap_or(CONNECT),
            proxy,
        })
    }

    fn clients(&self, pairs: &Pairs) -> Vec<ClientFiles> {
        let both = |file: &str| ClientFiles {
            certificate: self.named(file),
            key: self.named(file),
        };
        let pair = |pair: &Pair| match pair {
            Pair::Both(file) => both(file),
            Pair::Apart(file, key) if key.is_empty() => both(file),
            Pair::Apart(certificate, key) => ClientFiles {
                certificate: self.named(certificate),
                key: self.named(key),
            },
        };
        match pairs {
            Pairs::One(file) => vec![both(file)],
            Pairs::Many(many) => many.iter().map(pair).collect(),
        }
    }

    fn headers(&self, key: &str, named: &BTreeMap<String, OneOrMany>) -> Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        for (name, values) in named {
            let bad = |why: String| self.bad(&format!("{key}.{name}"), why);
            let header: HeaderName = name
                .parse()
                .map_err(|_| bad("no name of a header".into()))?;
            for value in values.all() {
                let mut value: HeaderValue = value
                    .parse()
                    .map_err(|_| bad("no value of a header".into()))?;
                // It may be a password.
                value.set_sensitive(true);
                headers.append(header.clone(), value);
            }
        }
        Ok(headers)
    }

    /// Keys that nobody knows.
    fn unknown(&self, text: &str) -> Result<Vec<String>> {
        let table: toml::Table = self.parse(text)?;
        let is_known = |key: &str| KEYS.contains(&key);
        let top = table
            .keys()
            .filter(|key| !is_known(key) && !TOP_KEYS.contains(&key.as_str()));
        let mut unknown: Vec<String> = top.cloned().collect();
        let hosts = table.get("host").and_then(toml::Value::as_table);
        for (host, keys) in hosts.into_iter().flatten() {
            let keys = keys.as_table().into_iter().flat_map(toml::Table::keys);
            let keys = keys.filter(|key| !is_known(key));
            unknown.extend(keys.map(|key| format!("host.{host:?}.{key}")));
        }
        Ok(unknown)
    }
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
fn file(registry: &str) -> Result<Option<PathBuf>> {
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
    let Some(path) = file(registry)? else {
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

/// What a `hosts.toml` says.
#[derive(Debug)]
pub struct HostsFile {
    /// Where it is.
    pub path: PathBuf,
    /// The registry, or `_default` for all others.
    pub registry: String,
    /// The addresses that are asked, in order; or what is wrong with the file, or with one that it names.
    pub hosts: Result<Vec<String>>,
    /// Keys that nobody knows.
    pub unknown: Vec<String>,
}

/// All files of this host that say which hosts are asked, sorted by their paths.
pub fn all_hosts_files() -> Vec<HostsFile> {
    let dirs = places()
        .into_iter()
        .filter_map(|place| std::fs::read_dir(place).ok());
    let mut dirs: Vec<PathBuf> = dirs.flatten().flatten().map(|entry| entry.path()).collect();
    dirs.sort();
    let there = dirs.into_iter().filter(|dir| dir.join(FILE).exists());
    there
        .filter_map(|dir| {
            let registry = registry_of(&dir.file_name()?.to_string_lossy());
            let path = dir.join(FILE);
            let looked = look(&path, &registry);
            let (hosts, unknown) = match looked {
                Ok((hosts, unknown)) => (Ok(hosts), unknown),
                Err(error) => (Err(error), Vec::new()),
            };
            Some(HostsFile {
                path,
                registry,
                hosts,
                unknown,
            })
        })
        .collect()
}

/// The registry that a directory is for: `HOST_PORT_` is `HOST:PORT`.
fn registry_of(directory: &str) -> String {
    let port = directory
        .strip_suffix('_')
        .and_then(|rest| rest.rsplit_once('_'));
    match port {
        Some((host, port)) if port.parse::<u16>().is_ok() => format!("{host}:{port}"),
        _ => directory.to_owned(),
    }
}

fn look(path: &Path, registry: &str) -> Result<(Vec<String>, Vec<String>)> {
    let text = read(path)?;
    let file = File { path, registry };
    let unknown = file.unknown(&text)?;
    // What stands in no file has no address: any will do.
    let registry = if registry == DEFAULT {
        "localhost"
    } else {
        registry
    };
    let places = File { path, registry }.places(&text, false)?;
    for place in &places {
        tls::configs(&place.trust)?;
    }
    let mut hosts: Vec<String> = places.iter().map(|place| place.base.to_string()).collect();
    if registry == "localhost" && file.parse::<Top>(&text)?.server.is_none() {
        hosts.pop();
        hosts.push("the registry itself".into());
    }
    Ok((hosts, unknown))
}

#[cfg(test)]
mod tests {
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
