//! Pull secrets of pods, as they come by with the pulls of the kubelet: in memory alone, and never in a log.
//! docs/containerd.md, "Pull secrets".

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vellum_registry::{Credential, Keychain, Reference};

/// Images whose secrets are kept at a time.
const MAX_IMAGES: usize = 1024;
/// Pulls under way that are looked at; what comes with others is not kept.
const MAX_PULLS: usize = 1024;
/// The longest secret that is kept, in bytes.
const MAX_SECRET: usize = 64 << 10;
/// For how long one is kept that nobody gave or asked for.
const KEPT_FOR: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// A secret, and of which pull: a later one has a greater number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Secret {
    pub number: u64,
    pub credential: Credential,
}

/// What an image was pulled with.
#[derive(Debug)]
struct Kept {
    image: Reference,
    /// What containerd calls it, by which the kubelet removes it.
    id: String,
    secret: Secret,
    used: Instant,
}

/// An image that is being pulled.
#[derive(Debug)]
struct UnderWay {
    image: Reference,
    number: u64,
    /// None where it is pulled without one.
    secret: Option<Secret>,
}

#[derive(Debug, Default)]
struct Known {
    /// By [`name_of`].
    images: HashMap<String, Kept>,
    under_way: Vec<UnderWay>,
    pulls: u64,
}

/// The pull secrets that are known.
#[derive(Debug, Default)]
pub struct PullSecrets(Mutex<Known>);

/// A pull under way. Dropped before [`Pull::done`] it has failed, and its secret is forgotten.
#[derive(Debug)]
pub struct Pull {
    secrets: Arc<PullSecrets>,
    number: u64,
}

/// What containerd asks for: a tag beside a digest is left out.
fn name_of(image: &Reference) -> String {
    let mark = image.digest().map_or(':', |_| '@');
    let (registry, repository) = (image.registry(), image.repository());
    format!("{registry}/{repository}{mark}{}", image.identifier())
}

impl Known {
    fn forget_old(&mut self) {
        self.images.retain(|_, kept| kept.used.elapsed() < KEPT_FOR);
    }

    fn keep(&mut self, pull: UnderWay, id: &str) {
        let name = name_of(&pull.image);
        let Some(secret) = pull.secret else {
            self.images.remove(&name);
            return;
        };
        self.forget_old();
        if self.images.len() >= MAX_IMAGES && !self.images.contains_key(&name) {
            let oldest = self.images.iter().min_by_key(|(_, kept)| kept.used);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                self.images.remove(&oldest);
            }
        }
        let kept = Kept {
            image: pull.image,
            id: id.to_owned(),
            secret,
            used: Instant::now(),
        };
        self.images.insert(name, kept);
    }

    /// The newest secret that opened a repository, or else the newest that is being tried there, but for those that
    /// are refused now.
    fn of_repository(
        &mut self,
        registry: &str,
        repository: &str,
        refused: &[Credential],
    ) -> Option<Secret> {
        let is =
            |image: &Reference| image.registry() == registry && image.repository() == repository;
        let may = |secret: &Secret| !refused.contains(&secret.credential);
        self.forget_old();
        let kept = self.images.values_mut();
        let kept = kept.filter(|kept| is(&kept.image) && may(&kept.secret));
        if let Some(kept) = kept.max_by_key(|kept| kept.secret.number) {
            kept.used = Instant::now();
            return Some(kept.secret.clone());
        }
        let under_way = self.under_way.iter().rev();
        let mut tried = under_way.filter(|pull| is(&pull.image));
        tried.find_map(|pull| pull.secret.clone().filter(may))
    }
}

impl PullSecrets {
    /// A pull begins, with what the kubelet sent along, if it did.
    pub fn begin(self: &Arc<Self>, image: Reference, credential: Option<Credential>) -> Pull {
        let credential = credential.filter(|credential| credential.len() <= MAX_SECRET);
        let mut known = self.0.lock();
        known.pulls += 1;
        let number = known.pulls;
        if known.under_way.len() < MAX_PULLS {
            known.under_way.push(UnderWay {
                image,
                number,
                secret: credential.map(|credential| Secret { number, credential }),
            });
        }
        Pull {
            secrets: Arc::clone(self),
            number,
        }
    }

