//! Names and passwords, where docker and podman keep them.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::reference::host_of;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use docker_credential::{CredentialRetrievalError, DockerCredential};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// What Docker Hub is called in files of credentials.
const HUB: &str = "https://index.docker.io/v1/";

/// By what a registry knows its users.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Credential {
    /// A name and a password, for the registry itself or its token server.
    Password {
        /// The name.
        user: String,
        /// The password.
        password: String,
    },
    /// For which the token server gives tokens (OAuth2's refresh token).
    IdentityToken(String),
    /// A token that the registry itself takes.
    RegistryToken(String),
}

impl Credential {
    /// Reads a name and a password as docker's files have them: `NAME:PASSWORD` in base64. `None` for anything else.
    pub fn of_basic(text: &str) -> Option<Self> {
        let bytes = STANDARD.decode(text.trim()).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let (user, password) = text.split_once(':')?;
        Some(Credential::Password {
            user: user.to_owned(),
            // As docker does, which once wrote one there.
            password: password.trim_matches('\0').to_owned(),
        })
    }

    /// How many bytes of text it is.
    pub fn len(&self) -> usize {
        match self {
            Credential::Password { user, password } => user.len() + password.len(),
            Credential::IdentityToken(token) | Credential::RegistryToken(token) => token.len(),
        }
    }

    /// Whether it is no text at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Who knows credentials that are not in docker's files.
pub trait Keychain: std::fmt::Debug + Send + Sync {
    /// What there is for a repository of a registry, which goes before what docker's files have. It is asked for whenever
    /// the registry wants to know who asks, and may block for a moment. What the registry `refused` just now is no answer.
    fn find(&self, registry: &str, repository: &str, refused: &[Credential]) -> Option<Credential>;

    /// What to do where a registry takes nothing that is known. Whoever waits then goes on, as one that is good may become
    /// known at any time; `None` where that cannot be.
    fn advice(&self) -> Option<&str> {
        None
    }
}

/// Whether an address, as docker's files and Kubernetes' have it, is that of a registry: `https://index.docker.io/v1/` of
/// `docker.io`.
pub fn is_of_registry(address: &str, registry: &str) -> bool {
    let address = address.trim();
    let bare = address
        .strip_prefix("https://")
        .or_else(|| address.strip_prefix("http://"));
    let bare = bare.unwrap_or(address);
    let host = bare.split('/').next().unwrap_or(bare);
    host_of(host) == host_of(registry)
}

impl std::fmt::Debug for Credential {
    /// Without what nobody is to read in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credential(..)")
    }
}

/// Where a login was written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// The file, whose reader has the password.
    File(PathBuf),
    /// The program `docker-credential-NAME`.
    Helper(String),
}

fn server(registry: &str) -> &str {
    match registry {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => HUB,
        other => other,
    }
}

/// What is kept for a registry: docker's file goes before podman's.
///
/// # Errors
/// [`ErrorKind::Permission`] where something is kept that cannot be read.
pub(crate) fn find(registry: &str) -> Result<Option<Credential>> {
    let server = server(registry);
    if let Some(found) = kept(registry, docker_credential::get_credential(server))? {
        return Ok(Some(found));
    }
    // Podman calls the hub by its name.
    kept(registry, docker_credential::get_podman_credential(registry))
}

fn kept(
    registry: &str,
    found: Result<DockerCredential, CredentialRetrievalError>,
) -> Result<Option<Credential>> {
    use CredentialRetrievalError as Reason;
    match found {
        Ok(DockerCredential::UsernamePassword(user, password)) => {
            Ok(Some(Credential::Password { user, password }))
        }
        Ok(DockerCredential::IdentityToken(token)) => Ok(Some(Credential::IdentityToken(token))),
        Err(Reason::NoCredentialConfigured | Reason::ConfigNotFound | Reason::ConfigReadError) => {
            Ok(None)
        }
        // Helpers fail so for a registry that they have nothing for.
        Err(Reason::HelperFailure { stdout, stderr, .. })
            if format!("{stdout}{stderr}").contains("credentials not found") =>
        {
            Ok(None)
        }
        Err(reason) => Err(Error::new(
            ErrorKind::Permission,
            format!(
                "what is kept for {registry} cannot be used: {}: `vellum login {registry}` writes it anew",
                reason.to_string().trim().replace('\n', " ")
            ),
        )),
    }
}

