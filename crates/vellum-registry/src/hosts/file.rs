//! One `hosts.toml`: its keys, and the hosts that they make.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use toml::Spanned;
use vellum_base::error::{Error, ErrorKind, Result};

use super::super::reference::host_of;
use super::super::tls::{ClientFiles, Trust};
use super::{CONNECT, Capabilities, Place, own_base};

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

#[derive(Deserialize)]
pub(super) struct Top {
    pub server: Option<String>,
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
pub(super) struct File<'a> {
    pub path: &'a Path,
    pub registry: &'a str,
}

impl File<'_> {
    fn bad(&self, key: &str, why: impl std::fmt::Display) -> Error {
        let text = format!(
            "{}: {key}: {why}: mend it (docs/registry.md says what can stand there), or move the file away",
            self.path.display()
        );
        Error::new(ErrorKind::InvalidInput, text)
    }

    pub fn parse<T: serde::de::DeserializeOwned>(&self, text: &str) -> Result<T> {
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
    pub fn places(&self, text: &str, plain: bool) -> Result<Vec<Place>> {
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
    pub fn unknown(&self, text: &str) -> Result<Vec<String>> {
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