    /// An image was removed, by one of its names or by containerd's id, and with it all of its names.
    pub fn removed(&self, image: &str) {
        let name = Reference::parse(image).ok().map(|image| name_of(&image));
        let mut known = self.0.lock();
        let named = name.and_then(|name| known.images.remove(&name));
        let id = named.map_or_else(|| image.to_owned(), |named| named.id);
        known
            .images
            .retain(|_, kept| kept.id != id || id.is_empty());
    }

    /// The secret with which containerd is pulling an image, or did.
    pub(super) fn of_image(&self, image: &Reference) -> Option<Secret> {
        let mut known = self.0.lock();
        let mut under_way = known.under_way.iter().rev();
        let name = name_of(image);
        let pulling =
            under_way.find_map(|pull| pull.secret.clone().filter(|_| name_of(&pull.image) == name));
        pulling.or_else(|| known.of_repository(image.registry(), image.repository(), &[]))
    }
}

impl Pull {
    /// It went well: containerd calls the image `id`.
    pub fn done(self, id: &str) {
        let mut known = self.secrets.0.lock();
        let known = &mut *known;
        if let Some(pull) = known.take(self.number) {
            known.keep(pull, id);
        }
    }
}

impl Known {
    fn take(&mut self, number: u64) -> Option<UnderWay> {
        let mut pulls = self.under_way.iter();
        let at = pulls.position(|pull| pull.number == number)?;
        Some(self.under_way.remove(at))
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        self.secrets.0.lock().take(self.number);
    }
}

/// For the fetcher, which knows of an image where its blobs are.
impl Keychain for PullSecrets {
    fn find(&self, registry: &str, repository: &str, refused: &[Credential]) -> Option<Credential> {
        let secret = self.0.lock().of_repository(registry, repository, refused);
        secret.map(|secret| secret.credential)
    }
}

/// One secret, for one question.
impl Keychain for Secret {
    fn find(&self, _: &str, _: &str, refused: &[Credential]) -> Option<Credential> {
        Some(self.credential.clone()).filter(|known| !refused.contains(known))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str) -> Reference {
        Reference::parse(name).unwrap()
    }

    fn token(text: &str) -> Option<Credential> {
        Some(Credential::RegistryToken(text.into()))
    }

    fn pull(secrets: &Arc<PullSecrets>, name: &str, credential: Option<Credential>, id: &str) {
        secrets.begin(image(name), credential).done(id);
    }

    #[test]
    fn a_secret_is_good_for_its_repository_from_the_pull_until_the_image_is_removed() {
        let secrets = Arc::new(PullSecrets::default());
        let hub = |secrets: &PullSecrets| secrets.find("docker.io", "library/web", &[]);
        let under_way = secrets.begin(image("web"), token("first"));
        assert_eq!(hub(&secrets), token("first"));
        under_way.done("sha256:one");
        assert_eq!(hub(&secrets), token("first"));
        assert_eq!(secrets.find("docker.io", "me/web", &[]), None);
        assert_eq!(secrets.find("other.example", "library/web", &[]), None);
        pull(
            &secrets,
            "docker.io/library/web:2",
            token("second"),
            "sha256:two",
        );
        assert_eq!(hub(&secrets), token("second"));
        secrets.removed("sha256:two");
        assert_eq!(hub(&secrets), token("first"));
        secrets.removed("index.docker.io/library/web:latest");
        secrets.removed("docker.io/library/web:latest");
        assert_eq!(hub(&secrets), None);
    }

    #[test]
    fn what_a_registry_refused_gives_place_to_the_next_that_is_known_and_to_a_pull_under_way() {
        let secrets = Arc::new(PullSecrets::default());
        pull(&secrets, "r.example/web:1", token("first"), "sha256:one");
        pull(&secrets, "r.example/web:2", token("second"), "sha256:two");
        let _now = secrets.begin(image("r.example/web:1"), token("new"));
        let mut refused = Vec::new();
        for expected in ["second", "first", "new"] {
            let found = secrets.find("r.example", "web", &refused);
            assert_eq!(found, token(expected));
            refused.extend(found);
        }
        assert_eq!(secrets.find("r.example", "web", &refused), None);
    }

