//! Which of a session's threads read the next request: few at a time, since more of them than
//! processors only get in each other's way, but always one, however many wait for the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;

use parking_lot::Mutex;

use crate::shortage::Shortage;

/// The threads of one session that read requests, and those that are spare.
#[derive(Debug)]
pub struct Readers {
    /// How many read at once.
    limit: usize,
    state: Mutex<State>,
    shortage: Shortage,
}

#[derive(Debug, Default)]
struct State {
    /// Threads in read(2), or on their way there.
    reading: usize,
    /// The last to come is the first to go: its buffer is in the caches.
    spare: Vec<Arc<Spare>>,
    closed: bool,
}

#[derive(Debug)]
struct Spare {
    thread: Thread,
    called: AtomicBool,
}

impl Readers {
    /// At most `limit` threads, at least one, read at once. `shortage` is told when none is spare any more.
    pub fn new(limit: usize, shortage: Shortage) -> Arc<Readers> {
        Arc::new(Readers {
            limit: limit.max(1),
            state: Mutex::default(),
            shortage,
        })
    }

    /// Waits until this thread is wanted as a reader. It is one until the answer is dropped: when it
    /// has a request, or will not read any more.
    pub fn begin(&self) -> Reading<'_> {
        let spare = {
            let mut state = self.state.lock();
            if state.closed || state.reading < self.limit {
                state.reading += 1;
                return Reading(self);
            }
            let spare = Arc::new(Spare {
                thread: std::thread::current(),
                called: AtomicBool::new(false),
            });
            state.spare.push(Arc::clone(&spare));
            spare
        };
        while !spare.called.load(Ordering::Acquire) {
            std::thread::park();
        }
        Reading(self)
    }

    /// This thread has a request and will wait for the disk: a spare one reads in its place where
    /// nobody does.
    pub fn relieve(&self) {
        let mut state = self.state.lock();
        if state.reading == 0 {
            call(&mut state);
            if state.spare.is_empty() {
                self.shortage.tell();
            }
        }
    }

    /// Lets all threads through, now and from now on.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        while call(&mut state) {}
    }
}

/// A thread that reads.
#[derive(Debug)]
pub struct Reading<'a>(&'a Readers);

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.0.state.lock().reading -= 1;
    }
}

/// Makes a spare thread a reader; false where there is none.
fn call(state: &mut State) -> bool {
    let Some(spare) = state.spare.pop() else {
        return false;
    };
    state.reading += 1;
    spare.called.store(true, Ordering::Release);
    spare.thread.unpark();
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Starts a thread that says when it reads, and does so until the answer is dropped.
    fn reader(readers: &Arc<Readers>, tell: &mpsc::Sender<usize>, name: usize) -> mpsc::Sender<()> {
        let (readers, tell) = (Arc::clone(readers), tell.clone());
        let (end, ended) = mpsc::channel();
        std::thread::spawn(move || {
            let _reading = readers.begin();
            tell.send(name).unwrap();
            let _: Result<(), _> = ended.recv();
        });
        end
    }

    fn reading_becomes(readers: &Readers, number: usize) {
        while readers.state.lock().reading != number {
            std::thread::yield_now();
        }
    }

    #[test]
    fn no_more_than_the_limit_read_until_one_waits_while_nobody_reads() {
        let readers = Readers::new(2, Shortage::new().unwrap());
        let (tell, told) = mpsc::channel();
        let mut ends = Vec::new();
        for name in 0..2 {
            ends.push(reader(&readers, &tell, name));
            assert_eq!(told.recv().unwrap(), name);
        }
        let _third = reader(&readers, &tell, 2);
        while readers.state.lock().spare.is_empty() {
            std::thread::yield_now();
        }
        // One has a request and waits, the other still reads.
        ends.pop();
        reading_becomes(&readers, 1);
        readers.relieve();
        assert!(told.recv_timeout(Duration::from_millis(20)).is_err());
        // The other one waits too.
        ends.pop();
        reading_becomes(&readers, 0);
        readers.relieve();
        assert_eq!(told.recv().unwrap(), 2);
        assert_eq!(readers.state.lock().reading, 1);
    }

    #[test]
    fn who_takes_the_last_spare_thread_or_finds_none_tells_of_it() {
        let shortage = Shortage::new().unwrap();
        let readers = Readers::new(1, shortage.clone());
        let (tell, told) = mpsc::channel();
        let mut ends: Vec<_> = (0..3).map(|name| reader(&readers, &tell, name)).collect();
        while readers.state.lock().spare.len() < 2 {
            std::thread::yield_now();
        }
        let mut short = Vec::new();
        for _ in 0..3 {
            let name = told.recv().unwrap();
            ends[name] = mpsc::channel().0;
            reading_becomes(&readers, 0);
            readers.relieve();
            short.push(shortage.take());
        }
        assert_eq!(short, [false, true, true]);
    }

    #[test]
    fn closing_lets_the_spare_threads_and_all_later_ones_through() {
        let readers = Readers::new(1, Shortage::new().unwrap());
        let (tell, told) = mpsc::channel();
        let mut ends: Vec<_> = (0..3).map(|name| reader(&readers, &tell, name)).collect();
        while readers.state.lock().spare.len() < 2 {
            std::thread::yield_now();
        }
        readers.close();
        ends.push(reader(&readers, &tell, 3));
        let mut through: Vec<usize> = (0..4).map(|_| told.recv().unwrap()).collect();
        through.sort_unstable();
        assert_eq!(through, [0, 1, 2, 3]);
    }
}
