//! Disk images in QEMU's format: made by qemu-img, read here; damaged and hostile ones refused.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use tempfile::tempdir;
use vellum_base::{ErrorKind, Result};
use vellum_image::{DiskImage, Format, Holds, Source, SourceOptions};

use crate::image_support::{run, shell};

/// Bytes of the disks.
const SIZE: u64 = 8 << 20;

/// A directory with `disk.raw`: an ext4 with data in pieces, and with holes.
struct Fixture(tempfile::TempDir);

impl Fixture {
    fn new() -> Fixture {
        let fixture = Fixture(tempdir().unwrap());
        shell(
            fixture.0.path(),
            &format!(
                "PATH=$PATH:/sbin:/usr/sbin
                 truncate -s {SIZE} disk.raw
                 mke2fs -q -t ext4 -F disk.raw
                 seq 200000 | dd of=disk.raw bs=4k seek=900 conv=notrunc status=none
                 head -c 70000 /dev/urandom | dd of=disk.raw bs=1000 seek=6000 conv=notrunc status=none
                 printf end | dd of=disk.raw bs=1 seek={} conv=notrunc status=none",
                SIZE - 3
            ),
        );
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn shell(&self, script: &str) {
        shell(self.0.path(), script);
    }

    fn options(&self) -> SourceOptions {
        SourceOptions::new(self.0.path())
    }

    fn open(&self, name: &str) -> Result<DiskImage> {
        open(&self.path(name), &self.options())
    }

    fn raw(&self) -> Vec<u8> {
        fs::read(self.path("disk.raw")).unwrap()
    }

    fn patch(&self, name: &str, at: u64, bytes: &[u8]) {
        let file = fs::File::options().write(true).open(self.path(name));
        file.unwrap().write_all_at(bytes, at).unwrap();
    }

    /// Opening it fails with that kind, and says something of `words`.
    #[track_caller]
    fn refuses(&self, name: &str, kind: ErrorKind, words: &str) {
        let error = self.open(name).and_then(|disk| content(&disk)).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.kind(), kind, "{text}");
        assert!(text.contains(words), "{text}");
    }
}

fn open(path: &Path, options: &SourceOptions) -> Result<DiskImage> {
    match Source::open(path, options)? {
        Source::Disk(disk) => Ok(disk),
        other => panic!("{other:?}"),
    }
}

/// All bytes of a disk: those that it names as data, and zeros.
fn content(disk: &DiskImage) -> Result<Vec<u8>> {
    let mut bytes = vec![0; disk.size as usize];
    let mut at = 0;
    while let Some(range) = disk.next_data(at)? {
        assert!(range.start >= at && range.end > range.start && range.end <= disk.size);
        let piece = &mut bytes[range.start as usize..range.end as usize];
        disk.read_at(piece, range.start)?;
        at = range.end;
    }
    Ok(bytes)
}

#[test]
fn every_kind_of_qcow2_is_read_byte_for_byte() {
    let fixture = Fixture::new();
    for (name, options) in [
        ("usual", ""),
        ("old", "-o compat=0.10"),
        ("small", "-o cluster_size=512"),
        ("large", "-o cluster_size=2M"),
        ("zlib", "-c"),
        ("old-zlib", "-c -o compat=0.10"),
        ("small-zlib", "-c -o cluster_size=4k"),
        ("zstd", "-c -o compression_type=zstd"),
        ("subclusters", "-o extended_l2=on,cluster_size=128k"),
        ("allocated", "-S 0 -o preallocation=metadata"),
        ("lazy", "-o lazy_refcounts=on,refcount_bits=1"),
    ] {
        fixture.shell(&format!(
            "qemu-img convert -f raw -O qcow2 {options} disk.raw {name}"
        ));
        let disk = fixture.open(name).unwrap();
        assert_eq!(disk.size, SIZE, "{name}");
        assert_eq!(disk.holds, Some(Holds::FileSystem("ext4".into())), "{name}");
        assert!(content(&disk).unwrap() == fixture.raw(), "{name}");
    }
    // Nothing of what qemu-img made is left, and what it was told was not changed.
    let names: Vec<_> = fs::read_dir(fixture.0.path()).unwrap().collect();
    assert_eq!(names.len(), 12);
}

#[test]
fn internal_snapshots_are_passed_over_and_an_image_that_was_not_closed_is_read() {
    let fixture = Fixture::new();
    fixture.shell(
        "qemu-img convert -O qcow2 disk.raw image
         qemu-img snapshot -c before image
         qemu-io -f qcow2 -c 'write -P 7 0 100k' image >/dev/null
         qemu-io -f raw -c 'write -P 7 0 100k' disk.raw >/dev/null",
    );
    let read = || content(&fixture.open("image").unwrap()).unwrap();
    assert!(read() == fixture.raw());
    // The dirty bit: its counts of references may be wrong, its data are not.
    fixture.patch("image", 79, &[1]);
    assert!(read() == fixture.raw());
}

