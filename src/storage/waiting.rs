//! Tells whoever carries out a request that it is about to wait for the host's disk, so that another
//! thread can take the next request meanwhile.

use std::cell::RefCell;

thread_local! {
    static LISTENER: RefCell<Option<Box<dyn Fn()>>> = const { RefCell::new(None) };
}

/// Has `listener` called on this thread, from now until the thread ends, before each call that may
/// wait for the disk. It must not use the storage itself.
pub fn listen(listener: impl Fn() + 'static) {
    LISTENER.with(|slot| *slot.borrow_mut() = Some(Box::new(listener)));
}

/// To be called before waiting for the disk, or for somebody who waits for it.
pub(crate) fn about_to_wait() {
    LISTENER.with(|slot| {
        if let Some(listener) = &*slot.borrow() {
            listener();
        }
    });
}
