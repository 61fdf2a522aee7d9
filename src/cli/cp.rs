//! `vellum cp SOURCE TARGET`

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::Context;
use super::output::human_size;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt::{Interruptible, standard_input, standard_output};
use vellum_engine::cp::{
    Copied, CopyOptions, copy_from_host, copy_from_tar, copy_to_host, copy_to_tar,
};
use vellum_store::Store;

/// Arguments of `cp`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Keep owners, and device nodes that come out; else all is root's inside, and yours outside
    #[arg(short, long)]
    archive: bool,
    /// Where SOURCE is a link, copy what it leads to
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// CONTAINER:PATH, a path of the host, or "-" for a tar on standard input
    #[arg(value_name = "SOURCE")]
    source: OsString,
    /// The same; "-" is a tar on standard output
    #[arg(value_name = "TARGET")]
    target: OsString,
}

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Stream,
    Host(PathBuf),
    Container(String, PathBuf),
}

impl End {
    /// As docker reads it: a path that begins with a slash or a dot is the host's, whatever colons are in
    /// it, and so is one without a colon.
    fn parse(text: &OsStr) -> Result<End> {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Ok(End::Stream);
        }
        let host = || Ok(End::Host(PathBuf::from(text)));
        if bytes.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput, "an empty path"));
        }
        if bytes.starts_with(b"/") || bytes.starts_with(b".") {
            return host();
        }
        let mut parts = bytes.splitn(2, |byte| *byte == b':');
        let (Some(name), Some(path)) = (parts.next(), parts.next()) else {
            return host();
        };
        let Ok(name) = String::from_utf8(name.to_vec()) else {
            return host();
        };
        // No container has such a name.
        if name.contains('/') {
            return host();
        }
        if path.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{name}: names no path: {name}:/ is all of it"),
            ));
        }
        let path = OsString::from_vec(path.to_vec());
        Ok(End::Container(name, path.into()))
    }
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let options = CopyOptions {
        archive: args.archive,
        follow: args.follow_link,
    };
    let ends = (End::parse(&args.source)?, End::parse(&args.target)?);
    let store = match &ends {
        (End::Container(..), End::Container(..)) => {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "both are in containers: copy through a pipe: `vellum cp A:PATH - | vellum cp - B:DIR`",
            ));
        }
        (End::Container(..), _) | (_, End::Container(..)) => context.store_to_change()?,
        _ => {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "neither is in a container: one of the two is CONTAINER:PATH",
            ));
        }
    };
    let copied = match ends {
        (End::Container(name, path), End::Stream) => {
            return to_stream(&store, &name, &path, options.follow);
        }
        (End::Container(name, path), End::Host(target)) => {
            copy_to_host(&store, &name, &path, &target, options)?
        }
        (End::Stream, End::Container(name, path)) => {
            let input = standard_input().context(|| "standard input")?;
            copy_from_tar(&store, &name, input, &path)
                .map_err(|error| error.context("standard input"))?
        }
        (End::Host(source), End::Container(name, path)) => {
            copy_from_host(&store, &name, &source, &path, options)?
        }
        _ => return Err(Error::internal("a copy without a container")),
    };
    say(&copied, context)
}

fn to_stream(store: &Store, name: &str, path: &Path, follow: bool) -> Result<()> {
    if io::stdout().is_terminal() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "a tar is nothing for a terminal: send standard output to a file or a pipe",
        ));
    }
    let mut output = Watched {
        output: standard_output().context(|| "standard output")?,
        broken: false,
    };
    match copy_to_tar(store, name, path, follow, &mut output) {
        // The reader has seen enough: `vellum cp C:/ - | tar -t | head -1`.
        Err(_) if output.broken => Ok(()),
        other => other,
    }
}

/// Standard output, and whether its reader has gone.
struct Watched {
    output: Interruptible<File>,
    broken: bool,
}

impl Write for Watched {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.output.write(bytes);
        let kind = written.as_ref().err().map(io::Error::kind);
        self.broken |= kind == Some(io::ErrorKind::BrokenPipe);
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

fn say(copied: &Copied, context: &Context) -> Result<()> {
    if context.out.json {
        return context.out.print(copied, |_| String::new());
    }
    let count = |number: u64, one: &str, many: &str| {
        format!("{number} {}", if number == 1 { one } else { many })
    };
    context.out.note(&format!(
        "copied {}, {}, {}",
        count(copied.files, "file", "files"),
        count(copied.directories, "directory", "directories"),
        human_size(copied.bytes)
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(text: &str) -> End {
        End::parse(OsStr::new(text)).unwrap()
    }

    #[test]
    fn what_is_in_a_container_and_what_on_the_host_is_told_as_docker_does() {
        let host = |path: &str| End::Host(path.into());
        let container = |name: &str, path: &str| End::Container(name.into(), path.into());
        assert_eq!(end("-"), End::Stream);
        assert_eq!(end("web:/etc/hosts"), container("web", "/etc/hosts"));
        assert_eq!(end("web:etc/a:b"), container("web", "etc/a:b"));
        assert_eq!(end("file"), host("file"));
        assert_eq!(end("./web:/etc"), host("./web:/etc"));
        assert_eq!(end("/a:b"), host("/a:b"));
        assert_eq!(end("dir/a:b"), host("dir/a:b"));
        for bad in ["", "web:"] {
            End::parse(OsStr::new(bad)).unwrap_err();
        }
    }
}
