//! Databases in containers that are snapshotted and forked while they work: every transaction that was
//! acknowledged before is in the copy, and the copy is whole.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::common::{TestStore, run, shell, wait_until};

/// Debian's programs of PostgreSQL 15.
const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";

/// Runs a line in a shell as the user that PostgreSQL wants.
fn as_postgres(line: &str) -> String {
    run("su", &["postgres", "-s", "/bin/sh", "-c", line])
}

/// A PostgreSQL server on the directory `pg` of a mounted container. Dropping it stops it.
struct Postgres {
    data: PathBuf,
    socket: PathBuf,
}

impl Postgres {
    /// Makes a database system in `dir` and starts it.
    fn make(dir: &Path, socket: &Path) -> Self {
        let data = dir.join("pg");
        shell(
            dir,
            "mkdir pg && chown postgres pg && chmod 700 pg && chmod 755 .",
        );
        as_postgres(&format!(
            "{PROGRAMS}/initdb -A trust -D '{}'",
            data.display()
        ));
        Postgres::start(data, socket)
    }

    /// Starts the system of a fork: it recovers as after a power cut. The lock file names a process of the
    /// origin, which in a container of its own nobody would see.
    fn recover(dir: &Path, socket: &Path) -> Self {
        let data = dir.join("pg");
        std::fs::remove_file(data.join("postmaster.pid")).unwrap();
        Postgres::start(data, socket)
    }

    fn start(data: PathBuf, socket: &Path) -> Self {
        std::fs::create_dir_all(socket).unwrap();
        run("chown", &["postgres", socket.to_str().unwrap()]);
        let (shown, place) = (data.display(), socket.display());
        as_postgres(&format!(
            "{PROGRAMS}/pg_ctl -s -w -t 300 -D '{shown}' -l '{place}/log' -o \"-k '{place}' -h ''\" start"
        ));
        Postgres {
            data,
            socket: socket.to_owned(),
        }
    }

    fn query(&self, sql: &str) -> String {
        let line = format!(
            "psql -h '{}' -At -c \"{sql}\" postgres",
            self.socket.display()
        );
        as_postgres(&line).trim().to_owned()
    }

    /// A program that works on the database in the background.
    fn background(&self, line: &str) -> Child {
        let line = line.replace("SOCKET", &self.socket.display().to_string());
        Command::new("su")
            .args(["postgres", "-s", "/bin/sh", "-c", &line])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let line = format!(
            "{PROGRAMS}/pg_ctl -s -m immediate -D '{}' stop",
            self.data.display()
        );
        let _ = Command::new("su")
            .args(["postgres", "-s", "/bin/sh", "-c", &line])
            .status();
    }
}

/// Numbers that a client of the database was told are in it.
fn acknowledged(socket: &Path) -> u64 {
    let told = std::fs::read_to_string(socket.join("told")).unwrap_or_default();
    told.lines()
        .filter(|line| line.starts_with("INSERT"))
        .count() as u64
}

/// A mounted container `db` whose PostgreSQL works: for pgbench, and for a client that is told of each number
/// that it inserts.
struct Working {
    store: TestStore,
    socket: PathBuf,
    origin: Postgres,
    load: Child,
    writer: Child,
}

impl Working {
    fn new() -> Self {
        let store = TestStore::new();
        std::fs::create_dir_all(store.path("root")).unwrap();
        store.ok(&["import", "empty", &store.arg("root"), "--size", "2G"]);
        store.ok(&["create", "empty", "--name", "db"]);
        let dir = mount_for_postgres(&store, "db");
        let socket = store.path("socket");
        let origin = Postgres::make(&dir, &socket);
        origin.query("CREATE TABLE told (n bigint PRIMARY KEY)");
        let place = socket.display();
        as_postgres(&format!("pgbench -h '{place}' -q -i -s 2 postgres"));
        let load = origin.background("pgbench -h 'SOCKET' -c 2 -T 600 postgres");
        let writer = origin.background(
            "n=0; while echo \"INSERT INTO told VALUES ($n);\"; do n=$((n+1)); done \
             | stdbuf -oL psql -h 'SOCKET' postgres > 'SOCKET/told'",
        );
        wait_until("the client is told", || acknowledged(&socket) > 200);
        Working {
            store,
            socket,
            origin,
            load,
            writer,
        }
    }

