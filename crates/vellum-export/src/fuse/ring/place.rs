//! On which processors a thread with a ring runs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::memory::MAX_QUEUES;

/// How long a look at the host's load counts.
const LOOK: Duration = Duration::from_millis(20);
/// So many looks count.
const LOOKS: usize = 8;
/// Tasks that want to run, for each processor, beyond which a thread is better off anywhere; measured: a busy
/// client and its device keep 1 to 2 of each of two processors, eight keep 5.
const CROWDED: usize = 3;
/// And below which it belongs to its own again, in quarters.
const CALM_QUARTERS: usize = 9;

/// Keeps the calling thread on the processors of its queues, where requests and answers find it with the least
/// delay; and lets it go where more wants to run than the processors can: a thread that is bound then waits
/// for its own while another is free.
#[derive(Debug)]
pub(super) struct Place {
    own: Vec<usize>,
    bound: bool,
    processors: usize,
    /// /proc/loadavg, which has the number of tasks that want to run; `None` where it cannot be read.
    load: Option<File>,
    looked: Instant,
    /// What was seen, the oldest of it at `next`.
    seen: [usize; LOOKS],
    next: usize,
}

impl Place {
    /// For the calling thread, which is bound to these of the host's `processors`.
    pub(super) fn new(own: impl IntoIterator<Item = usize>, processors: usize) -> Place {
        let place = Place {
            own: own.into_iter().collect(),
            bound: true,
            processors,
            load: File::open("/proc/loadavg").ok(),
            looked: Instant::now(),
            seen: [0; LOOKS],
            next: 0,
        };
        place.take();
        place
    }

    /// Binds the thread to one processor for what `work` does.
    pub(super) fn at(&self, processor: usize, work: impl FnOnce()) {
        pin([processor]);
        work();
        self.take();
    }

    /// To be called between requests: looks at the host's load from time to time.
    pub(super) fn look(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.looked) < LOOK {
            return;
        }
        self.looked = now;
        if let Some(running) = self.load.as_ref().and_then(running)
            && self.saw(running)
        {
            self.take();
        }
    }

    /// Takes note of how many tasks want to run; true where the thread's place is another one now.
    fn saw(&mut self, running: usize) -> bool {
        if let Some(seen) = self.seen.get_mut(self.next) {
            *seen = running;
        }
        self.next = (self.next + 1) % LOOKS;
        let all: usize = self.seen.iter().sum();
        let before = self.bound;
        let each = LOOKS * self.processors;
        if all > each * CROWDED {
            self.bound = false;
        } else if all * 4 < each * CALM_QUARTERS {
            self.bound = true;
        }
        self.bound != before
    }

    fn take(&self) {
        match self.bound {
            true => pin(self.own.iter().copied()),
            false => pin(0..MAX_QUEUES),
        }
    }
}

/// Tasks of the host that run or want to: proc_loadavg(5), the fourth field's first number.
fn running(load: &File) -> Option<usize> {
    let mut bytes = [0; 128];
    let len = load.read_at(&mut bytes, 0).ok()?;
    let text = std::str::from_utf8(bytes.get(..len)?).ok()?;
    let (running, _) = text.split_whitespace().nth(3)?.split_once('/')?;
    running.parse().ok()
}

/// Keeps the calling thread on these processors. Best effort: it is for speed, and a control group may not
/// have them.
fn pin(processors: impl IntoIterator<Item = usize>) {
    let mut set = CpuSet::new();
    for processor in processors {
        let _ = set.set(processor);
    }
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_let_go_where_much_wants_to_run_and_bound_again_afterwards() {
        let mut place = Place::new([0], 2);
        let steps = |place: &mut Place, running| (0..LOOKS).filter(|_| place.saw(running)).count();
        assert_eq!(steps(&mut place, 4), 0);
        assert!(place.bound, "as of one busy client");
        assert_eq!(steps(&mut place, 10), 1);
        assert!(!place.bound);
        assert_eq!(steps(&mut place, 5), 0);
        assert!(!place.bound, "no going to and fro between the two bounds");
        assert_eq!(steps(&mut place, 3), 1);
        assert!(place.bound);
    }

    #[test]
    fn the_kernel_says_how_much_wants_to_run() {
        let load = File::open("/proc/loadavg").unwrap();
        // This thread does.
        assert!(running(&load).unwrap() >= 1);
    }
}