#[test]
fn a_blank_disk_and_its_size_to_the_sector_are_known() {
    let fixture = Fixture::new();
    fixture.shell("qemu-img create -q -f qcow2 blank 1049088");
    let disk = fixture.open("blank").unwrap();
    assert_eq!((disk.size, disk.holds), (1_049_088, Some(Holds::Blank)));
    fixture.shell("qemu-img create -q -f qcow2 huge 20T");
    let disk = fixture.open("huge").unwrap();
    assert_eq!((disk.size, disk.holds), (20 << 40, Some(Holds::Blank)));
    fixture.shell("qemu-img create -q -f qcow2 -o cluster_size=2M larger 100T");
    fixture.refuses("larger", ErrorKind::Unsupported, "bytes");
    fixture.shell("qemu-img create -q -f qcow2 nothing 0");
    fixture.refuses("nothing", ErrorKind::InvalidInput, "no bytes");
}

#[test]
fn backing_files_beside_the_image_are_read_and_others_only_where_they_are_allowed() {
    let fixture = Fixture::new();
    fixture.shell(
        "mkdir images elsewhere
         cp disk.raw images/base.raw
         cd images
         qemu-img create -q -f qcow2 -b base.raw -F raw middle
         qemu-io -f qcow2 -c 'write -P 5 1M 300k' -c 'write -z 3M 1M' middle >/dev/null
         qemu-img create -q -f qcow2 -b middle -F qcow2 top 9M
         qemu-io -f qcow2 -c 'write -P 6 1200k 4k' -c 'write -P 8 8900k 4k' top >/dev/null
         qemu-img convert -O raw top ../expected",
    );
    let expected = fs::read(fixture.path("expected")).unwrap();
    let disk = fixture.open("images/top").unwrap();
    assert!(content(&disk).unwrap() == expected);
    // The same through qemu-img, which is told of the files.
    fixture.patch("images/top", 79, &[1]);
    assert!(content(&fixture.open("images/top").unwrap()).unwrap() == expected);

    fixture.shell(
        "mv images/middle elsewhere/; mv images/base.raw elsewhere/
         cd images; qemu-img rebase -u -f qcow2 -b ../elsewhere/middle -F qcow2 top",
    );
    fixture.refuses("images/top", ErrorKind::Permission, "--allow-backing");
    for allowed in ["elsewhere/middle", "elsewhere"] {
        let mut options = fixture.options();
        options.allow_backing = vec![fixture.path(allowed)];
        // What is allowed may itself name what lies beside it.
        let disk = open(&fixture.path("images/top"), &options).unwrap();
        assert!(content(&disk).unwrap() == expected, "{allowed}");
    }
    let mut options = fixture.options();
    options.allow_backing = vec![fixture.path("nothing")];
    let error = open(&fixture.path("images/top"), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[test]
fn an_image_cannot_have_files_of_the_host_read() {
    let fixture = Fixture::new();
    let outside = tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, vec![b'x'; 4096]).unwrap();
    let names = |backing: &str, format: &str| {
        fixture.shell(&format!(
            "rm -f image; qemu-img create -q -u -f qcow2 -b '{backing}' -F {format} image 1M"
        ));
    };
    let shown = secret.display().to_string();
    for format in ["raw", "qcow2"] {
        names(&shown, format);
        fixture.refuses("image", ErrorKind::Permission, "does not lie beside");
    }
    // By a link beside the image, and by a way around.
    symlink(&secret, fixture.path("link")).unwrap();
    names("link", "raw");
    fixture.refuses("image", ErrorKind::Permission, "does not lie beside");
    fs::create_dir(fixture.path("inner")).unwrap();
    let up = "../".repeat(30);
    names(&format!("inner/{up}{}", &shown[1..]), "raw");
    fixture.refuses("image", ErrorKind::Permission, "does not lie beside");
    for (backing, format) in [
        (r#"json:{"driver":"file","filename":"/etc/passwd"}"#, "raw"),
        ("nbd:localhost:10809", "raw"),
        ("file:/etc/passwd", "raw"),
        ("https://example.org/x", "raw"),
    ] {
        names(backing, format);
        fixture.refuses("image", ErrorKind::Unsupported, "only QEMU can open");
    }
    // Beside the image, but no disk.
    for text in ["root:x:0:0:\n", "-----BEGIN OPENSSH PRIVATE KEY-----\n"] {
        fs::write(fixture.path("key"), text).unwrap();
        names("key", "raw");
        fixture.refuses("image", ErrorKind::Permission, "--allow-backing");
    }
    // A pipe that nobody opens at its other end, and a directory.
    fixture.shell("mkfifo pipe");
    for name in ["pipe", "inner"] {
        names(name, "raw");
        fixture.refuses("image", ErrorKind::InvalidInput, "plain file");
    }
    // A format that is not read.
    names("disk.raw", "vmdk");
    fixture.refuses("image", ErrorKind::Unsupported, "vmdk");
    // Data that lie in another file, and what is encrypted.
    fixture.shell("qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on external 1M");
    fixture.refuses("external", ErrorKind::Unsupported, "another file");
    // It measures how fast it derives keys, and gives up where the clocks of a virtual machine stand still just then.
    fixture.shell(
        "for attempt in 1 2 3 4 5 6 7 8 9 10; do
            qemu-img create -q --object secret,id=s,data=x -f qcow2 \
                -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 encrypted 1M && exit
        done
        exit 1",
    );
    fixture.refuses("encrypted", ErrorKind::Unsupported, "encrypted");
}

#[test]
fn backing_files_in_a_circle_are_refused() {
    let fixture = Fixture::new();
    fixture.shell(
        "qemu-img create -q -f qcow2 one 1M
         qemu-img create -q -f qcow2 -b one -F qcow2 two
         qemu-img rebase -u -f qcow2 -b two -F qcow2 one",
    );
    fixture.refuses("one", ErrorKind::Corrupt, "circle");
}

#[test]
fn an_image_that_is_cut_off_is_refused_and_never_read_as_zeros() {
    let fixture = Fixture::new();
    for options in ["", "-c", "-o cluster_size=4k"] {
        fixture.shell(&format!(
            "qemu-img convert -O qcow2 {options} disk.raw image"
        ));
        let whole = fs::read(fixture.path("image")).unwrap();
        let expected = fixture.raw();
        // The last cluster may end with the file, so what is there to be missed begins before it.
        for tenth in 0..10 {
            let len = whole.len() * tenth / 10;
            fs::write(fixture.path("cut"), &whole[..len]).unwrap();
            let read = open_as_qcow2(&fixture, "cut").and_then(|disk| content(&disk));
            assert!(read.is_err(), "{options} cut to {len} of {}", whole.len());
        }
        assert!(content(&fixture.open("image").unwrap()).unwrap() == expected);
    }
}

fn open_as_qcow2(fixture: &Fixture, name: &str) -> Result<DiskImage> {
    let mut options = fixture.options();
    options.format = Some(Format::Qcow2);
    open(&fixture.path(name), &options)
}

#[test]
fn a_small_file_cannot_make_a_large_disk_by_naming_its_data_many_times() {
    let fixture = Fixture::new();
    fixture.shell(
        "qemu-img create -q -f qcow2 bomb 2G
         qemu-io -f qcow2 -c 'write -P 1 0 64k' bomb >/dev/null",
    );
    let file = fs::read(fixture.path("bomb")).unwrap();
    let word = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().unwrap());
    let l1 = word(40) as usize;
    let l2 = word(l1) & 0x00ff_ffff_ffff_fe00;
    // Every cluster of a table is the same one.
    let entry = file[l2 as usize..][..8].repeat(8192);
    fixture.patch("bomb", l2, &entry);
    fixture.refuses("bomb", ErrorKind::Corrupt, "many times");
    // So it is where QEMU reads it: not closed in order.
    fixture.patch("bomb", 79, &[1]);
    fixture.refuses("bomb", ErrorKind::Corrupt, "many times");
    fixture.patch("bomb", 79, &[0]);
    // And the table is used for everything.
    fixture.patch("bomb", l1 as u64, &file[l1..l1 + 8].repeat(4));
    fixture.refuses("bomb", ErrorKind::Corrupt, "used twice");
}

#[test]
fn compressed_data_that_are_named_twice_are_refused() {
    let fixture = Fixture::new();
    fixture.shell("qemu-img convert -c -O qcow2 disk.raw image");
    let file = fs::read(fixture.path("image")).unwrap();
    let word = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().unwrap());
    let l2 = (word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    let entries = l2..l2 + (SIZE as usize / (64 << 10)) * 8;
    let mut compressed = entries.step_by(8).filter(|at| word(*at) >> 62 & 1 == 1);
    let (one, two) = (compressed.next().unwrap(), compressed.next().unwrap());
    fixture.patch("image", two as u64, &file[one..one + 8]);
    fixture.refuses("image", ErrorKind::Corrupt, "many times");
}

#[test]
fn sizes_of_tables_in_a_header_take_no_memory_that_the_file_does_not_have() {
    let fixture = Fixture::new();
    fixture.shell("qemu-img convert -O qcow2 disk.raw image");
    let file = fs::read(fixture.path("image")).unwrap();
    // Entries of the first table, clusters of counts, and snapshots, whose table begins at the next number.
    fixture.patch("image", 36, &[0xff; 4]);
    fixture.refuses("image", ErrorKind::Corrupt, "first table");
    fixture.patch("image", 36, &(4u32 << 20).to_be_bytes());
    fixture.refuses("image", ErrorKind::Corrupt, "cut off");
    for (at, len) in [(56, 4), (60, 12)] {
        fs::write(fixture.path("image"), &file).unwrap();
        fixture.patch("image", at, &vec![0xff; len]);
        // They are nothing that reading needs.
        let before = memory_peak();
        if let Ok(disk) = fixture.open("image") {
            assert!(content(&disk).unwrap() == fixture.raw(), "{at}");
        }
        let more = memory_peak() - before;
        assert!(more < 64 << 20, "{at}: {more}");
    }
}

/// The most memory that this process had, in bytes.
fn memory_peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let number = line.unwrap().split_whitespace().nth(1).unwrap();
    number.parse::<u64>().unwrap() << 10
}

