//! Whether a process of a device hangs: what is seen of it once a second, and what that means.
//!
//! Nobody can tell a program that thinks from one that never will by looking once. So whoever watches
//! looks once a second and remembers since when it has seen nothing but what a process shows that
//! hangs. Whatever else is seen, and a watcher that did not look for a while (it was stopped itself,
//! or the host slept), begins anew. docs/local-device.md, "Processes that hang", has the limits.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::process::{Identity, Threads, monotonic_ns};
use crate::fuse::ring::memory::RingMemory;
use crate::fuse::slot::{Pulse, Shared};

/// How often a process is looked at, and how often it says itself that it runs.
pub(super) const PERIOD: Duration = Duration::from_secs(1);
/// A process that says for this long that it runs no more is looked at more closely.
const SILENT: Duration = Duration::from_millis(2500);
/// Two looks farther apart than this say nothing of the time between them.
const GAP: Duration = Duration::from_secs(5);
/// A wait for the host that lasts this long is one for a disk that hangs.
const SLOW_WAIT: Duration = Duration::from_secs(10);

/// How long a process may show what one shows that hangs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Stopped by a signal or a debugger.
    stopped: Duration,
    /// Requests wait, and no thread runs or waits for the host.
    still: Duration,
    /// Requests wait, and this much processor time was used on them.
    busy: Duration,
    /// One request waits while others are answered and no disk hangs.
    one: Duration,
    /// A supervisor does not say that it runs.
    silent: Duration,
}

impl Limits {
    /// With this as the limit for a worker that makes no progress.
    pub(super) fn new(still: Duration) -> Limits {
        Limits {
            stopped: Duration::from_secs(2),
            still,
            busy: still,
            one: still * 10,
            silent: still * 2,
        }
    }
}

impl Limits {
    /// A worker that lived for longer than this before it hung ends a row of those that hung.
    pub(super) fn row(&self) -> Duration {
        self.still * 20
    }
}

/// In what way a process hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hang {
    /// Somebody stopped it.
    Stopped,
    /// Its threads wait for each other.
    Still,
    /// It computes without end.
    Busy,
    /// A request is forgotten, or the thread that has it waits for ever.
    One,
}

impl Hang {
    /// In words that follow "it".
    pub(super) fn reason(self) -> &'static str {
        match self {
            Hang::Stopped => "was stopped by a signal or a debugger",
            Hang::Still => "did nothing while requests waited",
            Hang::Busy => "computed without end while requests waited",
            Hang::One => "did not answer a request while it answered others",
        }
    }
}

/// What is seen of a worker at one moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Look {
    /// By a signal or a debugger.
    stopped: bool,
    /// It has opened the device.
    serves: bool,
    /// Requests wait for an answer.
    pending: bool,
    /// How old the oldest of them is that a thread has.
    oldest: Duration,
    /// How long the longest wait for the host lasts; `None` where no thread waits for it.
    wait: Option<Duration>,
    /// Requests answered since the device was attached.
    served: u64,
    /// What its threads do, where somebody had a reason to look.
    threads: Option<Threads>,
}

/// Remembers what was seen of one worker.
#[derive(Debug)]
pub(super) struct Watch {
    limits: Limits,
    last: Instant,
    stopped_since: Option<Instant>,
    still_since: Option<(Instant, Duration)>,
    /// Requests answered, and the processor time used until the last was.
    progress: (u64, Option<Duration>),
    /// Since when no wait for the host was long.
    fluent_since: Instant,
    /// Since when threads wait in the kernel.
    in_kernel: HashMap<i32, Instant>,
}

impl Watch {
    /// Of a worker that has just been started, or that nobody watched until now.
    pub(super) fn new(limits: Limits, now: Instant) -> Watch {
        Watch {
            limits,
            last: now,
            stopped_since: None,
            still_since: None,
            progress: (0, None),
            fluent_since: now,
            in_kernel: HashMap::new(),
        }
    }

