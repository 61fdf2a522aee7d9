//! Names and passwords.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Output, Stdio};

use crate::common::{TestStore, run};
use crate::registry_support::{Registry, Setup, store, with_images};

pub fn login(store: &TestStore, host: &str, password: &str) -> Output {
    let mut child = store
        .command()
        .args(["login", host, "-u", "user", "--password-stdin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    writeln!(child.stdin.take().unwrap(), "{password}").unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_registry_that_wants_a_password_gets_it_from_where_docker_keeps_it() {
    let registry = Registry::with(&Setup {
        auth: true,
        ..Setup::default()
    });
    let store = with_images();
    let name = registry.image("team/web:1");
    let host = registry.host();
    let said = store.fails(&["push", "web", &name]);
    assert!(said.contains(&format!("`vellum login {host}`")), "{said}");
    let refused = login(&store, &host, "wrong");
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        said.contains("does not take the name and password"),
        "{said}"
    );
    let config = store.path("docker/config.json");
    assert!(!config.exists(), "a wrong password is not kept");

    let taken = login(&store, &host, "secret");
    assert!(taken.status.success(), "{taken:?}");
    assert_eq!(
        fs::metadata(&config).unwrap().permissions().mode() & 0o777,
        0o600
    );
    store.ok(&["push", "web", &name]);
    store.ok(&["pull", &name, "pulled"]);
    // Others read the same file.
    let auth = config.display().to_string();
    run(
        "skopeo",
        &[
            "inspect",
            "--no-tags",
            "--tls-verify=false",
            "--authfile",
            &auth,
            &registry.skopeo("team/web:1"),
        ],
    );
    store.ok(&["logout", &host]);
    let said = store.fails(&["pull", &name, "again"]);
    assert!(said.contains("vellum login"), "{said}");
    let said = store.fails(&["logout", &host]);
    assert!(said.contains("nobody is logged in"), "{said}");
}

#[test]
fn a_password_that_is_known_and_wrong_is_said_to_be_so() {
    let registry = Registry::with(&Setup {
        auth: true,
        ..Setup::default()
    });
    let store = store();
    let host = registry.host();
    let config = store.path("docker/config.json");
    // user:wrong
    let kept = format!(r#"{{"auths":{{"{host}":{{"auth":"dXNlcjp3cm9uZw=="}}}},"other":1}}"#);
    fs::write(&config, kept).unwrap();
    let said = store.fails(&["pull", &registry.image("team/web:1"), "web"]);
    assert!(
        said.contains("does not take the name and password"),
        "{said}"
    );
    assert!(login(&store, &host, "secret").status.success());
    let kept = fs::read_to_string(&config).unwrap();
    assert!(kept.contains(r#""other": 1"#), "{kept}");
}

#[test]
fn a_credential_helper_keeps_and_gives_the_password() {
    let registry = Registry::with(&Setup {
        auth: true,
        ..Setup::default()
    });
    let store = with_images();
    let host = registry.host();
    let helper = store.path("docker-credential-mine");
    let kept = store.arg("kept");
    let script = format!(
        "#!/bin/sh\ncase $1 in\nstore) cat > {kept} ;;\nerase) rm -f {kept} ;;\nget) cat {kept} 2>/dev/null || \
         {{ echo 'credentials not found in native keychain'; exit 1; }} ;;\nesac\n"
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(store.path("docker/config.json"), r#"{"credsStore":"mine"}"#).unwrap();
    let path = format!(
        "{}:{}",
        store.dir.path().display(),
        std::env::var("PATH").unwrap()
    );
    let mut store = store;
    store.env.push(("PATH", path.leak()));
    let said = store.fails(&["push", "web", &registry.image("web:1")]);
    assert!(said.contains("vellum login"), "{said}");
    assert!(login(&store, &host, "secret").status.success());
    assert!(fs::read_to_string(&kept).unwrap().contains("secret"));
    store.ok(&["push", "web", &registry.image("web:1")]);
    store.ok(&["logout", &host]);
    assert!(!fs::exists(&kept).unwrap());
}
