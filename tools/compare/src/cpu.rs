//! CPU time: of the clients, of the driver's own processes, and of the kernel's threads.

use std::fs;

/// CPU seconds of a process and of its children that have ended and been waited for.
pub fn of_process(pid: u32) -> Option<f64> {
    let stat = Stat::read(&pid.to_string())?;
    Some(stat.own + stat.children)
}

/// CPU seconds that all threads of the kernel have taken so far: loop devices, write-back,
/// journals, file systems. They are the whole host's, since they belong to nobody.
pub fn of_kernel_threads() -> f64 {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .filter_map(|pid| Stat::read(&pid))
        .filter(|stat| stat.kernel_thread)
        .map(|stat| stat.own)
        .sum()
}

/// What is needed of `/proc/PID/stat`, see proc_pid_stat(5).
struct Stat {
    own: f64,
    children: f64,
    kernel_thread: bool,
}

/// include/linux/sched.h
const PF_KTHREAD: f64 = 2_097_152.0;

impl Stat {
    fn read(pid: &str) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(line: &str) -> Option<Self> {
        // The name may hold anything, even brackets and spaces: fields count from the last one.
        let (_, fields) = line.rsplit_once(')')?;
        let fields: Vec<f64> = fields
            .split_whitespace()
            .skip(1)
            .filter_map(|field| field.parse().ok())
            .collect();
        // Here 0 is ppid, the 4th field of the manual page.
        let field = |number: usize| fields.get(number - 4).copied();
        let ticks = 100.0;
        Some(Stat {
            own: (field(14)? + field(15)?) / ticks,
            children: (field(16)? + field(17)?) / ticks,
            kernel_thread: (field(9)? / PF_KTHREAD).floor() % 2.0 >= 1.0,
        })
    }
}

/// The processors' time of the whole host since it started, in seconds: all of it, what was not
/// idle, and what a host below took for others (steal). See proc_stat(5).
#[derive(Debug, Clone, Copy)]
pub struct HostTime {
    /// All.
    pub all: f64,
    /// Not idle.
    pub busy: f64,
    /// Stolen.
    pub steal: f64,
}

impl HostTime {
    /// Until now.
    pub fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
        // user nice system idle iowait irq softirq steal; what follows is part of these.
        let ticks = line.split_whitespace().take(8).map(str::parse::<f64>);
        let ticks: Vec<f64> = ticks.collect::<Result<_, _>>().ok()?;
        let [_, _, _, idle, iowait, _, _, steal] = *ticks.as_slice() else {
            return None;
        };
        let all: f64 = ticks.iter().sum();
        Some(HostTime {
            all: all / 100.0,
            busy: (all - idle - iowait) / 100.0,
            steal: steal / 100.0,
        })
    }

    /// The parts of the time since `earlier` in which processors were busy, and were stolen (0 to 1).
    pub fn since(self, earlier: Self) -> (f64, f64) {
        let all = (self.all - earlier.all).max(f64::MIN_POSITIVE);
        let part = |now: f64, then: f64| ((now - then) / all).clamp(0.0, 1.0);
        (
            part(self.busy, earlier.busy),
            part(self.steal, earlier.steal),
        )
    }
}

/// Takes the CPU time of a piece of work.
#[derive(Debug)]
pub struct Meter {
    servers: Vec<u32>,
    server: f64,
    kernel: f64,
}

/// CPU seconds of a piece of work.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu {
    /// Of the program that did the work, with what the kernel did on its behalf.
    pub client: f64,
    /// Of the driver's own processes.
    pub server: f64,
    /// Of the kernel's threads.
    pub kernel: f64,
}

impl Meter {
    /// From here on, with these processes as the driver's.
    pub fn start(servers: Vec<u32>) -> Self {
        Meter {
            server: Self::sum(&servers),
            servers,
            kernel: of_kernel_threads(),
        }
    }

    /// Until here. `client` is known from the clients' ends.
    pub fn stop(&self, client: f64) -> Cpu {
        Cpu {
            client,
            server: (Self::sum(&self.servers) - self.server).max(0.0),
            kernel: (of_kernel_threads() - self.kernel).max(0.0),
        }
    }

    fn sum(servers: &[u32]) -> f64 {
        servers.iter().filter_map(|&pid| of_process(pid)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_spaces_does_not_move_the_fields() {
        let line = "7 (a) b (c) S 2 0 0 0 -1 2129984 0 0 0 0 150 50 30 20 20 0 1 0 9";
        let stat = Stat::parse(line).unwrap();
        assert_eq!(stat.own, 2.0);
        assert_eq!(stat.children, 0.5);
        assert!(stat.kernel_thread);
    }

    #[test]
    fn the_hosts_time_knows_what_was_stolen() {
        let stat = |line: &str| HostTime::parse(&format!("{line}\ncpu0 1 2\n"));
        let before = stat("cpu  100 0 100 700 100 0 0 0 5 0").unwrap();
        let after = stat("cpu  200 0 200 1300 100 0 0 200 5 0").unwrap();
        let (busy, steal) = after.since(before);
        assert_eq!((busy, steal), (0.4, 0.2));
        assert!(stat("cpu  1 2 3").is_none());
    }

    #[test]
    fn a_user_process_is_no_kernel_thread() {
        assert!(of_process(std::process::id()).is_some());
        let stat = Stat::read("self").unwrap();
        assert!(!stat.kernel_thread);
    }
}