    /// Looks at a worker. `queued` says whether the kernel has requests that nobody took.
    pub(super) fn look(
        &mut self,
        pid: i32,
        serves: bool,
        queued: bool,
        shared: &Shared,
        ring: Option<&RingMemory>,
    ) -> Look {
        let now = Instant::now();
        let of_ring = ring.and_then(RingMemory::oldest_request);
        let oldest = shared.oldest_request().max(of_ring);
        let oldest = oldest.map(Duration::from_nanos);
        let mut look = Look {
            stopped: false,
            serves,
            pending: queued || oldest.is_some(),
            oldest: oldest.unwrap_or_default(),
            wait: shared.longest_wait().map(Duration::from_nanos),
            served: shared.served(),
            threads: None,
        };
        let no_progress = !serves || (look.pending && look.served == self.progress.0);
        let silent = is_silent(&shared.table().worker, SILENT);
        if !silent && !no_progress && look.oldest < PERIOD * 2 {
            self.in_kernel.clear();
            return look;
        }
        look.stopped = matches!(Identity::of(pid), Ok(Some(one)) if one.is_stopped());
        look.threads = Threads::of(pid);
        let threads = look.threads.iter();
        let in_kernel: Vec<i32> = threads
            .flat_map(|threads| &threads.in_kernel)
            .copied()
            .collect();
        self.in_kernel
            .retain(|thread, _| in_kernel.contains(thread));
        for thread in in_kernel {
            let since = *self.in_kernel.entry(thread).or_insert(now);
            look.wait = look.wait.max(Some(now.saturating_duration_since(since)));
        }
        look
    }

    /// What it means; `now` is when it was seen.
    pub(super) fn judge(&mut self, look: &Look, now: Instant) -> Option<Hang> {
        if now.saturating_duration_since(self.last) > GAP {
            *self = Watch::new(self.limits, now);
        }
        self.last = now;
        let since = |at: Instant| now.saturating_duration_since(at);
        let stopped_since = look.stopped.then(|| *self.stopped_since.get_or_insert(now));
        self.stopped_since = stopped_since;
        if stopped_since.is_some_and(|at| since(at) >= self.limits.stopped) {
            return Some(Hang::Stopped);
        }
        if look.wait.is_some_and(|wait| wait >= SLOW_WAIT) {
            self.fluent_since = now;
        }
        let cpu = look.threads.as_ref().map(|threads| threads.cpu);
        if !look.pending && look.serves || look.served != self.progress.0 {
            self.progress = (look.served, cpu);
            self.still_since = None;
        } else {
            // Where it cannot be told now, it is told the next time.
            let used = cpu.map_or(Duration::ZERO, |used| {
                used.saturating_sub(*self.progress.1.get_or_insert(used))
            });
            if look.serves && used >= self.limits.busy {
                return Some(Hang::Busy);
            }
            if self.is_still(look, now) {
                return Some(Hang::Still);
            }
        }
        let (one, calm) = (self.limits.one, self.limits.still);
        if look.oldest >= one && since(self.fluent_since) >= calm.max(SLOW_WAIT) {
            return Some(Hang::One);
        }
        None
    }

    /// True where nothing has happened for too long. Waiting for a processor is no hang, and threads
    /// that wake up now and then to look around do not count as work.
    fn is_still(&mut self, look: &Look, now: Instant) -> bool {
        let Some(threads) = &look.threads else {
            self.still_since = None;
            return false;
        };
        // The first thread of one that serves looks around once a second, as we do: it is often seen.
        let runs = threads.runnable || (threads.first_runnable && !look.serves);
        if look.wait.is_some() || runs || look.stopped {
            self.still_since = None;
            return false;
        }
        let (at, cpu) = *self.still_since.get_or_insert((now, threads.cpu));
        let lasts = now.saturating_duration_since(at);
        if threads.cpu.saturating_sub(cpu) > lasts / 20 + Duration::from_millis(50) {
            self.still_since = None;
            return false;
        }
        lasts >= self.limits.still
    }
}

/// True while a process has not said for `limit` that it runs.
fn is_silent(pulse: &Pulse, limit: Duration) -> bool {
    use std::sync::atomic::Ordering;
    let beat = pulse.beat_ns.load(Ordering::Acquire);
    u128::from(monotonic_ns().saturating_sub(beat)) >= limit.as_nanos()
}

