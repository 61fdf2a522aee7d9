//! To whom `push` and `save` encrypt, and by what `pull`, `load` and `run` read it.

use std::path::PathBuf;

use super::registry::FormatArg;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::registry::{Encryption, PushFormat, SaltSource};
use vellum_registry::Recipients;

/// What is sent or saved, and whether it is encrypted.
#[derive(Debug, clap::Args)]
pub(super) struct FormatArgs {
    /// What of an image goes there [default: both; blocks with --encrypt-to]
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// Encrypt the block layers, and leave the plain image out, for an age recipient (age1…) or the recipients in a
    /// file; may be given several times
    #[arg(long, value_name = "RECIPIENT")]
    encrypt_to: Vec<String>,
    /// Encrypt with the salt in FILE, which all have who push in one trust domain [default: the store's for the
    /// registry's namespace]
    #[arg(long, value_name = "FILE", requires = "encrypt_to")]
    salt: Option<PathBuf>,
    /// The same, with a new salt, which is written to FILE
    #[arg(
        long,
        value_name = "FILE",
        requires = "encrypt_to",
        conflicts_with = "salt"
    )]
    new_salt: Option<PathBuf>,
}

impl FormatArgs {
    /// What was said.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a format with a plain image beside what is encrypted; as [`Recipients::parse`] and
    /// [`SaltSource::read`].
    pub(super) fn wanted(&self) -> Result<(PushFormat, Option<Encryption>)> {
        if self.encrypt_to.is_empty() {
            let format = self.format.unwrap_or(FormatArg::Both);
            return Ok((format.into(), None));
        }
        if let Some(FormatArg::Both | FormatArg::Oci) = self.format {
            let text = "--encrypt-to encrypts block layers, and a plain image beside them would show all of it: leave \
                        --format out, or give --format blocks";
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        let recipients = Recipients::parse(&self.encrypt_to)?;
        let salt = match (&self.salt, &self.new_salt) {
            (Some(path), _) => SaltSource::read(path)?,
            (None, Some(path)) => SaltSource::New(path.clone()),
            (None, None) => SaltSource::Namespace,
        };
        Ok((PushFormat::Blocks, Some(Encryption { recipients, salt })))
    }
}

/// By what encrypted layers are read.
#[derive(Debug, clap::Args)]
pub(super) struct IdentityArgs {
    /// Read encrypted layers by the age identities in FILE; may be given several times [default: files that
    /// VELLUM_IDENTITY names, else /etc/vellum/identities]
    #[arg(long, value_name = "FILE")]
    pub(super) identity: Vec<PathBuf>,
}
