//! Which machines an image runs on, and which of several images suits this one best.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use super::config::or_default;
use vellum_base::{Error, ErrorKind, Result};

/// What kind of machine an image is for.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Platform {
    /// Operating system in Go's spelling: `linux`.
    #[serde(default, deserialize_with = "or_default")]
    pub os: String,
    /// Processor in Go's spelling: `amd64`.
    #[serde(default, deserialize_with = "or_default")]
    pub architecture: String,
    /// Its variant: `v8`.
    #[serde(default)]
    pub variant: Option<String>,
}

/// How well an image runs on a machine: greater is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// Its own instruction set, rather than an older one that it runs as well.
    native: bool,
    /// The variant; the lowest where the image names none.
    variant: (u32, u32),
}

impl Platform {
    /// The machine this runs on, with the best variant that its CPU has.
    pub fn host() -> Platform {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", amd64_variant()),
            "x86" => ("386", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.map(String::from),
        }
    }

    /// The kind of machine without what only some of its CPUs have.
    pub(super) fn baseline(mut self) -> Platform {
        if self.architecture == "amd64" {
            self.variant = None;
        }
        self
    }

    /// Which of several images runs best here, chosen as containerd chooses; `None` where none does.
    pub fn best<'a>(&self, images: impl IntoIterator<Item = &'a Platform>) -> Option<usize> {
        let ranked = images.into_iter().enumerate();
        let ranked = ranked.filter_map(|(index, image)| Some((self.rank(image)?, index)));
        // Of equals the first.
        ranked
            .max_by(|one, other| one.0.cmp(&other.0).then(other.1.cmp(&one.1)))
            .map(|(_, index)| index)
    }

    /// How well an image for `image` runs here, chosen as containerd chooses; `None` not at all.
    pub(super) fn rank(&self, image: &Platform) -> Option<Rank> {
        if self.os != image.os {
            return None;
        }
        let own = self.level()?;
        let native = self.architecture == image.architecture;
        let level = image.level()?;
        let runs = match (self.architecture.as_str(), image.architecture.as_str()) {
            _ if native => level <= own,
            // What these CPUs run besides.
            ("amd64", "386") => true,
            ("arm64", "arm") => level.0 <= 8,
            _ => false,
        };
        let variant = match image.variant.as_deref() {
            None | Some("") => (0, 0),
            Some(_) => level,
        };
        runs.then_some(Rank { native, variant })
    }

    /// The variant as a number; where none is named, what the name of the processor stands for.
    /// `None` for a variant that is not a number.
    fn level(&self) -> Option<(u32, u32)> {
        match self.variant.as_deref() {
            None | Some("") => Some(match self.architecture.as_str() {
                "amd64" => (1, 0),
                "arm64" => (8, 0),
                // Built for the least, as far as is known.
                _ => (0, 0),
            }),
            Some(variant) => {
                let number = variant.strip_prefix('v')?;
                let (major, minor) = number.split_once('.').unwrap_or((number, "0"));
                Some((major.parse().ok()?, minor.parse().ok()?))
            }
        }
    }
}

/// The level of the x86-64 psABI that this CPU reaches, in Go's spelling; `None` for the first.
#[cfg(target_arch = "x86_64")]
fn amd64_variant() -> Option<&'static str> {
    let has = |all: &[bool]| all.iter().all(|has| *has);
    let second = has(&[
        is_x86_feature_detected!("cmpxchg16b"),
        is_x86_feature_detected!("popcnt"),
        is_x86_feature_detected!("sse3"),
        is_x86_feature_detected!("ssse3"),
        is_x86_feature_detected!("sse4.1"),
        is_x86_feature_detected!("sse4.2"),
    ]);
    let third = has(&[
        is_x86_feature_detected!("avx"),
        is_x86_feature_detected!("avx2"),
        is_x86_feature_detected!("bmi1"),
        is_x86_feature_detected!("bmi2"),
        is_x86_feature_detected!("f16c"),
        is_x86_feature_detected!("fma"),
        is_x86_feature_detected!("lzcnt"),
        is_x86_feature_detected!("movbe"),
    ]);
    let fourth = has(&[
        is_x86_feature_detected!("avx512f"),
        is_x86_feature_detected!("avx512bw"),
        is_x86_feature_detected!("avx512cd"),
        is_x86_feature_detected!("avx512dq"),
        is_x86_feature_detected!("avx512vl"),
    ]);
    match (second, third, fourth) {
        (true, true, true) => Some("v4"),
        (true, true, false) => Some("v3"),
        (true, false, _) => Some("v2"),
        _ => None,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn amd64_variant() -> Option<&'static str> {
    None
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match self.variant.as_deref() {
            Some(variant) if !variant.is_empty() => write!(f, "/{variant}"),
            _ => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = Error;

    /// Reads `OS/ARCHITECTURE[/VARIANT]`.
    fn from_str(text: &str) -> Result<Platform> {
        let mut parts = text.split('/').map(String::from);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(os), Some(architecture), variant, None)
                if !os.is_empty() && !architecture.is_empty() =>
            {
                Ok(Platform {
                    os,
                    architecture,
                    variant,
                })
            }
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{text:?} is not a platform such as linux/amd64 or linux/arm64/v8"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn platforms_parse_and_print() {
        for text in ["linux/amd64", "linux/arm/v7"] {
            assert_eq!(platform(text).to_string(), text);
        }
        for text in ["", "linux", "linux/", "a/b/c/d"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_best_variant_that_the_cpu_has_ranks_first_and_what_it_has_not_never() {
        for (host, best_first, never) in [
            (
                "linux/arm/v7",
                &["linux/arm/v7", "linux/arm/v6", "linux/arm"][..],
                &["linux/arm/v8", "linux/arm64", "windows/arm"][..],
            ),
            (
                "linux/amd64/v3",
                &[
                    "linux/amd64/v3",
                    "linux/amd64/v2",
                    "linux/amd64",
                    "linux/386",
                ],
                &["linux/amd64/v4", "linux/arm64", "linux/amd64/odd"],
            ),
            (
                "linux/amd64",
                &["linux/amd64/v1", "linux/amd64", "linux/386"],
                &["linux/amd64/v2", "linux/amd64/v4"],
            ),
            (
                "linux/arm64/v8",
                &[
                    "linux/arm64/v8",
                    "linux/arm64",
                    "linux/arm/v7",
                    "linux/arm/v6",
                ],
                &["linux/arm64/v9", "linux/arm64/v8.2", "linux/amd64"],
            ),
        ] {
            let host = platform(host);
            let ranks: Vec<_> = best_first
                .iter()
                .map(|image| host.rank(&platform(image)).expect(image))
                .collect();
            assert!(ranks.is_sorted_by(|a, b| a > b), "{host}: {ranks:?}");
            for image in never {
                assert_eq!(host.rank(&platform(image)), None, "{host}: {image}");
            }
        }
    }

    #[test]
    fn a_variant_without_a_word_is_none() {
        let mut empty = platform("linux/amd64");
        empty.variant = Some(String::new());
        assert!(platform("linux/amd64").rank(&empty).is_some());
        assert_eq!(empty.to_string(), "linux/amd64");
    }

    #[test]
    fn this_host_runs_images_for_itself_and_new_images_ask_for_the_least() {
        let host = Platform::host();
        assert!(host.rank(&host).is_some());
        assert!(host.rank(&host.clone().baseline()).is_some());
        if host.architecture == "amd64" {
            assert_eq!(host.baseline().variant, None);
        }
    }
}