/// Remembers what was seen of a process that only has to say that it runs: a supervisor, or a
/// standby.
#[derive(Debug)]
pub(super) struct Companion {
    limits: Limits,
    last: Instant,
    process: Option<Identity>,
    stopped_since: Option<Instant>,
    silent_since: Option<Instant>,
}

impl Companion {
    pub(super) fn new(limits: Limits) -> Companion {
        Companion {
            limits,
            last: Instant::now(),
            process: None,
            stopped_since: None,
            silent_since: None,
        }
    }

    /// Looks at the process that `pulse` is about; says who it is, and that it hangs. One that waits
    /// for the host's disk does not.
    pub(super) fn look(&mut self, pulse: &Pulse) -> Option<(Identity, Hang)> {
        use std::sync::atomic::Ordering;
        let now = Instant::now();
        let pid = pulse.pid.load(Ordering::Acquire) as i32;
        let start = pulse.start.load(Ordering::Acquire);
        let process = (pid != 0).then_some(Identity { pid, start });
        let gap = now.saturating_duration_since(self.last) > GAP;
        self.last = now;
        if gap || process != self.process {
            self.process = process;
            self.stopped_since = None;
            self.silent_since = None;
        }
        let process = process?;
        if !is_silent(pulse, SILENT) {
            self.stopped_since = None;
            self.silent_since = None;
            return None;
        }
        let lasts = |since: &mut Option<Instant>, so: bool| {
            *since = so.then(|| since.unwrap_or(now));
            since.map(|at| now.saturating_duration_since(at))
        };
        let stopped = lasts(&mut self.stopped_since, process.is_stopped());
        if stopped.is_some_and(|time| time >= self.limits.stopped) {
            return Some((process, Hang::Stopped));
        }
        // Of a program that is not ours we do not know how it says that it runs.
        let counts = stopped.is_none() && !process.is_in_the_kernel() && process.runs_our_program();
        let silent = lasts(&mut self.silent_since, counts && process.is_alive());
        (silent? >= self.limits.silent).then_some((process, Hang::Still))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STILL: Duration = Duration::from_secs(30);

    /// A worker, looked at once a second.
    struct Watched {
        watch: Watch,
        now: Instant,
    }

    impl Watched {
        fn new() -> Watched {
            let now = Instant::now();
            Watched {
                watch: Watch::new(Limits::new(STILL), now),
                now,
            }
        }

        /// The second at which it is found to hang, of at most `seconds`.
        fn sees(&mut self, seconds: u64, look: impl Fn(u64) -> Look) -> Option<(u64, Hang)> {
            (1..=seconds).find_map(|second| {
                self.now += PERIOD;
                let hang = self.watch.judge(&look(second), self.now)?;
                Some((second, hang))
            })
        }
    }

    fn threads(cpu_ms: u64) -> Option<Threads> {
        Some(Threads {
            cpu: Duration::from_millis(cpu_ms),
            ..Threads::default()
        })
    }

    /// A worker that has requests and of which nothing is seen to move.
    fn stuck() -> Look {
        Look {
            serves: true,
            pending: true,
            threads: threads(100),
            ..Look::default()
        }
    }

    #[test]
    fn a_stopped_worker_is_found_within_seconds_whether_or_not_requests_wait() {
        for pending in [false, true] {
            let look = |_| Look {
                stopped: true,
                pending,
                ..stuck()
            };
            let found = Watched::new().sees(60, look);
            assert_eq!(found, Some((3, Hang::Stopped)));
        }
    }

    #[test]
    fn a_worker_whose_threads_wait_for_each_other_is_found_after_the_limit() {
        let found = Watched::new().sees(100, |_| stuck());
        assert_eq!(found, Some((31, Hang::Still)));
        // Also before it serves, whoever waits.
        let opening = |_| Look {
            serves: false,
            pending: false,
            ..stuck()
        };
        assert_eq!(Watched::new().sees(100, opening), Some((31, Hang::Still)));
        // Threads that look around now and then are as still.
        let awake = |second| Look {
            threads: threads(second * 10),
            ..stuck()
        };
        assert_eq!(Watched::new().sees(100, awake), Some((31, Hang::Still)));
    }

    #[test]
    fn neither_an_idle_worker_nor_one_that_answers_hangs() {
        let idle = |_| Look {
            pending: false,
            ..stuck()
        };
        assert_eq!(Watched::new().sees(3600, idle), None);
        let slow = |second| Look {
            served: second / 20,
            ..stuck()
        };
        assert_eq!(Watched::new().sees(3600, slow), None);
    }

    #[test]
    fn a_worker_that_waits_for_the_host_does_not_hang_however_long_that_takes() {
        let look = |second| Look {
            wait: Some(Duration::from_secs(second)),
            oldest: Duration::from_secs(second),
            ..stuck()
        };
        assert_eq!(Watched::new().sees(3600, look), None);
    }

    #[test]
    fn a_worker_that_gets_no_processor_does_not_hang() {
        let look = |_| Look {
            threads: Some(Threads {
                runnable: true,
                ..Threads::default()
            }),
            ..stuck()
        };
        assert_eq!(Watched::new().sees(250, look), None);
    }

    #[test]
    fn a_worker_that_computes_without_end_is_found_by_the_time_it_used() {
        let look = |share: u64| {
            move |second| Look {
                threads: Some(Threads {
                    runnable: true,
                    ..threads(second * share).unwrap_or_default()
                }),
                ..stuck()
            }
        };
        let found = Watched::new().sees(100, look(1000));
        assert_eq!(found, Some((31, Hang::Busy)));
        // On a host that is busy it takes longer.
        let found = Watched::new().sees(200, look(250));
        assert_eq!(found, Some((121, Hang::Busy)));
    }

    /// Too many files are open in one second: what it had used before its requests waited is no part of
    /// what it uses on them.
    #[test]
    fn a_worker_that_could_not_be_looked_at_for_a_moment_is_not_taken_for_a_busy_one() {
        let found = Watched::new().sees(60, |second| Look {
            threads: match second {
                1 | 7 => None,
                _ => Some(Threads {
                    runnable: true,
                    ..threads(1_000_000 + second * 100).unwrap()
                }),
            },
            ..stuck()
        });
        assert_eq!(found, None);
    }

    #[test]
    fn one_request_that_is_forgotten_among_others_is_found_unless_the_disk_hangs() {
        let look = |wait: fn(u64) -> Duration| {
            move |second| Look {
                served: second * 1000,
                oldest: Duration::from_secs(second),
                wait: Some(wait(second)),
                ..stuck()
            }
        };
        let found = Watched::new().sees(400, look(|_| Duration::from_millis(20)));
        assert_eq!(found, Some((300, Hang::One)));
        // A disk that takes a minute for a sync.
        let found = Watched::new().sees(3600, look(|second| Duration::from_secs(second % 60)));
        assert_eq!(found, None);
    }

    #[test]
    fn a_watcher_that_did_not_look_for_a_while_begins_anew() {
        let mut watched = Watched::new();
        for _ in 0..10 {
            assert_eq!(watched.sees(25, |_| stuck()), None);
            watched.now += GAP * 2;
        }
    }

    #[test]
    fn a_stopped_companion_is_found_and_one_that_says_that_it_runs_is_not() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let identity = Identity::of(child.id() as i32).unwrap().unwrap();
        let shared = Shared::create().unwrap();
        let pulse = &shared.table().supervisor;
        pulse.belongs_to(identity.pid, identity.start);
        let limits = Limits {
            stopped: Duration::ZERO,
            ..Limits::new(STILL)
        };
        let mut companion = Companion::new(limits);
        assert_eq!(companion.look(pulse), None, "it is silent, but not stopped");
        let process = identity.open().unwrap().unwrap();
        process.signal(nix::sys::signal::Signal::SIGSTOP);
        while !identity.is_stopped() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(companion.look(pulse), Some((identity, Hang::Stopped)));
        pulse.beat(monotonic_ns());
        assert_eq!(companion.look(pulse), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
