//! The fetcher's threads that work although nobody waits for them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use super::Fetcher;

/// Hot packs that come at a time.
const PACKS: usize = 2;
/// Requests ahead of who reads that are on their way at a time.
const AHEAD: usize = 3;

/// A thread, which ends when this is dropped.
pub(super) struct Worker {
    fetcher: Arc<Fetcher>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts all of them.
    ///
    /// # Errors
    /// Where one cannot be started.
    pub fn start_all(fetcher: &Arc<Fetcher>) -> std::io::Result<Vec<Self>> {
        let mut workers = vec![Worker::start(fetcher, "background", |fetcher| {
            fetcher.background.work(fetcher);
        })?];
        for _ in 0..PACKS {
            workers.push(Worker::start(fetcher, "hot pack", |fetcher| {
                fetcher.hot.work(fetcher);
            })?);
        }
        for _ in 0..AHEAD {
            workers.push(Worker::start(fetcher, "ahead", |fetcher| {
                fetcher.ahead.work(fetcher);
            })?);
        }
        Ok(workers)
    }

    fn start(fetcher: &Arc<Fetcher>, name: &str, work: fn(&Fetcher)) -> std::io::Result<Self> {
        let own = Arc::clone(fetcher);
        let builder = std::thread::Builder::new().name(name.to_owned());
        Ok(Worker {
            fetcher: Arc::clone(fetcher),
            thread: Some(builder.spawn(move || work(&own))?),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.fetcher.stopped.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread of the fetcher panicked");
        }
    }
}
