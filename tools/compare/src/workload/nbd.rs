//! A block device over NBD.

use anyhow::Result;

use super::fio::fio;
use super::{BaseKind, Better, Measured, Metric, Run, Sizes, Workload, missing};
use crate::driver::Kind;
use crate::host;

/// fio's NBD client on the device.
pub(super) struct Nbd;

impl Workload for Nbd {
    fn id(&self) -> String {
        "nbd".to_owned()
    }

    fn title(&self) -> String {
        "A block device over NBD".to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "fio through its NBD engine on a device of {} MiB that the image holds, over a unix \
             socket, 16 requests at a time. First writes: every block for the first time, 4 KiB \
             at random places of one half, 1 MiB in order of the other half. Flushed: 4 KiB \
             writes with a flush after each, one at a time.",
            sizes.device >> 20
        )
    }

    fn caveats(&self) -> &'static str {
        "The client is QEMU's or fio's over a unix socket in user space; a kernel client \
         would add its own cost to all servers alike."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics: Vec<Metric> = [
            ("read4k", "4 KiB random read", "requests/s"),
            ("first4k", "4 KiB random first write", "requests/s"),
            ("again4k", "4 KiB random rewrite", "requests/s"),
            ("flushed4k", "4 KiB rewrite, flushed", "requests/s"),
            ("read1m", "1 MiB read", "MB/s"),
            ("first1m", "1 MiB first write", "MB/s"),
            ("again1m", "1 MiB rewrite", "MB/s"),
        ]
        .map(|(id, title, unit)| Metric::new(id, title, unit, Better::Higher))
        .to_vec();
        metrics.extend(Metric::costs());
        metrics
    }

    fn kind(&self) -> Kind {
        Kind::Nbd
    }

    fn weight(&self) -> f64 {
        6.0
    }

    fn base(&self) -> BaseKind {
        BaseKind::Device
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        missing(&[("fio", "fio")]).or_else(|| {
            let engines = host::sh("fio", &["--enghelp"]).ok()?.stdout;
            let has = engines.lines().any(|line| line.trim() == "nbd");
            (!has).then(|| "this fio was built without its NBD engine".to_owned())
        })
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let started = run.container()?;
        let uri = format!("--uri={}", started.access.uri()?);
        let half = run.sizes.device / 2;
        let (size, offset) = (format!("--size={half}"), format!("--offset={half}"));
        let runtime = format!("--runtime={}ms", run.sizes.millis);
        let timed: &[&str] = &["--time_based", &runtime];
        let common: &[&str] = &["--ioengine=nbd", &uri, &size];
        let deep: &[&str] = &["--iodepth=16"];
        let small: &[&str] = &["--bs=4k"];
        let large: &[&str] = &["--bs=1m", &offset];
        let mut measured = Measured::default();
        run.cold(&started)?;
        let meter = run.meter();
        let mut client = 0.0;
        let mut job = |parts: &[&[&str]]| -> Result<(f64, f64)> {
            let done = fio(&[&[common], parts].concat().concat())?;
            client += done.cpu;
            Ok((done.rate, done.bytes / 1e6))
        };
        measured.add("read1m", job(&[deep, large, &["--rw=read"]])?.1);
        measured.add("read4k", job(&[deep, small, &["--rw=randread"], timed])?.0);
        measured.add("first4k", job(&[deep, small, &["--rw=randwrite"]])?.0);
        measured.add(
            "again4k",
            job(&[deep, small, &["--rw=randwrite"], timed])?.0,
        );
        measured.add("first1m", job(&[deep, large, &["--rw=write"]])?.1);
        measured.add("again1m", job(&[deep, large, &["--rw=write"]])?.1);
        // What the writes before left is not to be flushed with the first of these.
        host::sync_fs(run.place)?;
        let flushed: &[&str] = &["--rw=randwrite", "--fsync=1", "--iodepth=1"];
        measured.add("flushed4k", job(&[small, flushed, timed])?.0);
        measured.cpu(meter.stop(client));
        run.done(&started, &mut measured)?;
        Ok(measured)
    }
}
