//! What of Kubernetes' container runtime interface (k8s.io/cri-api, runtime.v1 and v1alpha2, whose image services are the
//! same) is read here. docs/containerd.md, "Pull secrets".

use prost::Message;
use vellum_registry::{Credential, Reference, is_of_registry};

/// The packages whose messages are those below.
const PACKAGES: [&str; 2] = ["/runtime.v1.", "/runtime.v1alpha2."];
/// In front of a message of gRPC: whether it is compressed, and its length.
const HEAD: usize = 5;

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// AuthConfig.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct Auth {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
    #[prost(string, tag = "3")]
    auth: String,
    #[prost(string, tag = "4")]
    server_address: String,
    #[prost(string, tag = "5")]
    identity_token: String,
    #[prost(string, tag = "6")]
    registry_token: String,
}

impl std::fmt::Debug for Auth {
    /// Without what nobody is to read in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Auth(..)")
    }
}

/// PullImageRequest, and RemoveImageRequest, which ends behind the image.
#[derive(Clone, PartialEq, Message)]
struct ImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<Auth>,
}

/// PullImageResponse.
#[derive(Clone, PartialEq, Message)]
struct Pulled {
    #[prost(string, tag = "1")]
    image_ref: String,
}

/// Whether a request is a pull.
pub(super) fn is_pull(path: &str) -> bool {
    is(path, "ImageService/PullImage")
}

/// Whether a request removes an image.
pub(super) fn is_removal(path: &str) -> bool {
    is(path, "ImageService/RemoveImage")
}

fn is(path: &str, method: &str) -> bool {
    let mut packages = PACKAGES.iter();
    packages.any(|package| path.strip_prefix(package) == Some(method))
}

/// What is to be pulled.
#[derive(Debug)]
pub(super) struct Wanted {
    pub image: Reference,
    pub credential: Option<Credential>,
}

impl Wanted {
    /// Reads a request for a pull; `None` for one that makes no sense here, of which containerd judges.
    pub fn read(request: &[u8]) -> Option<Self> {
        let request: ImageRequest = message(request)?;
        let image = Reference::parse(&request.image?.image).ok()?;
        let credential = request.auth.and_then(|auth| auth.credential(&image));
        Some(Wanted { image, credential })
    }
}

/// What is to be removed.
#[derive(Debug)]
pub(super) struct Removal {
    /// A name of the image, or containerd's id of it.
    pub image: String,
}

impl Removal {
    /// Reads a request for a removal, as [`Wanted::read`].
    pub fn read(request: &[u8]) -> Option<Self> {
        let request: ImageRequest = message(request)?;
        let image = request.image?.image;
        Some(Removal { image })
    }
}

/// What containerd calls an image that it pulled; empty where that cannot be read.
pub(super) fn answered(answer: &[u8]) -> String {
    let pulled = message(answer);
    pulled.map_or_else(String::new, |pulled: Pulled| pulled.image_ref)
}

/// The one message of a request or an answer.
fn message<T: Message + Default>(bytes: &[u8]) -> Option<T> {
    let (head, message) = bytes.split_at_checked(HEAD)?;
    let (compressed, len) = head.split_first()?;
    let len = u32::from_be_bytes(len.try_into().ok()?);
    let is_one = *compressed == 0 && len as usize == message.len();
    is_one.then(|| T::decode(message).ok())?
}