    fn acknowledged(&self) -> u64 {
        acknowledged(&self.socket)
    }

    /// Sees that it goes on as if nothing had happened, and ends it.
    fn end(mut self) -> TestStore {
        let before = self.acknowledged();
        wait_until("the origin goes on", || self.acknowledged() > before);
        assert_eq!(self.load.try_wait().unwrap(), None, "pgbench ended");
        for child in [&mut self.writer, &mut self.load] {
            let _ = child.kill();
        }
        drop(self.origin);
        for child in [&mut self.writer, &mut self.load] {
            let _ = child.wait();
        }
        wait_until("the clients have ended", || {
            self.store.output(&["umount", "db"]).status.success()
        });
        self.store
    }
}

/// Mounts a container where PostgreSQL, which is not root, can go.
fn mount_for_postgres(store: &TestStore, name: &str) -> PathBuf {
    run("chmod", &["755", store.dir.path().to_str().unwrap()]);
    let dir = store.path(name);
    std::fs::create_dir(&dir).unwrap();
    store.ok(&["mount", name, dir.to_str().unwrap()]);
    dir
}

/// Checks a copy of a [`Working`] database that was made once `told` transactions were acknowledged.
fn check_postgres(copy: &Postgres, told: u64) {
    let found: u64 = copy.query("SELECT count(*) FROM told").parse().unwrap();
    assert!(
        found >= told,
        "{found} of {told} acknowledged transactions are in the copy"
    );
    let whole = copy.query("SELECT max(n) + 1 = count(*) FROM told");
    assert_eq!(
        whole, "t",
        "a later transaction is there, and an earlier one is not"
    );
    // Each transaction of pgbench changes three balances by the same amount.
    let balanced = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = \
        (SELECT sum(bbalance) FROM pgbench_branches) AND (SELECT sum(bbalance) FROM pgbench_branches) \
        = (SELECT sum(tbalance) FROM pgbench_tellers)";
    assert_eq!(copy.query(balanced), "t");
    as_postgres(&format!(
        "{PROGRAMS}/pg_amcheck -h '{}' --install-missing --heapallindexed postgres",
        copy.socket.display()
    ));
}

#[test]
fn a_fork_of_a_running_postgresql_holds_every_acknowledged_transaction_and_is_whole() {
    let working = Working::new();
    let store = &working.store;
    let told = working.acknowledged();
    let began = Instant::now();
    store.ok(&["fork", "db", "fork"]);
    let dir = mount_for_postgres(store, "fork");
    let fork = Postgres::recover(&dir, &store.path("fork-socket"));
    fork.query("SELECT 1");
    println!("{:?} from the command to the answer", began.elapsed());
    check_postgres(&fork, told);
    drop(fork);
    store.ok(&["umount", "fork"]);
    let store = working.end();
    store.ok(&["prune"]);
    store.ok(&["check", "--scrub"]);
}

/// Backs the container `db` up, as a delta since a snapshot where one is named, restores that in another store,
/// and forks it there: a fork is used, so that the next delta finds what it needs.
fn carry_over(from: &TestStore, to: &TestStore, name: &str, since: Option<&str>) {
    let file = from.arg(name);
    let mut arguments = vec!["backup", "db", "--snapshot", name, "-o", &file];
    arguments.extend(since.iter().flat_map(|since| ["--since", *since]));
    from.ok(&arguments);
    to.ok(&["restore", "db", &file]);
    to.ok(&["fork", "db", name, "--from", name]);
}

#[test]
fn a_full_backup_and_a_delta_of_a_running_postgresql_restore_to_databases_that_are_whole() {
    let (working, other) = (Working::new(), TestStore::new());
    let store = &working.store;
    let mut since: Option<&str> = None;
    for name in ["full", "delta"] {
        let told = working.acknowledged();
        wait_until("the database changes", || {
            working.acknowledged() > told + 50
        });
        let told = working.acknowledged();
        carry_over(store, &other, name, since.replace(name));
        let dir = mount_for_postgres(&other, name);
        let restored = Postgres::recover(&dir, &other.path(&format!("{name}-socket")));
        check_postgres(&restored, told);
        drop(restored);
        other.ok(&["umount", name]);
    }
    working.end();
    other.ok(&["check", "--scrub"]);
}