#[test]
fn a_backing_file_without_a_name_is_none() {
    let fixture = Fixture::new();
    fixture.shell("qemu-img convert -O qcow2 disk.raw image");
    // An offset, and no bytes there.
    fixture.patch("image", 8, &400u64.to_be_bytes());
    assert!(content(&fixture.open("image").unwrap()).unwrap() == fixture.raw());
}

#[test]
fn a_damaged_image_gives_an_error_or_bytes_and_never_a_panic() {
    let fixture = Fixture::new();
    fixture.shell(
        "qemu-img convert -c -O qcow2 disk.raw whole
         qemu-io -f qcow2 -c 'write -P 5 1M 300k' -c 'write -z 3M 1M' whole >/dev/null",
    );
    let whole = fs::read(fixture.path("whole")).unwrap();
    let word = |at: usize| u64::from_be_bytes(whole[at..at + 8].try_into().unwrap()) as usize;
    let l1 = word(40);
    let l2 = word(l1) & 0x00ff_ffff_ffff_fe00;
    let places = (0..112)
        .chain(l1..l1 + 8)
        .chain((l2..l2 + 1024).step_by(29));
    for at in places {
        for value in [0xff, whole[at] ^ 0x81] {
            let mut damaged = whole.clone();
            damaged[at] = value;
            fs::write(fixture.path("damaged"), &damaged).unwrap();
            let Ok(disk) = open_as_qcow2(&fixture, "damaged") else {
                continue;
            };
            // Another size may have been made of it.
            if disk.size <= 2 * SIZE {
                let _ = content(&disk);
            }
        }
    }
}