impl Auth {
    /// What containerd would make of it, and besides a registry's token, of which containerd makes nothing (1.6 to 2.1).
    fn credential(self, image: &Reference) -> Option<Credential> {
        let address = &self.server_address;
        if !address.is_empty() && !is_of_registry(address, image.registry()) {
            return None;
        }
        if !self.username.is_empty() {
            return Some(Credential::Password {
                user: self.username,
                password: self.password,
            });
        }
        if !self.identity_token.is_empty() {
            return Some(Credential::IdentityToken(self.identity_token));
        }
        if !self.auth.is_empty() {
            return Credential::of_basic(&self.auth);
        }
        let token = self.registry_token;
        (!token.is_empty()).then_some(Credential::RegistryToken(token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(message: &impl Message) -> Vec<u8> {
        let bytes = message.encode_to_vec();
        let head = [&[0][..], &(bytes.len() as u32).to_be_bytes()].concat();
        [head, bytes].concat()
    }

    fn request(image: &str, auth: Option<Auth>) -> Vec<u8> {
        let image = image.to_owned();
        framed(&ImageRequest {
            image: Some(ImageSpec { image }),
            auth,
        })
    }

    fn read(auth: Auth) -> Option<Credential> {
        Wanted::read(&request("web:1", Some(auth)))
            .unwrap()
            .credential
    }

    fn password() -> Option<Credential> {
        Some(Credential::Password {
            user: "user".into(),
            password: "secret".into(),
        })
    }

    #[test]
    fn each_kind_of_secret_is_understood_as_containerd_does() {
        let named = Auth {
            username: "user".into(),
            password: "secret".into(),
            identity_token: "not this".into(),
            ..Auth::default()
        };
        assert_eq!(read(named.clone()), password());
        let basic = Auth {
            auth: "dXNlcjpzZWNyZXQ=".into(),
            ..Auth::default()
        };
        assert_eq!(read(basic), password());
        let identity = Auth {
            identity_token: "i".into(),
            auth: "dXNlcjpzZWNyZXQ=".into(),
            ..Auth::default()
        };
        assert_eq!(read(identity), Some(Credential::IdentityToken("i".into())));
        let token = Auth {
            registry_token: "r".into(),
            ..Auth::default()
        };
        assert_eq!(read(token), Some(Credential::RegistryToken("r".into())));
        assert_eq!(read(Auth::default()), None);
        let address = |server_address: &str| Auth {
            server_address: server_address.into(),
            ..named.clone()
        };
        assert_eq!(read(address("https://index.docker.io/v1/")), password());
        assert_eq!(read(address("https://registry.example")), None);
    }

    #[test]
    fn the_image_has_the_name_that_the_kubelet_and_containerd_mean() {
        let wanted = Wanted::read(&request("web", None)).unwrap();
        assert_eq!(wanted.image.to_string(), "docker.io/library/web:latest");
        assert!(wanted.credential.is_none());
        assert_eq!(
            Removal::read(&request("sha256:1", None)).unwrap().image,
            "sha256:1"
        );
        let image_ref = "sha256:1".to_owned();
        assert_eq!(answered(&framed(&Pulled { image_ref })), "sha256:1");
        assert_eq!(answered(b""), "");
    }

    #[test]
    fn what_is_no_message_or_compressed_or_another_methods_is_left_to_containerd() {
        let mut compressed = request("web", None);
        compressed[0] = 1;
        let cut = request("web", None);
        let cut = cut.split_last().unwrap().1.to_vec();
        for bytes in [&b""[..], b"\0\0", &compressed, &cut, &request("A B", None)] {
            assert!(Wanted::read(bytes).is_none(), "{bytes:?}");
        }
        assert!(is_pull("/runtime.v1.ImageService/PullImage"));
        assert!(is_pull("/runtime.v1alpha2.ImageService/PullImage"));
        assert!(is_removal("/runtime.v1.ImageService/RemoveImage"));
        for path in [
            "/runtime.v2.ImageService/PullImage",
            "/runtime.v1.ImageService/PullImages",
            "/runtime.v1.RuntimeService/PullImage",
            "/containerd.services.images.v1.Images/Create",
        ] {
            assert!(!is_pull(path) && !is_removal(path), "{path}");
        }
    }

    #[test]
    fn nothing_of_a_secret_is_shown() {
        let auth = Auth {
            password: "s3cret".into(),
            ..Auth::default()
        };
        let request = ImageRequest {
            image: None,
            auth: Some(auth),
        };
        assert!(!format!("{request:?}").contains("s3cret"));
    }
}