/// A sqlite3 that inserts one row after the other into `data.db`, each durable before it is told.
struct Inserting {
    writer: Child,
    told: PathBuf,
    stop: PathBuf,
}

impl Inserting {
    fn start(store: &TestStore, dir: &Path) -> Self {
        let database = dir.join("data.db");
        let (told, stop) = (store.path("told"), store.path("stop"));
        let schema = "PRAGMA journal_mode=WAL; CREATE TABLE told (n INTEGER PRIMARY KEY);";
        run("sqlite3", &[database.to_str().unwrap(), schema]);
        // An answer of `told` follows each row that is in the database durably.
        let line = format!(
            "n=0; while [ ! -e '{}' ]; do echo \"INSERT INTO told VALUES ($n); SELECT 'told';\"; n=$((n+1)); done \
             | stdbuf -oL sqlite3 -cmd 'PRAGMA synchronous=FULL' '{}' > '{}'",
            stop.display(),
            database.display(),
            told.display()
        );
        let writer = Command::new("sh").args(["-c", &line]).spawn().unwrap();
        Inserting { writer, told, stop }
    }

    fn acknowledged(&self) -> usize {
        let told = std::fs::read_to_string(&self.told).unwrap_or_default();
        told.lines().filter(|line| *line == "told").count()
    }

    /// Waits for some more rows; returns how many are durable.
    fn wait_for_more(&self) -> usize {
        let before = self.acknowledged();
        wait_until("the writer goes on", || self.acknowledged() > before + 20);
        self.acknowledged()
    }

    fn end(mut self) {
        std::fs::write(&self.stop, []).unwrap();
        assert!(self.writer.wait().unwrap().success());
    }
}

/// Mounts a container with such a database, which is whole and has at least so many rows, without gaps.
fn check_sqlite(store: &TestStore, name: &str, least: usize) {
    let database = store.mount(name).join("data.db");
    let ask = |sql: &str| {
        run("sqlite3", &[database.to_str().unwrap(), sql])
            .trim()
            .to_owned()
    };
    assert_eq!(ask("PRAGMA integrity_check"), "ok", "{name}");
    let found: usize = ask("SELECT count(*) FROM told").parse().unwrap();
    assert!(found >= least, "{name}: {found} of {least}");
    assert_eq!(ask("SELECT max(n) + 1 = count(*) FROM told"), "1", "{name}");
    store.ok(&["umount", name]);
}

#[test]
fn snapshots_of_a_working_sqlite_hold_every_acknowledged_row_in_both_ways_of_taking_them() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "db"]);
    let writer = Inserting::start(&store, &store.mount("db"));
    for (name, options) in [("crash", &[][..]), ("clean", &["--freeze"])] {
        let acknowledged = writer.wait_for_more();
        let mut arguments = vec!["snapshot", "db", name];
        arguments.extend(options);
        store.ok(&arguments);
        store.ok(&["fork", "db", name, "--from", name]);
        check_sqlite(&store, name, acknowledged);
    }
    writer.end();
    store.ok(&["umount", "db"]);
}

#[test]
fn backups_of_a_working_sqlite_restore_to_databases_with_every_acknowledged_row() {
    let (store, other) = (TestStore::new(), TestStore::new());
    store.small_image("base");
    store.ok(&["create", "base", "--name", "db"]);
    let writer = Inserting::start(&store, &store.mount("db"));
    let mut since: Option<&str> = None;
    for name in ["full", "first", "second"] {
        let acknowledged = writer.wait_for_more();
        carry_over(&store, &other, name, since.replace(name));
        check_sqlite(&other, name, acknowledged);
    }
    writer.end();
    store.ok(&["umount", "db"]);
    other.ok(&["check", "--scrub"]);
}
