//! What a hot pack is about to bring, so that whoever wants it waits for that instead of fetching it once more.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use uuid::Uuid;

/// How long it is waited for a pack that stands still, and for a window of one.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// How many bytes may come before what is waited for: what lies further on is fetched by itself meanwhile.
const NEAR: u64 = 2 << 20;

/// A pack that comes.
#[derive(Debug)]
pub(super) struct Coming {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// When something of it came last; `None` while it is not known whether anything will.
    last: Option<Instant>,
    /// How many of its bytes have come.
    at: u64,
    /// Where the windows of layers lie in it; `None` until its list has come.
    places: Option<HashMap<(Uuid, u32), u64>>,
}

impl Coming {
    /// One that is asked for now, and of which nothing is known.
    pub fn announced() -> Self {
        Coming {
            state: Mutex::new(State {
                last: Some(Instant::now()),
                at: 0,
                places: None,
            }),
        }
    }

    /// Its list has come.
    pub fn holds(&self, places: HashMap<(Uuid, u32), u64>) {
        self.state.lock().places = Some(places);
    }

    /// So many of its bytes have come.
    pub fn has_come(&self, at: u64) {
        let mut state = self.state.lock();
        state.at = at;
        state.last = Some(Instant::now());
    }

    /// An attempt failed: nobody waits for it until more has come.
    pub fn failed(&self) {
        self.state.lock().last = None;
    }

    /// Whether the window of a layer will be here soon.
    pub fn brings_soon(&self, layer: Uuid, window: u32) -> bool {
        let state = self.state.lock();
        if state.last.is_none_or(|last| last.elapsed() >= PATIENCE) {
            return false;
        }
        let Some(places) = &state.places else {
            return true;
        };
        let place = places.get(&(layer, window));
        place.is_some_and(|place| (state.at..state.at + NEAR).contains(place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_near_is_waited_for_and_nothing_else() {
        let (ours, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let coming = Coming::announced();
        assert!(coming.brings_soon(ours, 9), "nothing is known of it yet");
        coming.holds(HashMap::from([
            ((ours, 1), 100),
            ((ours, 2), 5000),
            ((ours, 3), NEAR + 5000),
        ]));
        assert!(coming.brings_soon(ours, 1));
        assert!(!coming.brings_soon(ours, 3), "it is far away");
        assert!(!coming.brings_soon(ours, 9), "it is not in it");
        assert!(!coming.brings_soon(other, 1), "it is of another layer");
        coming.has_come(5000);
        assert!(!coming.brings_soon(ours, 1), "it came and went");
        assert!(coming.brings_soon(ours, 2));
        coming.failed();
        assert!(!coming.brings_soon(ours, 2), "it broke off");
        coming.has_come(5001);
        assert!(coming.brings_soon(ours, 3));
    }
}
