//! What of Kubernetes' container runtime interface (runtime.v1) the tests call, with its numbers of fields.

use std::path::Path;
use std::time::Duration;

use prost::Message;

use crate::snapshotter_support::client::{Client, Failure};
use crate::snapshotter_support::wait_for;

#[derive(Clone, PartialEq, Message)]
pub struct ImageSpec {
    #[prost(string, tag = "1")]
    pub image: String,
}

/// What the kubelet sends of a pull secret.
#[derive(Clone, PartialEq, Message)]
pub struct Auth {
    #[prost(string, tag = "1")]
    pub username: String,
    #[prost(string, tag = "2")]
    pub password: String,
    #[prost(string, tag = "3")]
    pub auth: String,
}

/// The requests of all that name an image.
#[derive(Clone, PartialEq, Message)]
struct ImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<Auth>,
}

#[derive(Clone, PartialEq, Message)]
struct PodMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, Message)]
struct NamespaceOption {
    #[prost(int32, tag = "1")]
    network: i32,
    #[prost(int32, tag = "2")]
    pid: i32,
}

#[derive(Clone, PartialEq, Message)]
struct PodSecurity {
    #[prost(message, optional, tag = "1")]
    namespaces: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPod {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security: Option<PodSecurity>,
}

/// A pod.
#[derive(Clone, PartialEq, Message)]
pub struct PodConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodMetadata>,
    #[prost(string, tag = "3")]
    log_directory: String,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPod>,
}

#[derive(Clone, PartialEq, Message)]
struct RunPod {
    #[prost(message, optional, tag = "1")]
    config: Option<PodConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(string, tag = "11")]
    log_path: String,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainer {
    #[prost(string, tag = "1")]
    pod: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pod_config: Option<PodConfig>,
}

/// The requests and answers that are one name.
#[derive(Clone, PartialEq, Message)]
struct Name {
    #[prost(string, tag = "1")]
    name: String,
}

/// containerd's socket.
pub struct Cri(Client);

impl Cri {
    pub fn new(socket: impl AsRef<Path>) -> Cri {
        Cri(Client::new(socket))
    }

    fn call(&self, method: &str, request: &impl Message) -> Result<String, Failure> {
        let service = match method.ends_with("Image") {
            true => "runtime.v1.ImageService",
            false => "runtime.v1.RuntimeService",
        };
        let answers: Vec<Name> = self.0.call_of(service, method, &[], request)?;
        Ok(answers.into_iter().next().unwrap_or_default().name)
    }

    fn of_image(&self, method: &str, image: &str, auth: Option<Auth>) -> Result<String, Failure> {
        let image = Some(ImageSpec {
            image: image.into(),
        });
        self.call(method, &ImageRequest { image, auth })
    }

    /// What is answered, to the byte, to a call of any service that says nothing but an image, or nothing at all.
    pub fn bytes(&self, method: &str, image: Option<&str>) -> Result<Vec<u8>, Failure> {
        let (service, method) = method.split_once('/').unwrap();
        let image = image.map(|image| ImageSpec {
            image: image.into(),
        });
        let request = ImageRequest { image, auth: None };
        self.0
            .bytes_of(service, method, &[], request.encode_to_vec())
    }

    /// Whether it takes calls: it does some time after containerd does.
    pub fn is_ready(&self) -> bool {
        // Of a pod that is none this is no failure.
        let none = Name {
            name: "none".into(),
        };
        self.call("RemovePodSandbox", &none).is_ok()
    }

    pub fn pull(&self, image: &str) -> Result<String, Failure> {
        self.of_image("PullImage", image, None)
    }

    /// Pulls with a pod's secret.
    pub fn pull_with(&self, image: &str, auth: Auth) -> Result<String, Failure> {
        self.of_image("PullImage", image, Some(auth))
    }

    pub fn remove_image(&self, image: &str) -> Result<String, Failure> {
        self.of_image("RemoveImage", image, None)
    }

    /// Starts a pod in this host's network.
    pub fn run_pod(&self, config: &PodConfig) -> String {
        let config = Some(config.clone());
        self.call("RunPodSandbox", &RunPod { config }).unwrap()
    }

    /// Starts a container in a pod.
    pub fn run(&self, pod: &str, of: &PodConfig, image: &str, name: &str, command: &[&str]) {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into() }),
            image: Some(ImageSpec {
                image: image.into(),
            }),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            log_path: format!("{name}.log"),
        };
        let request = CreateContainer {
            pod: pod.into(),
            config: Some(config),
            pod_config: Some(of.clone()),
        };
        let name = self.call("CreateContainer", &request).unwrap();
        self.call("StartContainer", &Name { name }).unwrap();
    }

    pub fn remove_pod(&self, pod: &str) {
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            // As the kubelet does: a container that has just ended may be in the way.
            wait_for(method, Duration::from_secs(30), || {
                self.call(method, &Name { name: pod.into() }).is_ok()
            });
        }
    }
}

impl PodConfig {
    /// A pod whose containers' logs go to a directory; control groups below `group`.
    pub fn new(name: &str, log_directory: &str, group: &str) -> PodConfig {
        const NODE: i32 = 2;
        PodConfig {
            metadata: Some(PodMetadata {
                name: name.into(),
                uid: format!("{name}-{group}"),
                namespace: "default".into(),
            }),
            log_directory: log_directory.into(),
            linux: Some(LinuxPod {
                cgroup_parent: format!("/{group}"),
                security: Some(PodSecurity {
                    namespaces: Some(NamespaceOption {
                        network: NODE,
                        pid: 1,
                    }),
                }),
            }),
        }
    }
}
