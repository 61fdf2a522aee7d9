//! Whether pods' pull secrets get to the snapshotter. docs/containerd.md, "Pull secrets".

use std::os::unix::net::UnixStream;

use super::{Look, Options, State};

const CHECK: &str = "pull secrets";
/// What is missing where nothing is said.
const WITHOUT: &str = "for private registries under Kubernetes: in the snapshotter's configuration\n\
    [cri]\n  image_service = \"/run/vellum/cri.sock\"\n\
    and for the kubelet --image-service-endpoint=unix:///run/vellum/cri.sock";

impl Look {
    /// Looks whether the image service answers, of a snapshotter that takes block layers from registries.
    pub(super) fn image_service(&mut self, options: &Options) {
        let Some(address) = &options.image_service else {
            if options.remote {
                let found =
                    "pods' do not get here: registries are asked with this host's own credentials";
                self.add(CHECK, State::Note, found, Some(WITHOUT));
            }
            return;
        };
        let shown = address.display();
        match UnixStream::connect(address) {
            Err(error) => self.add(
                CHECK,
                State::Warning,
                format!("the image service, {shown}: {error}"),
                Some("a kubelet that pulls there pulls nothing: systemctl restart vellum-snapshotter"),
            ),
            Ok(_) if !options.remote => self.add(
                CHECK,
                State::Note,
                format!("the image service answers on {shown}, and no registry is asked"),
                Some("[remote] from in the snapshotter's configuration names those that are"),
            ),
            Ok(_) => self.ok(
                CHECK,
                format!("the image service answers on {shown}, for the kubelet's --image-service-endpoint"),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;

    use super::*;

    fn look(image_service: Option<PathBuf>, remote: bool) -> Option<State> {
        let mut look = Look::default();
        look.image_service(&Options {
            root: PathBuf::new(),
            address: PathBuf::new(),
            containerd_config: PathBuf::new(),
            remote,
            image_service,
        });
        look.findings.pop().map(|finding| finding.state)
    }

    #[test]
    fn an_image_service_is_wanted_to_answer_and_to_be_of_use() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("cri.sock");
        assert_eq!(look(None, false), None);
        assert_eq!(look(None, true), Some(State::Note));
        assert_eq!(look(Some(address.clone()), true), Some(State::Warning));
        let _listens = UnixListener::bind(&address).unwrap();
        assert_eq!(look(Some(address.clone()), true), Some(State::Ok));
        assert_eq!(look(Some(address), false), Some(State::Note));
    }
}
