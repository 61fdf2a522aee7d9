//! A container whose image is in a registry: from nothing to its first output, to a service that answers,
//! to all files; and what is left of the way it came when all is here.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::fio::fio;
use super::{BaseKind, Better, Measured, Metric, Run, Sizes, Workload, missing};
use crate::driver::{Kind, Pulling, SERVICE};
use crate::host::{self, copy_tree};

/// The service, as it lies in the image.
const PROGRAM: &str = include_str!("pull/service.py");
/// Where it listens in its container.
const SOCKET: &str = "run.sock";
/// The file that is read when all is here.
const FILE: &str = "srv/data";

/// Puts Python, what it needs, the service and the file into the image's tree.
pub(super) fn fill(tree: &Path, sizes: &Sizes) -> Result<()> {
    for dir in ["usr/bin", "usr/lib", "usr/lib64", "srv", "tmp"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    for dir in ["lib", "lib64"] {
        std::os::unix::fs::symlink(format!("usr/{dir}"), tree.join(dir))?;
    }
    let [program, script] = SERVICE;
    let python = fs::canonicalize(program).with_context(|| program.to_owned())?;
    fs::copy(&python, inside(tree, Path::new(program)))?;
    let name = python.file_name().unwrap_or_default();
    let library = Path::new("/usr/lib").join(name);
    let to = inside(tree, &library);
    copy_tree(&library, &to, &[])?;
    for unused in fs::read_dir(&to)?.flatten() {
        let name = unused.file_name();
        let name = name.to_string_lossy();
        // What nobody ships to run Python, and in a small image what its start does not need either.
        let small = ["lib2to3", "idlelib", "ensurepip", "pydoc_data", "distutils"];
        if name.starts_with("config-")
            || name == "test"
            || (sizes.pull_libraries == 0 && small.contains(&&*name))
        {
            fs::remove_dir_all(unused.path())?;
        }
    }
    let mut programs = vec![python];
    let modules = fs::read_dir(library.join("lib-dynload"))?.flatten();
    programs.extend(modules.map(|entry| entry.path()));
    for library in linked(&programs)? {
        add(tree, &library)?;
    }
    more_libraries(tree, sizes.pull_libraries)?;
    fs::write(inside(tree, Path::new(script)), PROGRAM)?;
    compressible(&tree.join(FILE), sizes.pull_file)
}

fn inside(tree: &Path, path: &Path) -> PathBuf {
    tree.join(path.strip_prefix("/").unwrap_or(path))
}

/// A file of the host, at its place and under its name.
fn add(tree: &Path, file: &Path) -> Result<()> {
    let to = inside(tree, file);
    fs::create_dir_all(to.parent().unwrap_or(tree))?;
    fs::copy(file, &to).with_context(|| file.display().to_string())?;
    Ok(())
}

/// The libraries that programs are linked with, and what loads them.
fn linked(programs: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let said = host::run(Command::new("ldd").args(programs))?.stdout;
    let lines = said.lines().filter(|line| !line.ends_with(':'));
    let words = lines.flat_map(str::split_whitespace);
    let mut libraries: Vec<PathBuf> = words
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect();
    libraries.sort();
    libraries.dedup();
    Ok(libraries)
}

/// Libraries of the host in the order of their names, up to so many bytes: what images have besides.
fn more_libraries(tree: &Path, bytes: u64) -> Result<()> {
    let libc = linked(&[PathBuf::from(SERVICE[0])])?;
    let libc = libc.iter().find(|file| file.ends_with("libc.so.6"));
    let dir = libc.and_then(|file| file.parent());
    let dir = dir.context("Python is not linked with a C library")?;
    let mut files: Vec<PathBuf> = fs::read_dir(dir)?
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .map(|entry| entry.path())
        .filter(|file| file.to_string_lossy().contains(".so"))
        .collect();
    files.sort();
    let mut left = bytes;
    for file in files {
        let size = fs::metadata(&file)?.len();
        if size <= left && !inside(tree, &file).exists() {
            add(tree, &file)?;
            left -= size;
        }
    }
    Ok(())
}

/// A file that becomes an eighth: 512 random bytes in each block.
fn compressible(path: &Path, size: u64) -> Result<()> {
    let mut random = File::open("/dev/urandom")?;
    let mut file = std::io::BufWriter::new(File::create(path)?);
    let mut block = [0; 4096];
    for _ in 0..size / 4096 {
        let (front, _) = block.split_at_mut(512);
        random.read_exact(front)?;
        file.write_all(&block)?;
    }
    file.flush()?;
    Ok(())
}

fn absent() -> Option<String> {
    missing(&[
        ("fio", "fio"),
        ("chroot", "coreutils"),
        ("ldd", "libc-bin"),
        (SERVICE[0], "python3"),
    ])
}

fn pulling<'a>(run: &'a mut Run<'_>) -> Result<&'a mut dyn Pulling> {
    run.image.pulling().context("this driver pulls nothing")
}

/// The service in a container.
struct Service {
    child: Child,
    output: PathBuf,
    socket: PathBuf,
}

impl Service {
    fn start(dir: &Path, scratch: &Path) -> Result<Self> {
        let output = scratch.join("service");
        let file = File::create(&output)?;
        let child = Command::new("chroot")
            .arg(dir)
            .args(SERVICE)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .context("cannot start chroot")?;
        Ok(Service {
            child,
            output,
            socket: dir.join(SOCKET),
        })
    }

    /// Waits until it has done something.
    fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) -> Result<()> {
        let mut ended = None;
        let limit = host::longest_command();
        let is_done = host::poll(limit, || {
            ended = self.child.try_wait().ok().flatten();
            ended.is_some() || done(self)
        });
        let said = fs::read_to_string(&self.output).unwrap_or_default();
        if let Some(status) = ended {
            bail!("the service ended before {what}: {status}: {said}");
        }
        if !is_done {
            bail!("no {what} within {} s: {said}", limit.as_secs());
        }
        Ok(())
    }

    fn has_written(&self) -> bool {
        fs::read(&self.output).is_ok_and(|said| said.contains(&b'\n'))
    }

    /// Whether it answers a request with 200 (RFC 9110).
    fn answers(&self) -> bool {
        let answer = || -> std::io::Result<Vec<u8>> {
            let mut stream = UnixStream::connect(&self.socket)?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer)
        };
        answer().is_ok_and(|answer| answer.starts_with(b"HTTP/1.0 200 "))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A container's start.
pub(super) struct Pull;

impl Workload for Pull {
    fn id(&self) -> String {
        "pull".to_owned()
    }

    fn title(&self) -> String {
        "A container from a registry".to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "An image of this host's Python, {} MiB of libraries and a file of {} MiB lies in a registry behind \
             a link of {} with a round trip of {} ms. The store is empty: the image is pulled, a container \
             made and mounted, and a service started in it. Milliseconds until its first line of output, until \
             it answers a request over HTTP (with SSL, SQLite and asyncio loaded), and until all files of the \
             image were read; and what had come over the link by then. Then everything is brought here \
             and the container mounted anew: with a cold cache {} blocks of 4 KiB are read at random places \
             of the file, and the file in order.",
            sizes.pull_libraries >> 20,
            sizes.pull_file >> 20,
            sizes.pull_link.rate,
            sizes.pull_link.round_trip,
            sizes.reads,
        )
    }

    fn caveats(&self) -> &'static str {
        "Programs run by chroot in all of them: what a runtime adds (namespaces, cgroups, containerd's shim) \
         is left out alike. The registry's blobs and everybody's programs are in memory, and it is on the \
         same processors. A program delays bytes, not packets: connections are made at once and their windows \
         grow fast, which saves most for who opens many. The image is one layer, which containerd fetches \
         over one connection and then unpacks; layers of other images come side by side. The formats \
         differ in compression: gzip for containerd, gzip in small pieces for stargz, zstd for Vellum. \
         stargz fetches the rest in the background while the service starts, as it does by default; Vellum \
         does not, as it does not by default. What vellum push makes by default, a hot pack of metadata alone, \
         lies between the two lazy ways of Vellum."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics: Vec<Metric> = [
            ("first", "until the first line", "ms"),
            ("ready", "until the service answers", "ms"),
            ("all", "until all files were read", "ms"),
            ("first_bytes", "over the link until the first line", "MB"),
            (
                "ready_bytes",
                "over the link until the service answers",
                "MB",
            ),
            ("all_bytes", "over the link until all files were read", "MB"),
        ]
        .map(|(id, title, unit)| Metric::new(id, title, unit, Better::Lower))
        .to_vec();
        metrics.push(Metric::new(
            "random",
            "all here: 4 KiB random reads",
            "reads/s",
            Better::Higher,
        ));
        metrics.push(Metric::new(
            "ordered",
            "all here: 1 MiB reads in order",
            "MB/s",
            Better::Higher,
        ));
        metrics.push(Metric::space("space taken by image and container"));
        metrics
    }

    fn kind(&self) -> Kind {
        Kind::Pull
    }

    fn base(&self) -> BaseKind {
        BaseKind::Pulled
    }

    fn weight(&self) -> f64 {
        16.0
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        absent()
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let remote = pulling(run)?.remote();
        remote.limit(true)?;
        let before = remote.received()?;
        pulling(run)?.warm()?;
        let mut measured = Measured::default();
        let start = Instant::now();
        run.image.create(run.name)?;
        let access = run.image.start(run.name)?;
        let dir = access.dir()?;
        let mut figures = |run: &mut Run<'_>, [time, bytes]: [&'static str; 2]| -> Result<()> {
            measured.add(time, start.elapsed().as_secs_f64() * 1000.0);
            let received = pulling(run)?.remote().received()?;
            measured.add(bytes, received.saturating_sub(before) as f64 / 1e6);
            Ok(())
        };
        let mut service = Service::start(dir, run.scratch)?;
        service.until("its first line", Service::has_written)?;
        figures(run, ["first", "first_bytes"])?;
        service.until("an answer", Service::answers)?;
        figures(run, ["ready", "ready_bytes"])?;
        drop(service);
        host::read_files(dir)?;
        figures(run, ["all", "all_bytes"])?;
        measured.add("space", run.image.used()? as f64 / 1e6);
        self.when_all_is_here(run, &mut measured)?;
        run.image.stop(run.name)?;
        run.image.remove(run.name)?;
        Ok(measured)
    }
}

