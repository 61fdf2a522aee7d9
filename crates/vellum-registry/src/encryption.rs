//! To whom an artifact's configuration is encrypted, and who reads it: age files. docs/encryption.md.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use age::x25519;
use age::{DecryptError, Decryptor, Encryptor};
use zeroize::Zeroizing;

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// Where identities are where nobody says another place.
const USUAL: &str = "/etc/vellum/identities";
/// The environment's word for where they are.
const VARIABLE: &str = "VELLUM_IDENTITY";
/// The longest file of recipients or identities.
const MAX_FILE: u64 = 1 << 20;

/// Whoever can decrypt what is encrypted to them.
#[derive(Clone)]
pub struct Recipients(Vec<x25519::Recipient>);

impl fmt::Debug for Recipients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recipients({})", self.0.len())
    }
}

impl Recipients {
    /// Reads what a user says: each is a recipient, or the name of a file of such.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what is neither, and where there is none; [`ErrorKind::Unsupported`] for other kinds of
    /// recipients; where a file cannot be read.
    pub fn parse(said: &[String]) -> Result<Self> {
        let mut recipients = Vec::new();
        for one in said {
            if is_recipient(one) {
                recipients.push(parse_recipient(one)?);
                continue;
            }
            let path = Path::new(one);
            let text = read_file(path, "neither an age recipient (age1…) nor a file of them")?;
            let named = |line| format!("{}, line {line}", path.display());
            for (line, recipient) in lines(&text) {
                let parsed = parse_recipient(recipient);
                recipients.push(parsed.map_err(|error| error.context(named(line)))?);
            }
        }
        if recipients.is_empty() {
            let text = "nobody could read what is encrypted to nobody: name a recipient (age1…)";
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        Ok(Recipients(recipients))
    }

    /// An age file with this content. It has other bytes each time.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] where age refuses.
    pub fn encrypt(&self, plain: &[u8]) -> Result<Vec<u8>> {
        let what = "encrypting to recipients";
        let recipients = self.0.iter().map(|one| one as &dyn age::Recipient);
        let encryptor = Encryptor::with_recipients(recipients);
        let encryptor =
            encryptor.map_err(|error| Error::with_source(ErrorKind::Internal, what, error))?;
        let mut bytes = Vec::new();
        let mut writer = encryptor.wrap_output(&mut bytes).context(|| what)?;
        writer.write_all(plain).context(|| what)?;
        writer.finish().context(|| what)?;
        Ok(bytes)
    }
}

/// Whether somebody means a recipient, of whatever kind, rather than a file.
fn is_recipient(text: &str) -> bool {
    text.starts_with("age1") || text.starts_with("ssh-") || text.starts_with("AGE-SECRET-KEY-")
}

fn parse_recipient(text: &str) -> Result<x25519::Recipient> {
    if text.starts_with("AGE-SECRET-KEY-") {
        let text = "an identity (a secret key) stands where a recipient should: `age-keygen -y` prints its recipient; \
                    take another key if others have seen this one";
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    // What is no recipient may be a secret: a salt, or a key of a layer.
    let shown: String = match is_recipient(text) {
        true => text.chars().take(80).collect(),
        false => "what stands there".to_owned(),
    };
    if text.starts_with("ssh-") {
        let text = format!(
            "{shown}: SSH keys are no recipients here: make an age key (`age-keygen`), and give its recipient (age1…)"
        );
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    x25519::Recipient::from_str(text).map_err(|why| {
        let text = format!(
            "{shown}: no X25519 recipient of age ({why}): give what `age-keygen` prints (age1…)"
        );
        Error::new(ErrorKind::InvalidInput, text)
    })
}

/// Lines that are no comments, with their numbers.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().map(str::trim).enumerate();
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(index, line)| (index + 1, line))
}

/// The text of a file; `otherwise` says what its name could be, where it is not there.
fn read_file(path: &Path, otherwise: &str) -> Result<Zeroizing<String>> {
    let failed = || format!("cannot read {}", path.display());
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = format!("{}: {otherwise}", path.display());
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        other => other.context(failed)?,
    };
    let mut text = Zeroizing::new(String::new());
    let read = file.take(MAX_FILE + 1).read_to_string(&mut text);
    read.context(failed)?;
    if text.len() as u64 > MAX_FILE {
        let text = format!("{}: it has more than {MAX_FILE} bytes", path.display());
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    Ok(text)
}

/// Who can decrypt, and where they were found.
pub struct Identities {
    keys: Vec<x25519::Identity>,
    from: Vec<PathBuf>,
}

impl fmt::Debug for Identities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identities({} of {:?})", self.keys.len(), self.from)
    }
}

