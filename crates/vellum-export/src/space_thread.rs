//! A thread beside a device's server that looks after its space on the host, also while no request
//! comes. Apart from the server's loop, since it may wait for the host.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use vellum_base::block::BlockDevice;

const EVERY: Duration = Duration::from_secs(5);

/// The thread; it ends, and is waited for, when this is dropped. To be dropped before the device is closed:
/// what is given back later might be another process's.
#[derive(Debug)]
pub struct SpaceThread(Option<(Sender<()>, JoinHandle<()>)>);

impl SpaceThread {
    /// Calls [`BlockDevice::look_after_space`] every five seconds, of a device that can be written. Where the
    /// host refuses a thread, nobody does.
    pub fn start(device: Arc<dyn BlockDevice>) -> Self {
        if device.is_read_only() {
            return SpaceThread(None);
        }
        SpaceThread::start_every(EVERY, move || device.look_after_space())
    }

    fn start_every(time: Duration, look: impl Fn() + Send + 'static) -> Self {
        let (end, ended) = channel();
        let thread = std::thread::Builder::new().name("space".into());
        let thread = thread.spawn(move || {
            while ended.recv_timeout(time) == Err(RecvTimeoutError::Timeout) {
                look();
            }
        });
        let thread = thread.inspect_err(|error| {
            tracing::warn!(%error, "space taken ahead goes back only when requests come");
        });
        SpaceThread(thread.ok().map(|thread| (end, thread)))
    }
}

impl Drop for SpaceThread {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.0.take() {
            drop(end);
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Instant;

    #[test]
    fn space_is_looked_after_without_a_request_until_the_server_ends() {
        let calls = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&calls);
        let count = move || {
            counted.fetch_add(1, Ordering::Relaxed);
        };
        let thread = SpaceThread::start_every(Duration::from_millis(1), count);
        let deadline = Instant::now() + Duration::from_secs(20);
        while calls.load(Ordering::Relaxed) < 3 {
            assert!(Instant::now() < deadline, "nobody looked");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(thread);
        // Nobody is left to call it.
        assert_eq!(Arc::strong_count(&calls), 1);
    }
}
