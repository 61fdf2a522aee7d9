//! The worker of a mounted container is killed again and again while its file system is in use:
//! by SIGKILL, and by the kernel for want of memory. Nobody sees it.

use crate::common;
use crate::server_support;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{TestStore, kill, run};
use crate::server_support::{Container, Load, fsck, wait_long};

#[test]
fn thirty_kills_of_the_worker_of_a_mounted_container_lose_no_write() {
    let store = TestStore::new();
    let container = Container::mounted(&store, "c");
    let data = container.data();
    let loads = [Load::synced(&data), Load::buffered(&data)];
    let mut pauses = Vec::new();
    for round in 0..30_u32 {
        // First writes keep coming: a new file each time, part of it in the page cache.
        let new = data.join(format!("new{round}"));
        fs::write(new, vec![round as u8 + 1; 150_000]).unwrap();
        if round % 3 == 0 {
            run("sync", &["-f", data.to_str().unwrap()]);
        }
        pauses.push(container.kill_worker().last_pause_us);
        // Some kills hit a worker that has no standby behind it.
        std::thread::sleep(Duration::from_millis(if round % 4 == 0 { 20 } else { 130 }));
        assert!(loads.iter().all(Load::is_running), "kill {round}");
    }
    let done = loads.map(Load::finish);
    pauses.sort_unstable();
    println!("pauses, us: median {} longest {}", pauses[15], pauses[29]);
    assert!(pauses[29] < 20_000_000, "{pauses:?}");
    let status = container.call("status");
    assert_eq!(status["failures"], 0, "{status}");
    assert_eq!(status["restarts"], 30, "{status}");
    let row = server_support::row(&store, "c");
    let state = &row["device"]["state"];
    assert_eq!(state["restarts"], 30, "{state}");
    assert_eq!(state["longest_pause_us"], pauses[29], "{state}");

    store.ok(&["umount", "c"]);
    fsck(&store, "c");
    let data = store.mount("c").join("data");
    for (job, pass) in &done {
        job.verify(&data, *pass);
    }
    for round in 0..30_u8 {
        let bytes = fs::read(data.join(format!("new{round}"))).unwrap();
        assert!(bytes == vec![round + 1; 150_000], "file new{round} changed");
    }
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
    store.assert_nothing_runs();
}

#[test]
fn a_worker_that_is_killed_for_memory_under_load_comes_back_and_its_supervisor_is_spared() {
    let store = TestStore::new();
    // What the layers take on a tmpfs is memory too, and the worker's.
    let on_tmpfs = nix::sys::statfs::statfs(store.dir.path())
        .unwrap()
        .filesystem_type()
        == nix::sys::statfs::TMPFS_MAGIC;
    let limit: u64 = if on_tmpfs { 256 << 20 } else { 32 << 20 };
    let group = MemoryGroup::new(limit);
    let container = Container::mounted(&store, "c");
    let before = container.settled();
    let adjusted = |pid: i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        text.trim().parse::<i32>().unwrap()
    };
    let supervisors = adjusted(before.supervisor.pid);
    // Without CAP_SYS_RESOURCE it stays as it was, and one limit for all may kill all.
    let exempt = supervisors == -1000;
    if exempt {
        group.add(before.supervisor.pid);
        group.add(before.standby.unwrap().pid);
    }
    println!("oom_score_adj of the supervisor: {supervisors}");
    assert_eq!(adjusted(before.standby.unwrap().pid), supervisors);
    assert_eq!(adjusted(before.worker.unwrap().pid), supervisors + 1);

    let loads = [
        Load::synced(&container.data()),
        Load::buffered(&container.data()),
    ];
    for round in 1..=3 {
        let worker = container.settled().worker.unwrap().pid;
        group.add(worker);
        group.fill_until_a_kill();
        let state = container.served(Some(worker));
        assert_eq!(state.supervisor, before.supervisor, "kill {round}");
        println!("kill {round} for memory: pause {} us", state.last_pause_us);
        assert!(loads.iter().all(Load::is_running), "kill {round}");
    }
    for load in loads {
        load.finish();
    }
    let status = container.call("status");
    assert_eq!(status["failures"], 0, "{status}");
    assert!(status["restarts"].as_u64().unwrap() >= 3, "{status}");
    store.ok(&["umount", "c"]);
    fsck(&store, "c");
    store.assert_nothing_runs();
}

