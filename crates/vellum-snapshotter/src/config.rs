//! The configuration file of the snapshotter, `/etc/vellum/config.toml`.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::remote::{Remote, Source};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::size::{parse_bytes, parse_size};
use vellum_engine::lazy::Background;
use vellum_export::device::TransportChoice;
use vellum_store::SpacePolicy;

/// Where the file is by default; it need not be there.
pub const DEFAULT_PATH: &str = "/etc/vellum/config.toml";
/// Where containerd finds us by default.
pub const DEFAULT_ADDRESS: &str = "/run/vellum/vellum.sock";
/// The size of an image's file system, and of its containers'.
pub const DEFAULT_SIZE: u64 = 10 << 30;

/// What the file says; every key may be left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// 1.
    pub version: Option<u32>,
    /// The store.
    pub root: Option<PathBuf>,
    /// The socket.
    pub address: Option<PathBuf>,
    /// Size of file systems: `10G`.
    pub default_size: Option<String>,
    /// How snapshots are handed to containerd.
    #[serde(default)]
    pub mounts: MountMode,
    /// How requests come from the kernel.
    #[serde(default)]
    pub transport: TransportChoice,
    /// What is done while the store's disk is nearly full; `None` leaves it as `vellum space` set it.
    pub space: Option<SpacePolicy>,
    /// Where Prometheus finds counters.
    #[serde(default)]
    pub metrics: MetricsConfig,
    /// Layers that containerd wants of snapshots.
    #[serde(default)]
    pub diff: DiffConfig,
    /// Images that are used before they are here.
    #[serde(default)]
    pub remote: RemoteConfig,
    /// Kubernetes' image service.
    #[serde(default)]
    pub cri: CriConfig,
    /// The log.
    #[serde(default)]
    pub log: Log,
}

/// What Mounts answers with, where no label says anything else.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountMode {
    /// A bind of the directory that we mounted.
    #[default]
    Bind,
    /// The block device, which containerd or a virtual machine mounts.
    Device,
}

/// `[metrics]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// Address and port to listen on, without which there is no server: `127.0.0.1:9142`.
    pub address: Option<std::net::SocketAddr>,
}

/// `[diff]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiffConfig {
    /// containerd's own socket, in whose content store layers are put.
    pub containerd: Option<PathBuf>,
}

/// `[remote]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteConfig {
    /// Registries, or repositories in them with all below, whose block layers are taken: none where nothing is said.
    #[serde(default)]
    pub from: Vec<String>,
    /// How blocks come that nobody reads: `full`, as fast as they do; `20M`, so many bytes a second at most; `off`.
    pub background: Option<String>,
}

impl RemoteConfig {
    /// What the section says.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] with the key.
    pub fn remote(&self) -> Result<Remote> {
        let named = |key: &str, text: String| {
            Error::new(ErrorKind::InvalidInput, format!("[remote] {key}: {text}"))
        };
        let sources = self
            .from
            .iter()
            .map(|text| Source::parse(text).map_err(|error| named("from", error.to_string())));
        let background = match self.background.as_deref() {
            None | Some("full") => Some(Background { rate: None }),
            Some("off") => None,
            Some(rate) => {
                let rate = parse_bytes(rate).map_err(|text| {
                    named("background", format!("{text}; or say \"full\" or \"off\""))
                })?;
                Some(Background {
                    rate: NonZeroU64::new(rate),
                })
            }
        };
        Ok(Remote::new(sources.collect::<Result<_>>()?, background))
    }
}

/// `[cri]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CriConfig {
    /// The socket on which the image service is handed on to containerd, without which it is not.
    pub image_service: Option<PathBuf>,
    /// containerd's socket; where nothing is said, that of `[diff]`.
    pub upstream: Option<PathBuf>,
}

/// `[log]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: Option<String>,
    /// `text` or `json`.
    #[serde(default)]
    pub format: LogFormat,
}