/// Keeps a name and a password for a registry, in the helper that docker's file names for it, or in the file. Whoever
/// calls it has tried them.
///
/// # Errors
/// [`ErrorKind::Command`] where the helper fails; where the file cannot be read or written.
pub fn login(registry: &str, user: &str, password: &str) -> Result<Stored> {
    let (path, mut config) = read_config()?;
    let server = server(registry);
    if let Some(helper) = helper(&config, server) {
        let entry = json!({ "ServerURL": server, "Username": user, "Secret": password });
        run_helper(&helper, "store", entry.to_string().as_bytes())?;
        return Ok(Stored::Helper(helper));
    }
    let auth = STANDARD.encode(format!("{user}:{password}"));
    let auths = config.entry("auths").or_insert_with(|| json!({}));
    let auths = auths.as_object_mut().ok_or_else(|| unreadable(&path))?;
    auths.insert(server.into(), json!({ "auth": auth }));
    write_config(&path, &config.into())?;
    Ok(Stored::File(path))
}

/// Forgets what [`login`] kept. False where there was nothing.
///
/// # Errors
/// As [`login`].
pub fn logout(registry: &str) -> Result<bool> {
    let (path, mut config) = read_config()?;
    let server = server(registry);
    if let Some(helper) = helper(&config, server) {
        run_helper(&helper, "erase", server.as_bytes())?;
        return Ok(true);
    }
    let auths = config.get_mut("auths").and_then(Value::as_object_mut);
    if auths.and_then(|auths| auths.remove(server)).is_none() {
        return Ok(false);
    }
    write_config(&path, &config.into())?;
    Ok(true)
}

type Config = serde_json::Map<String, Value>;

fn unreadable(path: &Path) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "{} is not what docker writes there: mend it, or move it away",
            path.display()
        ),
    )
}

/// Docker's file, empty where there is none.
fn read_config() -> Result<(PathBuf, Config)> {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".docker"));
    let dir = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let dir = dir.or_else(home).ok_or_else(|| {
        let text = "neither HOME nor DOCKER_CONFIG says where credentials are kept: set one";
        Error::new(ErrorKind::InvalidInput, text)
    })?;
    let path = dir.join("config.json");
    let config = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|_| unreadable(&path))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Config::new(),
        Err(error) => return Err(Error::io(format!("cannot read {}", path.display()), error)),
    };
    Ok((path, config))
}

/// The helper for a registry.
fn helper(config: &Config, server: &str) -> Option<String> {
    let own = config
        .get("credHelpers")
        .and_then(|helpers| helpers.get(server));
    let found = own.or_else(|| config.get("credsStore"))?.as_str()?;
    (!found.is_empty()).then(|| found.to_owned())
}

/// Replaces docker's file in one step. Only its owner reads it.
fn write_config(path: &Path, config: &Value) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    let dir = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(dir).context(failed)?;
    // The file may be a link to where it really is.
    let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let beside = target.with_extension(format!("json.{}", std::process::id()));
    let text = serde_json::to_vec_pretty(config)
        .map_err(|error| Error::internal(format!("credentials cannot be written: {error}")))?;
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&beside, &target));
    written.context(failed).inspect_err(|_| {
        let _ = std::fs::remove_file(&beside);
    })
}

/// Runs `docker-credential-NAME`: docker's credential helper protocol.
fn run_helper(name: &str, action: &str, input: &[u8]) -> Result<()> {
    let program = format!("docker-credential-{name}");
    let mut child = Command::new(&program)
        .arg(action)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(|| format!("cannot start {program}, which config.json of docker names"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not want it says why by its status.
        let _ = stdin.write_all(input);
    }
    let output = child
        .wait_with_output()
        .context(|| format!("waiting for {program}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said).trim().replace('\n', " ");
    Err(Error::new(
        ErrorKind::Command,
        format!("{program} {action}: {}: {said}", output.status),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_and_a_password_are_read_from_base64_and_nothing_else_is() {
        let read = |text: &str| Credential::of_basic(&STANDARD.encode(text));
        let is = |user: &str, password: &str| {
            Some(Credential::Password {
                user: user.into(),
                password: password.into(),
            })
        };
        assert_eq!(read("user:secret"), is("user", "secret"));
        assert_eq!(read("user:a:b\0"), is("user", "a:b"));
        assert_eq!(read("user"), None);
        assert_eq!(Credential::of_basic("user:secret"), None);
    }

    #[test]
    fn an_address_is_that_of_its_registry_alone_however_it_is_written() {
        for (address, registry) in [
            ("https://index.docker.io/v1/", "docker.io"),
            ("docker.io", "docker.io"),
            ("registry-1.docker.io", "docker.io"),
            ("https://registry.example:5000", "registry.example:5000"),
            ("http://registry.example/v2/", "registry.example"),
        ] {
            assert!(is_of_registry(address, registry), "{address}");
        }
        for address in [
            "",
            "https://",
            "registry.example.evil",
            "evil/registry.example",
        ] {
            assert!(!is_of_registry(address, "registry.example"), "{address}");
        }
        assert!(!is_of_registry("registry.example", "registry.example:5000"));
    }

    #[test]
    fn a_credential_shows_nothing_of_itself() {
        let shown = format!("{:?}", Credential::IdentityToken("s3cret".into()));
        assert_eq!(shown, "Credential(..)");
    }
}
