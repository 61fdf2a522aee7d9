//! What the store does while its disk is nearly full: warn, refuse what is new, stop writers. It is
//! the store's, in `ROOT/space.json`, so that all who serve something of it do the same.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Store;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::size::{human_size, parse_size};
use vellum_base::storage::DiskSpace;

const FILE: &str = "space.json";

/// An amount of free space: bytes, a part of the disk, or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Threshold {
    /// None.
    #[default]
    Off,
    /// Bytes.
    Bytes(u64),
    /// Hundredths of a percent of the disk's size, from 1 to 9,999.
    Share(u16),
}

impl Threshold {
    /// In bytes, of a disk of `size` bytes; 0 for none.
    pub fn of_disk(self, size: u64) -> u64 {
        match self {
            Threshold::Off => 0,
            Threshold::Bytes(bytes) => bytes,
            // In this order a disk of any size fits.
            Threshold::Share(parts) => size / 10_000 * u64::from(parts),
        }
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Threshold::Off => f.write_str("off"),
            Threshold::Bytes(bytes) => {
                let units = [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')];
                let whole = |(shift, _): &(u32, char)| bytes % (1u64 << shift) == 0;
                match units.into_iter().find(whole) {
                    Some((shift, unit)) => write!(f, "{}{unit}", bytes >> shift),
                    None => write!(f, "{bytes}"),
                }
            }
            Threshold::Share(parts) => {
                let (whole, rest) = (parts / 100, parts % 100);
                match rest {
                    0 => write!(f, "{whole}%"),
                    _ if rest % 10 == 0 => write!(f, "{whole}.{}%", rest / 10),
                    _ => write!(f, "{whole}.{rest:02}%"),
                }
            }
        }
    }
}

impl FromStr for Threshold {
    type Err = String;

    /// Reads `10%`, `0.5%`, `20G` and `off`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let text = text.trim();
        if text == "off" {
            return Ok(Threshold::Off);
        }
        let Some(percent) = text.strip_suffix('%') else {
            let said = |_| format!("{text:?} is no amount of space: write 10%, 20G or off");
            return parse_size(text).map(Threshold::Bytes).map_err(said);
        };
        let bad = || format!("{text:?} is no part of a disk: write one from 0.01% to 99.99%");
        let percent: f64 = percent.trim().parse().map_err(|_| bad())?;
        let parts = (percent * 100.0).round();
        if !(1.0..10_000.0).contains(&parts) {
            return Err(bad());
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "bounded just now"
        )]
        Ok(Threshold::Share(parts as u16))
    }
}

impl Serialize for Threshold {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Threshold {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What is done with how much of the disk left: what `df` calls available.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpacePolicy {
    /// Commands that make something warn, and so does the log.
    #[serde(default = "SpacePolicy::default_warn")]
    pub warn: Threshold,
    /// New containers, forks and images are refused.
    #[serde(default)]
    pub refuse: Threshold,
    /// Writers get ENOSPC.
    #[serde(default)]
    pub stop: Threshold,
}

impl Default for SpacePolicy {
    fn default() -> Self {
        SpacePolicy {
            warn: SpacePolicy::default_warn(),
            refuse: Threshold::Off,
            stop: Threshold::Off,
        }
    }
}

impl SpacePolicy {
    fn default_warn() -> Threshold {
        Threshold::Share(500)
    }
}

/// The disk under a store, and what the policy makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct StoreSpace {
    /// Its size in bytes.
    pub size: u64,
    /// What `df` calls available, in bytes.
    pub available: u64,
    /// The policy.
    pub policy: SpacePolicy,
    /// Its thresholds on this disk, in bytes; 0 for none.
    pub warn_bytes: u64,
    /// See `warn_bytes`.
    pub refuse_bytes: u64,
    /// See `warn_bytes`.
    pub stop_bytes: u64,
    /// What is done now.
    pub state: SpaceState,
}

/// What a store does with the space that is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SpaceState {
    /// There is enough.
    Ok,
    /// Warns.
    Warn,
    /// Refuses what is new.
    Refuse,
    /// Stops writers.
    Stop,
}

impl fmt::Display for SpaceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SpaceState::Ok => "ok",
            SpaceState::Warn => "warn",
            SpaceState::Refuse => "refuse",
            SpaceState::Stop => "stop",
        })
    }
}

impl StoreSpace {
    fn new(disk: DiskSpace, policy: SpacePolicy) -> Self {
        let [warn, refuse, stop] =
            [policy.warn, policy.refuse, policy.stop].map(|at| at.of_disk(disk.size));
        let state = match disk.available {
            left if left < stop => SpaceState::Stop,
            left if left < refuse => SpaceState::Refuse,
            left if left < warn => SpaceState::Warn,
            _ => SpaceState::Ok,
        };
        StoreSpace {
            size: disk.size,
            available: disk.available,
            policy,
            warn_bytes: warn,
            refuse_bytes: refuse,
            stop_bytes: stop,
            state,
        }
    }