/// A control group of either version with a limit to its memory; removed when dropped.
struct MemoryGroup {
    dir: PathBuf,
    v2: bool,
    limit: u64,
    ballast: tempfile::TempDir,
}

impl MemoryGroup {
    fn new(limit: u64) -> MemoryGroup {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let v2 = !v1.is_dir();
        let parent = if v2 { Path::new("/sys/fs/cgroup") } else { v1 };
        if v2 {
            // Where it is so already, the write changes nothing.
            let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory");
        }
        let dir = parent.join(format!("vellum-test-{}", std::process::id()));
        let group = MemoryGroup {
            ballast: tempfile::tempdir_in("/dev/shm").unwrap(),
            dir,
            v2,
            limit,
        };
        let made = fs::create_dir(&group.dir).and_then(|()| {
            let [limit, swap] = match v2 {
                true => [
                    ("memory.max", limit.to_string()),
                    ("memory.swap.max", "0".into()),
                ],
                false => [
                    ("memory.limit_in_bytes", limit.to_string()),
                    ("memory.swappiness", "0".into()),
                ],
            };
            fs::write(group.dir.join(limit.0), limit.1)?;
            // A host without swap has no such file.
            let _ = fs::write(group.dir.join(swap.0), swap.1);
            Ok(())
        });
        made.unwrap_or_else(|error| {
            panic!(
                "{}: {error}: this test needs root and a control group whose memory it may limit \
                 (cgroup v1, or v2 with the memory controller at the root)",
                group.dir.display()
            )
        });
        group
    }

    fn add(&self, pid: i32) {
        fs::write(self.dir.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    /// Processes that the kernel has killed here.
    fn kills(&self) -> u64 {
        let file = if self.v2 {
            "memory.events"
        } else {
            "memory.oom_control"
        };
        let text = fs::read_to_string(self.dir.join(file)).unwrap();
        let line = text.lines().find(|line| line.starts_with("oom_kill "));
        line.unwrap()["oom_kill ".len()..].parse().unwrap()
    }

    /// Takes memory that cannot be reclaimed, bit by bit, and gives it back once somebody was
    /// killed for it. Whoever takes it is smaller than a worker, and exempt where that is allowed.
    fn fill_until_a_kill(&self) {
        let before = self.kills();
        let file = tempfile::NamedTempFile::new_in(self.ballast.path()).unwrap();
        let script = "{ echo -1000 > /proc/self/oom_score_adj; } 2>/dev/null; \
                      echo $$ > \"$1/cgroup.procs\" && exec cat > \"$2\"";
        let child = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(&self.dir)
            .arg(file.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut taker = common::Running(child);
        let mut pipe = taker.0.stdin.take().unwrap();
        let mut taken = 0;
        while self.kills() == before {
            assert!(taken < 2 * self.limit, "nobody is killed");
            // Small bits at the end, so that the room that one death makes is enough.
            let bit = if taken < self.limit / 2 {
                1 << 20
            } else {
                64 << 10
            };
            pipe.write_all(&vec![1; bit]).unwrap();
            taken += bit as u64;
            wait_long("memory was taken, or somebody was killed", || {
                file.path().metadata().unwrap().len() >= taken || self.kills() > before
            });
        }
        taker.0.kill().unwrap();
        taker.0.wait().unwrap();
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Where the test failed half-way.
        let procs = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines().filter_map(|line| line.parse().ok()) {
            kill(pid);
        }
        for _ in 0..200 {
            match fs::remove_dir(&self.dir) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                _ => return,
            }
        }
        eprintln!("{}: still there", self.dir.display());
    }
}