impl Pull {
    fn when_all_is_here(&self, run: &mut Run<'_>, measured: &mut Measured) -> Result<()> {
        let name = run.name;
        run.image.stop(name)?;
        // What completes by reading was read just now, all of it.
        if !pulling(run)?.completes_by_reading() {
            pulling(run)?.complete()?;
        }
        let access = run.image.start(name)?;
        let dir = access.dir()?;
        let filename = format!("--filename={}", dir.join(FILE).display());
        let number = format!("--number_ios={}", run.sizes.reads);
        let common = [&filename, "--readonly", "--ioengine=psync"];
        let jobs: [&[&str]; 2] = [
            &["--rw=randread", "--bs=4k", &number],
            &["--rw=read", "--bs=1m"],
        ];
        let mut done = Vec::new();
        for job in jobs {
            run.cold_all(&[dir.to_owned()])?;
            done.push(fio(&[&common[..], job].concat())?);
        }
        if let [random, ordered] = &*done {
            measured.add("random", random.rate);
            measured.add("ordered", ordered.bytes / 1e6);
        }
        Ok(())
    }
}

/// An image on a link that is as fast as this host.
pub(super) struct Fetch;

impl Workload for Fetch {
    fn id(&self) -> String {
        "fetch".to_owned()
    }

    fn title(&self) -> String {
        "An image from a registry beside this host".to_owned()
    }