/// How lines of the log look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Config {
    /// Reads the file at `path`; without one given, the default file if it is there.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] with line and key; [`ErrorKind::NotFound`] for a given path.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let (path, required) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => {
                return Ok(Config::default());
            }
            Err(error) => return Err(Error::io(format!("cannot read {}", path.display()), error)),
        };
        let wrong = |text: String| Error::new(ErrorKind::InvalidInput, text);
        let config: Config = toml::from_str(&text).map_err(|error| {
            let text = error.to_string().trim().replace('\n', " ");
            wrong(format!("{}: {text}", path.display()))
        })?;
        if config.version.is_some_and(|version| version != 1) {
            return Err(wrong(format!(
                "{}: version must be 1: this build knows no other",
                path.display()
            )));
        }
        for (key, given) in [
            ("root", &config.root),
            ("address", &config.address),
            ("[diff] containerd", &config.diff.containerd),
            ("[cri] image_service", &config.cri.image_service),
            ("[cri] upstream", &config.cri.upstream),
        ] {
            if let Some(given) = given {
                check_path(key, given).map_err(|error| error.context(path.display()))?;
            }
        }
        config
            .size()
            .map_err(|error| error.context(path.display()))?;
        config
            .remote
            .remote()
            .map_err(|error| error.context(path.display()))?;
        Ok(config)
    }

    /// The default size in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what is no size.
    pub fn size(&self) -> Result<u64> {
        self.default_size
            .as_deref()
            .map_or(Ok(DEFAULT_SIZE), |text| {
                parse_size(text).map_err(|error| {
                    Error::new(ErrorKind::InvalidInput, format!("default_size: {error}"))
                })
            })
    }
}

/// Makes sure that a path is a whole one: containerd, the kubelet and this daemon have different
/// working directories, and must mean the same.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a relative path and for none at all.
pub fn check_path(key: &str, path: &Path) -> Result<()> {
    if path.is_absolute() {
        return Ok(());
    }
    let said = match path.as_os_str().is_empty() {
        true => "is empty".to_owned(),
        false => format!("is {:?}, a relative path", path.display().to_string()),
    };
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!("{key} {said}: give an absolute one, that begins with /"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::load(Some(file.path()))
    }

    #[test]
    fn a_whole_file_is_understood() {
        let config = load(
            "version = 1\nroot = '/r'\naddress = '/s'\ndefault_size = '20G'\nmounts = 'device'\n\
             [space]\nrefuse = '5%'\nstop = '1G'\n\
             [metrics]\naddress = '127.0.0.1:9142'\n[diff]\ncontainerd = '/c'\n\
             [remote]\nfrom = ['registry.example/team']\nbackground = '20M'\n\
             [cri]\nimage_service = '/i'\nupstream = '/u'\n[log]\nlevel = 'debug'\nformat = 'json'\n",
        )
        .unwrap();
        assert_eq!(config.root.as_deref(), Some(Path::new("/r")));
        assert_eq!(config.size().unwrap(), 20 << 30);
        assert_eq!(config.mounts, MountMode::Device);
        assert_eq!(config.metrics.address.unwrap().port(), 9142);
        let space = config.space.unwrap().to_string();
        assert_eq!(space, "warn = 5%, refuse = 5%, stop = 1G");
        assert_eq!(config.diff.containerd.as_deref(), Some(Path::new("/c")));
        assert_eq!(config.cri.image_service.as_deref(), Some(Path::new("/i")));
        assert_eq!(config.cri.upstream.as_deref(), Some(Path::new("/u")));
        assert_eq!(config.log.format, LogFormat::Json);
    }

    #[test]
    fn mistakes_are_named_with_the_file() {
        for (text, word) in [
            ("version = 2", "version"),
            ("roots = '/r'", "roots"),
            ("default_size = 'big'", "default_size"),
            ("[log]\nformat = 'xml'", "xml"),
            ("[space]\nstop = '110%'", "110%"),
            ("mounts = 'copy'", "copy"),
            ("[metrics]\naddress = 'here'", "address"),
            ("root = ''", "root is empty"),
            ("root = 'store'", "root is \"store\", a relative path"),
            ("address = './v.sock'", "address is"),
            ("address = ''", "address is empty"),
            ("[remote]\nfrom = ['team/web']", "names no registry"),
            ("[remote]\nbackground = 'slow'", "[remote] background"),
            ("[diff]\ncontainerd = 'c.sock'", "containerd is \"c.sock\""),
            ("[cri]\nimage_service = 'i'", "[cri] image_service is \"i\""),
            ("[cri]\nupstream = ''", "[cri] upstream is empty"),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains('/'), "{error}");
        }
    }

    #[test]
    fn a_named_file_must_be_there() {
        let error = Config::load(Some(Path::new("/nonexistent/config.toml"))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}