#[test]
fn a_qcow2_on_a_block_device_or_in_a_stream_is_refused_with_what_to_do() {
    let fixture = Fixture::new();
    fixture
        .shell("qemu-img convert -O qcow2 disk.raw image; truncate -s %64K image; gzip -k image");
    fixture.refuses("image.gz", ErrorKind::Unsupported, "qcow2");
    let device = run(
        "losetup",
        &[
            "-f",
            "-r",
            "--show",
            fixture.path("image").to_str().unwrap(),
        ],
    );
    let device = Path::new(device.trim());
    let guessed = Source::open(device, &fixture.options());
    let named = {
        let mut options = fixture.options();
        options.format = Some(Format::Qcow2);
        open(device, &options).and_then(|disk| content(&disk))
    };
    run("losetup", &["-d", device.to_str().unwrap()]);
    let text = guessed.unwrap_err().to_string();
    assert!(text.contains("--format qcow2"), "{text}");
    assert!(named.unwrap() == fixture.raw());
}

#[test]
fn without_qemu_what_only_it_reads_is_refused_with_its_name() {
    // The others need it as little as this program does.
    let fixture = Fixture::new();
    fixture.shell("qemu-img convert -c -o compression_type=zstd -O qcow2 disk.raw zstd");
    let bin = fixture.path("bin");
    fs::create_dir(&bin).unwrap();
    for tool in ["prlimit", "blkid", "mke2fs", "env"] {
        let found = run(
            "sh",
            &[
                "-c",
                &format!("PATH=$PATH:/sbin:/usr/sbin command -v {tool}"),
            ],
        );
        symlink(found.trim(), bin.join(tool)).unwrap();
    }
    let store = fixture.path("store");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_vellum"))
        .args(["--root", store.to_str().unwrap(), "import", "i"])
        .arg(fixture.path("zstd"))
        .env("PATH", &bin)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("zstd") && said.contains("qemu-utils"),
        "{said}"
    );
}