impl Identities {
    /// Those of these files; where none is named, of those that the environment names (`VELLUM_IDENTITY`, with `:` between
    /// them); where it names none, of `/etc/vellum/identities`, if that is there.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a file that is not there, or has something else in it; where one cannot be read.
    pub fn find(named: &[PathBuf]) -> Result<Self> {
        let said = std::env::var_os(VARIABLE).filter(|paths| !paths.is_empty());
        let from = match (named, said) {
            ([], Some(paths)) => std::env::split_paths(&paths).collect(),
            ([], None) if Path::new(USUAL).exists() => vec![PathBuf::from(USUAL)],
            (named, _) => named.to_vec(),
        };
        let mut keys = Vec::new();
        for path in &from {
            let text = read_file(path, "there is no such file of identities")?;
            for (line, key) in lines(&text) {
                // What stands there is not shown: it may be a key with a fault.
                let key = x25519::Identity::from_str(key).map_err(|_| {
                    let text = format!(
                        "{}, line {line}: no identity of age: one line of what `age-keygen` writes is \
                         AGE-SECRET-KEY-1…; SSH keys and encrypted files are not taken",
                        path.display()
                    );
                    Error::new(ErrorKind::InvalidInput, text)
                })?;
                keys.push(key);
            }
        }
        Ok(Identities { keys, from })
    }

    /// The content of an age file, which anybody may have written.
    ///
    /// # Errors
    /// [`ErrorKind::Permission`] where no identity is one of its recipients; [`ErrorKind::Corrupt`] for what is none, or is
    /// damaged.
    pub fn decrypt(&self, bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
        let damaged = |error: DecryptError| match error {
            DecryptError::NoMatchingKeys => self.none_fits(bytes),
            error => {
                let text = "what is encrypted to recipients is damaged, or no age file";
                Error::with_source(ErrorKind::Corrupt, text, error)
            }
        };
        let decryptor = Decryptor::new_buffered(bytes).map_err(damaged)?;
        let keys = self.keys.iter().map(|key| key as &dyn age::Identity);
        let mut reader = decryptor.decrypt(keys).map_err(damaged)?;
        // As long as it can get, so that no part of it is left behind where it was before.
        let mut plain = Zeroizing::new(Vec::with_capacity(bytes.len()));
        reader.read_to_end(&mut plain).map_err(|error| {
            let text = "what is encrypted to recipients is damaged";
            Error::with_source(ErrorKind::Corrupt, text, error)
        })?;
        Ok(plain)
    }

    fn none_fits(&self, bytes: &[u8]) -> Error {
        let kinds = kinds(bytes);
        let kinds: Vec<String> = kinds
            .iter()
            .map(|(kind, count)| format!("{count} of the kind {kind}"))
            .collect();
        let from: Vec<String> = self
            .from
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        let tried = match from.is_empty() {
            true => format!(
                "no identity is here: give --identity FILE or {VARIABLE}, or put it in {USUAL}"
            ),
            false => format!(
                "none of the identities in {} is one of them: give that of one with --identity FILE, or have it pushed \
                 for one of yours",
                from.join(", ")
            ),
        };
        let text = format!(
            "it is encrypted to recipients ({}), and {tried}",
            kinds.join(", ")
        );
        Error::new(ErrorKind::Permission, text)
    }
}

/// How many recipients of which kinds the header of an age file names, which was found to be one.
fn kinds(bytes: &[u8]) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    let lines = bytes.split(|byte| *byte == b'\n');
    for line in lines.take_while(|line| !line.starts_with(b"---")) {
        if let Some(kind) = line.strip_prefix(b"-> ") {
            let kind = kind.split(|byte| *byte == b' ').next().unwrap_or(kind);
            let kind: String = String::from_utf8_lossy(kind).chars().take(40).collect();
            *kinds.entry(kind).or_default() += 1;
        }
    }
    // Stanzas of no recipient, which hide how many there are.
    kinds.retain(|kind, _| !kind.ends_with("-grease"));
    kinds
}

#[cfg(test)]
mod tests {
    use age::secrecy::ExposeSecret;

    use super::*;