    #[test]
    fn a_pull_by_tag_and_digest_is_the_one_that_containerd_names_by_the_digest_alone() {
        let secrets = Arc::new(PullSecrets::default());
        let digest = format!("sha256:{}", "ab".repeat(32));
        let whole = format!("r.example/web:1@{digest}");
        let named = image(&format!("r.example/web@{digest}"));
        pull(&secrets, "r.example/web:2", token("other"), "sha256:two");
        let under_way = secrets.begin(image(&whole), token("its own"));
        let found = secrets.of_image(&named).map(|secret| secret.credential);
        assert_eq!(found, token("its own"));
        under_way.done("");
        secrets.removed(&named.to_string());
        assert_eq!(secrets.find("r.example", "web", &[]), token("other"));
    }

    #[test]
    fn an_image_that_is_removed_by_one_name_is_removed_by_all_of_them() {
        let secrets = Arc::new(PullSecrets::default());
        pull(&secrets, "r.example/a:1", token("a"), "sha256:one");
        pull(&secrets, "r.example/b:1", token("b"), "sha256:one");
        pull(&secrets, "r.example/c:1", token("c"), "sha256:two");
        secrets.removed("r.example/a:1");
        assert_eq!(secrets.find("r.example", "a", &[]), None);
        assert_eq!(secrets.find("r.example", "b", &[]), None);
        assert_eq!(secrets.find("r.example", "c", &[]), token("c"));
    }

    #[test]
    fn a_pull_that_fails_leaves_what_was_known_and_one_without_a_secret_takes_its_place() {
        let secrets = Arc::new(PullSecrets::default());
        pull(&secrets, "r.example/web:1", token("good"), "sha256:one");
        let wrong = secrets.begin(image("r.example/web:1"), token("wrong"));
        // containerd asks with it; layers that are here already do not.
        let now = secrets.of_image(&image("r.example/web:1")).unwrap();
        assert_eq!(Some(now.credential), token("wrong"));
        assert_eq!(secrets.find("r.example", "web", &[]), token("good"));
        drop(wrong);
        let now = secrets.of_image(&image("r.example/web:1")).unwrap();
        assert_eq!(Some(now.credential), token("good"));
        pull(&secrets, "r.example/web:1", None, "sha256:one");
        assert_eq!(secrets.find("r.example", "web", &[]), None);
    }

    #[test]
    fn what_is_kept_is_bounded_in_number_in_length_and_in_time() {
        let secrets = Arc::new(PullSecrets::default());
        for n in 0..2 * MAX_IMAGES {
            pull(
                &secrets,
                &format!("r.example/web:{n}"),
                token("x"),
                &n.to_string(),
            );
        }
        assert_eq!(secrets.0.lock().images.len(), MAX_IMAGES);
        pull(
            &secrets,
            "r.example/long:1",
            token(&"x".repeat(MAX_SECRET + 1)),
            "long",
        );
        assert_eq!(secrets.find("r.example", "long", &[]), None);
        let pulls: Vec<Pull> = (0..2 * MAX_PULLS)
            .map(|_| secrets.begin(image("r.example/web:1"), token("x")))
            .collect();
        assert_eq!(secrets.0.lock().under_way.len(), MAX_PULLS);
        drop(pulls);
        let mut known = secrets.0.lock();
        assert!(known.under_way.is_empty());
        let long_ago = Instant::now().checked_sub(KEPT_FOR);
        // A host that was started just now cannot count so far back.
        if let Some(long_ago) = long_ago {
            known
                .images
                .values_mut()
                .for_each(|kept| kept.used = long_ago);
            drop(known);
            assert_eq!(secrets.find("r.example", "web", &[]), None);
            assert!(secrets.0.lock().images.is_empty());
        }
    }

    #[test]
    fn nothing_of_a_secret_is_shown() {
        let secrets = Arc::new(PullSecrets::default());
        let _pull = secrets.begin(image("r.example/web:1"), token("s3cret"));
        pull(&secrets, "r.example/web:2", token("s3cret"), "sha256:one");
        assert!(!format!("{secrets:?}").contains("s3cret"));
    }
}
