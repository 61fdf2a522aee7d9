//! A pull that is killed leaves nothing that can be seen, and the next one works.

use std::time::Duration;

use vellum_base::crash_point;

use crate::common::kill;
use crate::registry_support::{Registry, clean, digests, store, with_images};

#[test]
fn wherever_a_pull_is_killed_the_next_one_makes_the_image() {
    let (registry, from) = (Registry::new(), with_images());
    let name = registry.image("web:1");
    from.ok(&["push", "web", &name]);
    for place in crash_point::PULLS {
        let to = store();
        to.killed(place, &["pull", &name, "web"]);
        let done = place == "pull: record in place";
        assert_eq!(to.names("images").len(), usize::from(done), "{place}");
        if !done {
            to.ok(&["pull", &name, "web"]);
        }
        assert_eq!(digests(&to, "web"), digests(&from, "web"), "{place}");
        to.ok(&["prune"]);
        clean(&to);
    }
}

#[test]
fn a_pull_of_tars_that_is_killed_at_any_moment_leaves_nothing_to_be_seen() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    let name = registry.image("web:1");
    from.ok(&["push", "web", &name, "--format", "oci"]);
    for millis in [20, 60, 120, 250, 400] {
        let mut child = to.command().args(["pull", &name, "web"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(millis));
        kill(child.id() as i32);
        child.wait().unwrap();
        if to.names("images").is_empty() {
            continue;
        }
        to.ok(&["rmi", "web"]);
    }
    to.ok(&["pull", &name, "web"]);
    let said = to.ok(&["run", "--rm", "web", "--", "/bin/sh", "-c", "cat /etc/web"]);
    assert_eq!(said, "web\n");
    to.ok(&["prune"]);
    clean(&to);
}