    #[test]
    fn a_file_of_secrets_that_is_taken_for_recipients_is_refused_without_saying_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("team.salt");
        let digits = "0123456789abcdef".repeat(4);
        std::fs::write(&path, format!("# keep it secret\n{digits}\n")).unwrap();
        let named = [path.display().to_string()];
        let error = Recipients::parse(&named).unwrap_err().to_string();
        assert!(error.contains("team.salt, line 2"), "{error}");
        assert!(!error.contains("0123456789"), "{error}");
        let long = "# nothing\n".repeat(MAX_FILE as usize / 10 + 1);
        std::fs::write(&path, long).unwrap();
        let error = Recipients::parse(&named).unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
    }

    fn identities(dir: &Path, keys: &[&x25519::Identity]) -> Identities {
        let path = dir.join("keys");
        let mut text = "# created: now\n".to_owned();
        for key in keys {
            text += key.to_string().expose_secret();
            text += "\n";
        }
        std::fs::write(&path, text).unwrap();
        Identities::find(&[path]).unwrap()
    }

    #[test]
    fn whoever_is_a_recipient_reads_it_and_nobody_else_learns_more_than_their_kind() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (x25519::Identity::generate(), x25519::Identity::generate());
        let file = dir.path().join("recipients");
        std::fs::write(&file, format!("# two\n\n{}\n", two.to_public())).unwrap();
        let said = [one.to_public().to_string(), file.display().to_string()];
        let recipients = Recipients::parse(&said).unwrap();
        let encrypted = recipients.encrypt(b"plain text").unwrap();
        assert!(!encrypted.windows(5).any(|bytes| bytes == b"plain"));
        let other = x25519::Identity::generate();
        for key in [&one, &two] {
            let identities = identities(dir.path(), &[&other, key]);
            assert_eq!(*identities.decrypt(&encrypted).unwrap(), b"plain text");
        }
        let error = identities(dir.path(), &[&other])
            .decrypt(&encrypted)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission);
        let text = error.to_string();
        assert!(text.contains("2 of the kind X25519"), "{text}");
        assert!(
            text.contains("keys") && text.contains("--identity"),
            "{text}"
        );
        let nobody = Identities {
            keys: Vec::new(),
            from: Vec::new(),
        };
        let text = nobody.decrypt(&encrypted).unwrap_err().to_string();
        assert!(
            text.contains("VELLUM_IDENTITY") && text.contains(USUAL),
            "{text}"
        );
    }

    #[test]
    fn a_file_that_is_cut_off_or_changed_anywhere_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let key = x25519::Identity::generate();
        let recipients = Recipients::parse(&[key.to_public().to_string()]).unwrap();
        let good = recipients.encrypt(b"plain text").unwrap();
        let identities = identities(dir.path(), &[&key]);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            for bad in [&bad[..], &good[..at]] {
                let kind = identities.decrypt(bad).unwrap_err().kind();
                assert!(
                    matches!(kind, ErrorKind::Corrupt | ErrorKind::Permission),
                    "{at}: {kind:?}"
                );
            }
        }
    }

    #[test]
    fn other_recipients_are_refused_in_words_and_no_secret_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let key = x25519::Identity::generate().to_string();
        let secret = key.expose_secret();
        let file = dir.path().join("file");
        std::fs::write(&file, format!("{secret}x\n")).unwrap();
        let file = file.display().to_string();
        for (said, kind, says) in [
            ("ssh-ed25519 AAAA me", ErrorKind::Unsupported, "age-keygen"),
            ("ssh-rsa AAAA me", ErrorKind::Unsupported, "age-keygen"),
            ("age1qqqq", ErrorKind::InvalidInput, "age1qqqq"),
            (
                "age1yubikey1qqqq",
                ErrorKind::InvalidInput,
                "no X25519 recipient",
            ),
            ("/nonexistent", ErrorKind::InvalidInput, "neither"),
            (secret, ErrorKind::InvalidInput, "age-keygen -y"),
            (&file, ErrorKind::InvalidInput, "line 1"),
        ] {
            let error = Recipients::parse(&[said.to_owned()]).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            let text = error.to_string();
            assert!(text.contains(says), "{text}");
            assert!(!text.contains(&secret[20..40]), "a secret is shown");
        }
        Recipients::parse(&[]).unwrap_err();
        let error = Identities::find(&[PathBuf::from(&file)])
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 1") && !error.contains(&secret[20..40]));
        let error = Identities::find(&["/nonexistent".into()])
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent"), "{error}");
    }
}
