//! How much is asked of registries at a time.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use vellum_registry::{Keychain, Seen};

/// Requests to registries that are on their way at once.
const AT_ONCE: usize = 16;

/// How many requests are on their way, of all layers, and what those before have shown of registries.
#[derive(Debug, Default)]
pub(super) struct Limit {
    pub seen: Arc<Seen>,
    taken: Mutex<usize>,
    free: Condvar,
}

impl Limit {
    /// Of one who asks a keychain for credentials.
    pub fn knowing(keychain: Arc<dyn Keychain>) -> Self {
        Limit {
            seen: Arc::new(Seen::knowing(keychain)),
            ..Limit::default()
        }
    }

    pub fn take(&self) -> Taken<'_> {
        let mut taken = self.taken.lock();
        while *taken >= AT_ONCE {
            self.free.wait(&mut taken);
        }
        *taken += 1;
        Taken(self)
    }
}

pub(super) struct Taken<'a>(&'a Limit);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock() -= 1;
        self.0.free.notify_one();
    }
}
