//! The salts of trust domains: docs/encryption.md, "The salt".

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_image::hex;
use vellum_registry::Recipients;
use vellum_registry::artifact::Salt;
use vellum_store::Store;
use zeroize::Zeroizing;

use super::sealed::Sealing;

/// Where the store keeps those that it makes.
const DIR: &str = "salts";
/// The longest file of a salt.
const MAX_FILE: u64 = 64 << 10;

/// To whom a push encrypts, and with which salt.
#[derive(Debug, Clone)]
pub struct Encryption {
    /// Who can read it.
    pub recipients: Recipients,
    /// What keys are derived with.
    pub salt: SaltSource,
}

/// Where a salt comes from.
#[derive(Debug, Clone)]
pub enum SaltSource {
    /// The store's, of the namespace that is pushed to; it is made where there is none.
    Namespace,
    /// One that was read.
    Given(Salt),
    /// A file that is made for it.
    New(PathBuf),
}

impl SaltSource {
    /// The salt of a file.
    ///
    /// # Errors
    /// Where it cannot be read, or has something else in it.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = || {
            format!(
                "cannot read the salt {}: --new-salt makes one",
                path.display()
            )
        };
        let file = std::fs::File::open(path).context(failed)?;
        let mut text = Zeroizing::new(String::new());
        let read = file.take(MAX_FILE).read_to_string(&mut text);
        read.context(failed)?;
        let salt = Salt::parse(&text).map_err(|error| error.context(path.display().to_string()))?;
        Ok(SaltSource::Given(salt))
    }
}

impl Encryption {
    /// With what a push to a namespace encrypts. A salt that is made is durable on return.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] for a new salt; [`ErrorKind::Corrupt`] for a damaged one; where the host refuses.
    pub(super) fn sealing(&self, store: &Store, namespace: &str) -> Result<Sealing> {
        let salt = match &self.salt {
            SaltSource::Given(salt) => salt.clone(),
            SaltSource::New(path) => make(path)?,
            SaltSource::Namespace => of_namespace(store, namespace)?,
        };
        Ok(Sealing {
            recipients: self.recipients.clone(),
            salt,
        })
    }
}

/// Makes a file with a new salt, durably.
fn make(path: &Path) -> Result<Salt> {
    let salt = Salt::random()?;
    let failed = || format!("cannot make the salt {}", path.display());
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let dir = dir.unwrap_or(Path::new("."));
    // Whole, for its owner alone, or not there.
    let mut file = tempfile::NamedTempFile::new_in(dir).context(failed)?;
    let text = text_of(&salt, "of a trust domain: keep it secret");
    let written = file.write_all(text.as_bytes());
    let written = written.and_then(|()| file.as_file().sync_all());
    written.context(failed)?;
    match file.persist_noclobber(path) {
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {
            let text = format!("{} is there already: --salt uses it", path.display());
            return Err(Error::new(ErrorKind::AlreadyExists, text));
        }
        other => other.map_err(|error| error.error).context(failed)?,
    };
    let dir = std::fs::File::open(dir);
    dir.and_then(|dir| dir.sync_all()).context(failed)?;
    Ok(salt)
}

/// The store's salt of a namespace.
fn of_namespace(store: &Store, namespace: &str) -> Result<Salt> {
    let storage = &**store.storage();
    let dir = store.root().join(DIR);
    let path = dir.join(hex(&Sha256::digest(namespace)));
    // Two pushes make one salt.
    let _guard = store.lock()?;
    match storage.read_all(&path, MAX_FILE).map(Zeroizing::new) {
        Ok(bytes) => {
            let text = std::str::from_utf8(&bytes).ok();
            let salt = text.and_then(|text| Salt::parse(text).ok()).ok_or_else(|| {
                let text = format!(
                    "{}: the salt of {namespace} is damaged: bring it back from a copy, or remove it, and what is pushed \
                     from then on shares nothing with what is there",
                    path.display()
                );
                Error::new(ErrorKind::Corrupt, text)
            })?;
            // Whoever made it may have been killed before its name was durable.
            let synced = storage.sync_dir(&dir);
            let synced = synced.and_then(|()| storage.sync_dir(store.root()));
            synced.context(|| format!("cannot sync {}", dir.display()))?;
            Ok(salt)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let failed = || format!("cannot make the salt {}", path.display());
            if !dir.exists() {
                storage.create_dir(&dir).context(failed)?;
                storage.sync_dir(store.root()).context(failed)?;
            }
            let salt = Salt::random()?;
            let text = text_of(&salt, namespace);
            let written = storage.write_atomic(&path, text.as_bytes());
            written.context(failed)?;
            Ok(salt)
        }
        Err(error) => Err(error).context(|| format!("cannot read the salt {}", path.display())),
    }
}

fn text_of(salt: &Salt, what: &str) -> Zeroizing<String> {
    Zeroizing::new(format!("# {what}\n{}\n", *salt.digits()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn each_namespace_has_a_salt_that_stays_and_that_only_its_owner_reads() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(dir.path()).unwrap();
        let first = of_namespace(&store, "registry.example/team").unwrap();
        let again = of_namespace(&store, "registry.example/team").unwrap();
        let other = of_namespace(&store, "registry.example/other").unwrap();
        assert_eq!(*first.digits(), *again.digits());
        assert_ne!(*first.digits(), *other.digits());
        for entry in std::fs::read_dir(dir.path().join(DIR)).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
            // One of them can be given to others.
            let given = SaltSource::read(&path).unwrap();
            assert!(matches!(given, SaltSource::Given(_)));
            std::fs::write(&path, "damaged").unwrap();
        }
        let error = of_namespace(&store, "registry.example/team").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }

    #[test]
    fn a_new_salt_is_its_owners_and_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("team.salt");
        let made = make(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let Ok(SaltSource::Given(read)) = SaltSource::read(&path) else {
            panic!("no salt");
        };
        assert_eq!(*read.digits(), *made.digits());
        assert_eq!(make(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
        let error = SaltSource::read(&dir.path().join("absent")).unwrap_err();
        assert!(error.to_string().contains("--new-salt"), "{error}");
    }
}