    fn what(&self, _sizes: &Sizes) -> String {
        "The image of the workload before, over a link without a limit and without a delay, into an empty \
         store: fetched, checked, unpacked or decoded, and written. Megabytes of its files a second, without \
         the file that is zeros for the most part. What is lazy is brought here whole: by its command, or, of stargz, by reading all files."
            .to_owned()
    }

    fn caveats(&self) -> &'static str {
        "The registry shares the processors. Where the store is on a disk, that disk is part of it; each \
         way syncs as much as it does by itself."
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![Metric::new(
            "rate",
            "fetched, checked, decoded",
            "MB/s",
            Better::Higher,
        )]
    }

    fn kind(&self) -> Kind {
        Kind::Pull
    }

    fn base(&self) -> BaseKind {
        BaseKind::Pulled
    }

    fn weight(&self) -> f64 {
        3.0
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        absent()
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let name = run.name;
        pulling(run)?.remote().limit(false)?;
        let by_reading = pulling(run)?.completes_by_reading();
        pulling(run)?.warm()?;
        let start = Instant::now();
        run.image.create(name)?;
        if by_reading {
            run.image.start(name)?;
        }
        pulling(run)?.complete()?;
        let seconds = start.elapsed().as_secs_f64();
        if by_reading {
            run.image.stop(name)?;
        }
        let access = run.image.start(name)?;
        let dir = access.dir()?.to_string_lossy().into_owned();
        // Not the file that is zeros for the most part.
        let without = format!("--exclude={}", access.dir()?.join(FILE).display());
        let du = host::sh("du", &["-sb", &without, &dir])?.stdout;
        let bytes: f64 = du.split_whitespace().next().unwrap_or_default().parse()?;
        run.image.stop(name)?;
        run.image.remove(name)?;
        let mut measured = Measured::default();
        measured.add("rate", bytes / 1e6 / seconds);
        Ok(measured)
    }
}
