//! Words and work between the threads that serve one device.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Condvar, Mutex};

use crate::shortage::Shortage;
use vellum_base::error::{Result, ResultExt};

/// Where a thread that waits in the kernel is told things.
#[derive(Debug)]
pub(crate) struct Inbox<W> {
    words: Mutex<Vec<W>>,
    any: AtomicBool,
    /// Its thread waits in the kernel, or is about to.
    asleep: AtomicBool,
    wake: EventFd,
}

impl<W> Inbox<W> {
    pub(crate) fn new() -> Result<Inbox<W>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Inbox {
            words: Mutex::new(Vec::new()),
            any: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake: EventFd::from_flags(flags).context(|| "an eventfd cannot be made")?,
        })
    }

    /// What its thread is woken by.
    pub(crate) fn wake_fd(&self) -> i32 {
        self.wake.as_fd().as_raw_fd()
    }

    pub(crate) fn tell(&self, words: impl IntoIterator<Item = W>) {
        self.words.lock().extend(words);
        self.any.store(true, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Ends its thread's wait.
    pub(crate) fn wake(&self) {
        // It can only fail where it has been written 2^64 times.
        let _ = self.wake.write(1);
    }

    /// Takes what was said.
    pub(crate) fn take(&self) -> Vec<W> {
        if !self.any.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut words = self.words.lock();
        self.any.store(false, Ordering::Release);
        std::mem::take(&mut words)
    }

    pub(crate) fn has_any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Says that the thread will wait; false where it has been told something.
    pub(crate) fn lie_down(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        if self.any.load(Ordering::SeqCst) {
            self.get_up();
            return false;
        }
        true
    }

    pub(crate) fn get_up(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    pub(crate) fn is_asleep(&self) -> bool {
        self.asleep.load(Ordering::SeqCst)
    }
}

/// Work that any of several threads may take.
#[derive(Debug)]
pub(crate) struct Jobs<J> {
    queue: Mutex<Queue<J>>,
    comes: Condvar,
    stop: AtomicBool,
    shortage: Shortage,
}

#[derive(Debug)]
struct Queue<J> {
    waiting: VecDeque<J>,
    /// Threads that wait for work.
    idle: usize,
}

impl<J> Jobs<J> {
    /// `shortage` is told when there is work for all threads that wait for some.
    pub(crate) fn new(shortage: Shortage) -> Jobs<J> {
        Jobs {
            queue: Mutex::new(Queue {
                waiting: VecDeque::new(),
                idle: 0,
            }),
            comes: Condvar::new(),
            stop: AtomicBool::new(false),
            shortage,
        }
    }

    pub(crate) fn put(&self, job: J) {
        let mut queue = self.queue.lock();
        queue.waiting.push_back(job);
        let short = queue.waiting.len() >= queue.idle;
        drop(queue);
        self.comes.notify_one();
        if short {
            self.shortage.tell();
        }
    }

    /// Waits for the next; `None` when the threads are to end.
    pub(crate) fn next(&self) -> Option<J> {
        let mut queue = self.queue.lock();
        loop {
            if self.is_stopped() {
                return None;
            }
            if let Some(job) = queue.waiting.pop_front() {
                return Some(job);
            }
            queue.idle += 1;
            self.comes.wait(&mut queue);
            queue.idle -= 1;
        }
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Ends the threads that take work; what nobody took stays undone.
    pub(crate) fn stop(&self) {
        let queue = self.queue.lock();
        self.stop.store(true, Ordering::Release);
        drop(queue);
        self.comes.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_thread_that_was_told_something_does_not_lie_down() {
        let inbox = Inbox::new().unwrap();
        assert!(inbox.lie_down());
        inbox.tell([1, 2]);
        inbox.get_up();
        assert!(!inbox.lie_down() && !inbox.is_asleep());
        assert_eq!(inbox.take(), [1, 2]);
        assert!(inbox.take().is_empty() && inbox.lie_down());
    }

    #[test]
    fn stopping_ends_those_that_wait_for_work_and_leaves_what_is_there() {
        let jobs = Arc::new(Jobs::new(Shortage::new().unwrap()));
        let waits = Arc::clone(&jobs);
        let thread = std::thread::spawn(move || waits.next());
        jobs.put(1);
        assert_eq!(thread.join().unwrap(), Some(1));
        let waits = Arc::clone(&jobs);
        let thread = std::thread::spawn(move || waits.next());
        jobs.stop();
        assert_eq!(thread.join().unwrap(), None);
        jobs.put(2);
        assert_eq!(jobs.next(), None);
    }

    #[test]
    fn work_for_the_last_thread_that_waits_is_told_of() {
        let shortage = Shortage::new().unwrap();
        let jobs = Arc::new(Jobs::new(shortage.clone()));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let jobs = Arc::clone(&jobs);
                std::thread::spawn(move || jobs.next())
            })
            .collect();
        while jobs.queue.lock().idle < 2 {
            std::thread::yield_now();
        }
        jobs.put(1);
        assert!(!shortage.take());
        jobs.put(2);
        assert!(shortage.take());
        for thread in threads {
            assert!(thread.join().unwrap().is_some());
        }
        jobs.put(3);
        assert!(shortage.take());
    }
}
