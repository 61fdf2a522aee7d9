//! Registries that want to see a certificate of who asks: `client` of a `hosts.toml`, and docker's files.

use std::fs;
use std::path::Path;

use crate::common::shell;
use crate::lazy::{end_fetchers, files};
use crate::mirrors::configure;
use crate::registry_support::{Registry, Setup, clean, store, with_images};

/// Two authorities, a server's certificate of the first for this host, and a client's of each.
fn certificates(dir: &Path) {
    shell(
        dir,
        "new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2'
         for ca in ca other; do
             openssl req -x509 $new -subj /CN=$ca -addext basicConstraints=critical,CA:TRUE \
                 -keyout $ca.key -out $ca.pem 2>/dev/null
         done
         leaf='-addext basicConstraints=critical,CA:FALSE'
         openssl req -x509 $new -subj /CN=registry -addext subjectAltName=IP:127.0.0.1 -CA ca.pem -CAkey ca.key \
             $leaf -keyout server.key -out server.pem 2>/dev/null
         for ca in ca other; do
             openssl req -x509 $new -subj /CN=vellum -addext extendedKeyUsage=clientAuth -CA $ca.pem -CAkey $ca.key \
                 $leaf -keyout client-$ca.key -out client-$ca.cert 2>/dev/null
         done
         cat client-ca.cert client-ca.key > both.pem",
    );
}

/// A registry that wants certificates of the first authority.
fn registry(keys: &Path) -> Registry {
    let at = |name: &str| keys.join(name).display().to_string();
    Registry::with(&Setup {
        http: format!(
            ", tls: {{certificate: {}, key: {}, clientcas: [{}]}}",
            at("server.pem"),
            at("server.key"),
            at("ca.pem")
        ),
        ..Setup::default()
    })
}

/// Of TLS 1.3 the alert comes when the client has sent its request already, and may be lost with the connection that
/// the server closes (RFC 8446, 4.4.2.4).
fn is_for_want_of_a_certificate(said: &str) -> bool {
    said.to_lowercase().contains("certificate") || said.contains("connection closed")
}

/// A `hosts.toml` beside whose server the root stands, and what of a client is said.
fn hosts(address: &str, keys: &Path, client: &str) -> String {
    let client = client.replace("KEYS", &keys.display().to_string());
    let ca = keys.join("ca.pem");
    format!(
        "server = 'https://{address}'\nca = '{}'\n{client}",
        ca.display()
    )
}

#[test]
fn a_registry_that_wants_a_client_certificate_gets_the_one_of_its_authority() {
    let (mut from, mut to) = (with_images(), store());
    let keys = tempfile::tempdir().unwrap();
    certificates(keys.path());
    let registry = registry(keys.path());
    let (address, image) = (registry.host(), registry.image("web:1"));
    let other = "['KEYS/client-other.cert', 'KEYS/client-other.key']";
    for none in ["", &format!("client = [{other}]")] {
        configure(&mut from, &address, &hosts(&address, keys.path(), none));
        let said = from.fails(&["push", "web", &image]);
        assert!(is_for_want_of_a_certificate(&said), "{said}");
    }
    let both = format!("client = [{other}, ['KEYS/client-ca.cert', 'KEYS/client-ca.key']]");
    configure(&mut from, &address, &hosts(&address, keys.path(), &both));
    from.ok(&["push", "web", &image]);
    let in_one = "client = 'KEYS/both.pem'";
    configure(&mut to, &address, &hosts(&address, keys.path(), in_one));
    to.ok(&["pull", "--lazy", &image, "lazy"]);
    assert_eq!(files(&to, "lazy"), files(&from, "web"));
    end_fetchers(&to);
    clean(&to);
}

#[test]
fn a_certificate_of_nobody_known_is_taken_with_skip_verify_alone_and_a_key_of_another_is_named() {
    let (mut from, keys) = (with_images(), tempfile::tempdir().unwrap());
    certificates(keys.path());
    let registry = registry(keys.path());
    let (address, image) = (registry.host(), registry.image("web:1"));
    let client = format!("client = '{}'", keys.path().join("both.pem").display());
    let without_root = format!("server = 'https://{address}'\n{client}\n");
    configure(&mut from, &address, &without_root);
    let said = from.fails(&["push", "web", &image]);
    assert!(said.contains("certificate"), "{said}");
    configure(
        &mut from,
        &address,
        &format!("{without_root}skip_verify = true\n"),
    );
    from.ok(&["push", "web", &image]);
    from.ok(&["pull", &image, "again"]);
    let mixed = "client = [['KEYS/client-ca.cert', 'KEYS/client-other.key']]";
    configure(&mut from, &address, &hosts(&address, keys.path(), mixed));
    let said = from.fails(&["pull", &image, "mixed"]);
    assert!(said.contains("client-other.key"), "{said}");
}

#[test]
fn docker_s_files_beside_each_other_are_those_of_the_host_of_their_directory() {
    let (mut from, keys) = (with_images(), tempfile::tempdir().unwrap());
    certificates(keys.path());
    let at = |name: &str| keys.path().join(name).display().to_string();
    let registry = registry(keys.path());
    // A name that is spoken to with TLS, and leads to the registry.
    let hosts = format!("[host.'https://{}']\n", registry.host());
    configure(&mut from, "team.invalid", &hosts);
    let dir = from.path("certs.d").join(registry.host());
    fs::create_dir_all(&dir).unwrap();
    fs::copy(at("ca.pem"), dir.join("ca.crt")).unwrap();
    let said = from.fails(&["push", "web", "team.invalid/web:1"]);
    assert!(is_for_want_of_a_certificate(&said), "{said}");
    fs::copy(at("client-ca.cert"), dir.join("client.cert")).unwrap();
    fs::copy(at("client-ca.key"), dir.join("client.key")).unwrap();
    from.ok(&["push", "web", "team.invalid/web:1"]);
    from.ok(&["pull", "team.invalid/web:1", "again"]);
}
