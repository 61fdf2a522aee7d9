//! SQLite: commits a second.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::{Better, Measured, Metric, Run, Sizes, Workload, missing};
use crate::host;

const DATABASE: &str = "data/database";
const ROWS: u32 = 20_000;

/// Puts a database of about 24 MB into the image's tree.
pub(super) fn fill(tree: &Path) -> Result<()> {
    if missing(&[("sqlite3", "sqlite3")]).is_some() {
        return Ok(());
    }
    let script = format!(
        "CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB);
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS})
         INSERT INTO t SELECT i, randomblob(1000) FROM n;"
    );
    host::run(Command::new("sqlite3").arg(tree.join(DATABASE)).arg(script))?;
    Ok(())
}

/// One row a transaction.
pub(super) struct Sqlite {
    /// With a write-ahead log, or a rollback journal.
    pub wal: bool,
}

impl Workload for Sqlite {
    fn id(&self) -> String {
        if self.wal {
            "sqlite-wal"
        } else {
            "sqlite-rollback"
        }
        .to_owned()
    }

    fn title(&self) -> String {
        if self.wal {
            "SQLite, write-ahead log"
        } else {
            "SQLite, rollback journal"
        }
        .to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "sqlite3 with synchronous=FULL changes one row of 1 kB in each of {} transactions, in \
             a database of 24 MB that the image holds; then the same rows again. Commits a second.",
            sizes.commits
        )
    }

    fn headline(&self) -> bool {
        self.wal
    }

    fn caveats(&self) -> &'static str {
        "The time holds the start of the program sqlite3, which is small beside the commits. \
         Each commit waits for the disk: the disk decides much of the figure."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![
            Metric::new("first", "first touch", "commits/s", Better::Higher),
            Metric::new("steady", "steady", "commits/s", Better::Higher),
        ];
        metrics.extend(Metric::costs());
        metrics
    }

    fn weight(&self) -> f64 {
        3.5
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        missing(&[("sqlite3", "sqlite3")])
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let journal = if self.wal { "WAL" } else { "DELETE" };
        let mut script = format!("PRAGMA journal_mode={journal}; PRAGMA synchronous=FULL;\n");
        let mut row: u32 = 1;
        for _ in 0..run.sizes.commits {
            row = row.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let id = row % ROWS + 1;
            writeln!(script, "UPDATE t SET v=randomblob(1000) WHERE id={id};")?;
        }
        let file = run.scratch.join("commits.sql");
        std::fs::write(&file, script)?;
        let read = format!(".read {}", file.display());

        let started = run.container()?;
        let database = started.access.dir()?.join(DATABASE);
        let mut measured = Measured::default();
        run.cold(&started)?;
        let meter = run.meter();
        let mut client = 0.0;
        for id in ["first", "steady"] {
            let done = host::run(Command::new("sqlite3").arg(&database).arg(&read))?;
            measured.add(id, f64::from(run.sizes.commits) / done.seconds);
            client += done.cpu;
        }
        measured.cpu(meter.stop(client));
        run.done(&started, &mut measured)?;
        Ok(measured)
    }
}