    fn left(&self) -> String {
        let (left, size) = (human_size(self.available), human_size(self.size));
        format!("{left} of {size} are available")
    }
}

impl Store {
    /// The store's policy; the default where none was set.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for one that is damaged, with what to do.
    pub fn space_policy(&self) -> Result<SpacePolicy> {
        let read = self.read_json(&self.root.join(FILE));
        let read = read.map_err(|error| match error.kind() {
            ErrorKind::Corrupt => error.context(
                "the store's space policy (set it anew: `vellum space --warn FREE --refuse FREE --stop FREE`)",
            ),
            _ => error,
        });
        Ok(read?.unwrap_or_default())
    }

    /// Sets the policy for what is opened from now on.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] where it stops writers before it refuses what is new, or refuses
    /// before it warns, on the store's disk.
    pub fn set_space_policy(&self, policy: SpacePolicy) -> Result<()> {
        let size = self.disk_space()?.map_or(u64::MAX, |disk| disk.size);
        let stages = [
            ("warn", policy.warn),
            ("refuse", policy.refuse),
            ("stop", policy.stop),
        ];
        let mut stages = stages.iter().filter(|(_, at)| *at != Threshold::Off);
        let mut earlier = stages.next();
        for later in stages {
            if let Some((name, more)) = earlier
                && more.of_disk(size) < later.1.of_disk(size)
            {
                let (later, less) = later;
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "{later} = {less} comes before {name} = {more} on a disk of {}: warn must be \
                         the largest, stop the smallest",
                        human_size(size)
                    ),
                ));
            }
            earlier = Some(later);
        }
        let _guard = self.lock()?;
        self.write_json(&self.root.join(FILE), &policy)
    }

    fn disk_space(&self) -> Result<Option<DiskSpace>> {
        let root = &self.root;
        let space = self.storage.disk_space(root);
        space.context(|| format!("cannot ask for the space of {}", root.display()))
    }

    /// The disk under the store and what the policy makes of it; `None` where the host does not say.
    ///
    /// # Errors
    /// As [`Store::space_policy`]; where the host cannot be asked.
    pub fn space(&self) -> Result<Option<StoreSpace>> {
        let policy = self.space_policy()?;
        let disk = self.disk_space()?;
        Ok(disk.map(|disk| StoreSpace::new(disk, policy)))
    }

    /// To be asked before something new is made: refuses, or warns in the log, as the policy says.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] with what to do; as [`Store::space`].
    pub fn check_space_for(&self, what: &str) -> Result<()> {
        let Some(space) = self.space()? else {
            return Ok(());
        };
        let root = self.root.display();
        match space.state {
            SpaceState::Ok => Ok(()),
            SpaceState::Warn => {
                let (left, warn) = (space.left(), space.policy.warn);
                tracing::warn!(
                    "the disk of the store {root} is nearly full: {left}, it warns below {warn} \
                     (`vellum space`)"
                );
                Ok(())
            }
            SpaceState::Refuse | SpaceState::Stop => {
                let (left, state) = (space.left(), space.state);
                Err(Error::new(
                    ErrorKind::NoSpace,
                    format!(
                        "no {what} is made while the disk of the store {root} is nearly full: {left}, its \
                         policy is {} (state: {state}). Make room (`vellum ps -s`, `vellum rm`, `vellum \
                         prune`, `vellum trim`), or change it: `vellum space --refuse off`",
                        space.policy
                    ),
                ))
            }
        }
    }
}

impl fmt::Display for SpacePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SpacePolicy { warn, refuse, stop } = self;
        write!(f, "warn = {warn}, refuse = {refuse}, stop = {stop}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_written_as_they_are_read() {
        for text in [
            "off", "10%", "0.5%", "0.05%", "12.34%", "20G", "1536M", "4K",
        ] {
            let threshold: Threshold = text.parse().unwrap();
            assert_eq!(threshold.to_string(), text);
        }
        assert_eq!("1.5G".parse(), Ok(Threshold::Bytes(3 << 29)));
    }

    #[test]
    fn what_is_no_threshold_is_refused() {
        for text in [
            "",
            "%",
            "0%",
            "100%",
            "-1%",
            "nan%",
            "ten",
            "0",
            "5 percent",
        ] {
            assert!(text.parse::<Threshold>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_policy_says_at_which_stage_a_disk_is() {
        let policy = SpacePolicy {
            warn: "10%".parse().unwrap(),
            refuse: "5%".parse().unwrap(),
            stop: "1G".parse().unwrap(),
        };
        let state = |available| {
            let size = 100 << 30;
            let free = available;
            StoreSpace::new(
                DiskSpace {
                    size,
                    free,
                    available,
                },
                policy,
            )
            .state
        };
        let of = [50u64 << 30, 9 << 30, 4 << 30, 1 << 29].map(state);
        let all = [
            SpaceState::Ok,
            SpaceState::Warn,
            SpaceState::Refuse,
            SpaceState::Stop,
        ];
        assert_eq!(of, all);
    }
}
