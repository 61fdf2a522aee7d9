//! Memory for requests: one budget for all connections of a server.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::exec::Buffer;

/// What a connection without a request in flight is always granted, in bytes: so nobody is kept
/// waiting by what others hold.
pub(super) const OWN: usize = 2 << 20;
/// Memory that is kept for the next requests, in bytes, over all connections.
const KEPT: usize = 64 << 20;

/// The memory that all connections of a server share.
#[derive(Debug)]
pub(super) struct Memory {
    limit: usize,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes that requests in flight count for, but for what connections have of their own.
    used: usize,
    /// Buffers that nobody uses.
    kept: Vec<Buffer>,
    kept_bytes: usize,
}

impl Memory {
    /// Memory for `limit` bytes of requests beyond [`OWN`] for each connection.
    pub(super) fn new(limit: usize) -> Self {
        Memory {
            limit,
            state: Mutex::default(),
            freed: Condvar::new(),
        }
    }

    /// A buffer that is likely to hold `len` bytes already.
    pub(super) fn buffer(&self, len: usize) -> Buffer {
        let mut state = self.state.lock();
        let fits = state.kept.iter().rposition(|kept| kept.capacity() >= len);
        match fits {
            Some(index) => {
                let buffer = state.kept.swap_remove(index);
                state.kept_bytes -= buffer.capacity();
                buffer
            }
            None => Buffer::default(),
        }
    }

    /// Takes a buffer back.
    pub(super) fn keep(&self, buffer: Buffer) {
        let mut buffer = buffer;
        buffer.truncate(0);
        let mut state = self.state.lock();
        let room = KEPT.min(self.limit.saturating_sub(state.used));
        if buffer.capacity() > 0 && state.kept_bytes + buffer.capacity() <= room {
            state.kept_bytes += buffer.capacity();
            state.kept.push(buffer);
        }
    }

    /// Gives what nobody uses back to the system.
    pub(super) fn forget(&self) {
        let mut state = self.state.lock();
        state.kept.clear();
        state.kept_bytes = 0;
    }
}

impl State {
    /// Makes room for `cost` bytes of a request where `limit` allows it. A single request is let
    /// through whatever it costs.
    fn grant(&mut self, cost: usize, limit: usize) -> bool {
        if self.used != 0 && self.used.saturating_add(cost) > limit {
            return false;
        }
        self.used += cost;
        while self.used.saturating_add(self.kept_bytes) > limit {
            let Some(buffer) = self.kept.pop() else {
                break;
            };
            self.kept_bytes -= buffer.capacity();
        }
        true
    }
}

/// What one connection may have in flight.
#[derive(Debug)]
pub(super) struct Budget {
    memory: Arc<Memory>,
    /// Bytes in flight, unless there is but one request.
    limit: usize,
    /// Changed under the lock of `memory` alone.
    used: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    bytes: usize,
    requests: usize,
}

/// Who pays for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Payer {
    /// The connection has so much of its own.
    Own,
    /// All connections together.
    Shared,
}

impl Budget {
    /// The budget of a connection that has `limit` bytes in flight at most, or one request.
    pub(super) fn new(memory: Arc<Memory>, limit: usize) -> Self {
        Budget {
            memory,
            limit,
            used: Mutex::default(),
        }
    }

    /// The memory of the server.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// True while the connection has nothing in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.used.lock().requests == 0
    }

    /// Takes `cost` bytes where they are free.
    pub(super) fn try_take(&self, cost: usize) -> Option<Share<'_>> {
        self.attempt(&mut self.memory.state.lock(), cost)
    }

    /// Waits until `cost` bytes are free, and takes them.
    pub(super) fn take(&self, cost: usize) -> Share<'_> {
        let mut state = self.memory.state.lock();
        loop {
            if let Some(share) = self.attempt(&mut state, cost) {
                return share;
            }
            self.memory.freed.wait(&mut state);
        }
    }

    fn attempt(&self, state: &mut State, cost: usize) -> Option<Share<'_>> {
        let mut used = self.used.lock();
        let alone = used.requests == 0;
        if !alone && used.bytes.saturating_add(cost) > self.limit {
            return None;
        }
        let payer = if alone && cost <= OWN {
            Payer::Own
        } else if state.grant(cost, self.memory.limit) {
            Payer::Shared
        } else {
            return None;
        };
        used.bytes += cost;
        used.requests += 1;
        Some(Share {
            budget: self,
            cost,
            payer,
        })
    }
}

/// A part of the budget, given back when dropped.
#[derive(Debug)]
pub(super) struct Share<'c> {
    budget: &'c Budget,
    cost: usize,
    payer: Payer,
}

impl Share<'_> {
    /// How many bytes it is.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        let memory = &self.budget.memory;
        let mut state = memory.state.lock();
        if self.payer == Payer::Shared {
            state.used -= self.cost;
        }
        {
            let mut used = self.budget.used.lock();
            used.bytes -= self.cost;
            used.requests -= 1;
        }
        drop(state);
        // Those who wait may do so for different things: each looks for itself.
        memory.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budgets(limit: usize) -> (Arc<Memory>, Budget, Budget) {
        let memory = Arc::new(Memory::new(limit));
        let budget = || Budget::new(Arc::clone(&memory), 16 << 20);
        let (a, b) = (budget(), budget());
        (memory, a, b)
    }

    #[test]
    fn a_connection_that_holds_all_memory_keeps_no_other_from_one_request() {
        let (_memory, greedy, other) = budgets(4 << 20);
        let held: Vec<_> = std::iter::from_fn(|| greedy.try_take(1 << 20))
            .take(100)
            .collect();
        // One of its own, and four of the shared ones.
        assert_eq!(held.len(), 5);
        let one = other.try_take(OWN);
        assert!(one.is_some());
        assert!(other.try_take(1).is_none());
        drop(held);
        assert!(other.try_take(1).is_some());
    }

    #[test]
    fn a_request_larger_than_the_whole_memory_is_served_when_nothing_else_is() {
        let (_memory, first, second) = budgets(1 << 20);
        let large = first.try_take(32 << 20);
        assert!(large.is_some());
        assert!(second.try_take(32 << 20).is_none());
        drop(large);
        assert!(second.try_take(32 << 20).is_some());
    }

    #[test]
    fn kept_buffers_make_way_for_requests() {
        let (memory, budget, _other) = budgets(3 << 20);
        for _ in 0..8 {
            let mut buffer = Buffer::default();
            buffer.extend(1 << 20);
            memory.keep(buffer);
        }
        assert_eq!(memory.state.lock().kept_bytes, 3 << 20);
        let shares: Vec<_> = std::iter::from_fn(|| budget.try_take(1 << 20))
            .take(3)
            .collect();
        let state = memory.state.lock();
        assert_eq!((state.used, state.kept_bytes), (2 << 20, 1 << 20));
        drop(state);
        drop(shares);
    }
}
