//! Registries that are not on this host: TLS, and --plain-http. They run in a network of their own, since loopback
//! addresses are spoken to without TLS.

use std::fs;

use crate::common::{VELLUM, shell};
use crate::registry_support::{clean, with_images};

/// An address that nobody has (RFC 5737).
const ADDRESS: &str = "192.0.2.1";

#[test]
fn a_registry_with_a_certificate_is_believed_where_its_root_is_known_and_plain_http_has_to_be_asked_for()
 {
    let store = with_images();
    shell(
        store.dir.path(),
        &format!(
            "new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2'
             openssl req -x509 $new -subj /CN=root -addext basicConstraints=critical,CA:TRUE \
                 -keyout ca.key -out ca.pem 2>/dev/null
             openssl req -x509 $new -subj /CN=registry -addext subjectAltName=IP:{ADDRESS} -CA ca.pem -CAkey ca.key \
                 -addext basicConstraints=critical,CA:FALSE -keyout key.pem -out cert.pem 2>/dev/null"
        ),
    );
    for (name, port, tls) in [
        ("tls", 5443, ", tls: {certificate: cert.pem, key: key.pem}"),
        ("plain", 5080, ""),
    ] {
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: data-{name}}}}}\n\
             http: {{addr: '{ADDRESS}:{port}'{tls}}}\n"
        );
        fs::write(store.path(&format!("{name}.yml")), config).unwrap();
    }
    let script = r#"
        ip link set lo up; ip addr add ADDRESS/32 dev lo
        unset AWS_CA_BUNDLE
        docker-registry serve tls.yml >/dev/null 2>&1 & one=$!
        docker-registry serve plain.yml >/dev/null 2>&1 & two=$!
        trap 'kill $one $two' EXIT
        for port in 5443 5080; do
            tries=0
            until curl -sk -o /dev/null https://ADDRESS:$port/v2/ || curl -s -o /dev/null http://ADDRESS:$port/v2/; do
                tries=$((tries + 1)); test $tries -lt 300
                sleep 0.1
            done
        done
        vellum() { VELLUM --root ROOT "$@"; }
        ! vellum push web ADDRESS:5443/web:1 2>unknown
        mkdir -p home/.config/docker/certs.d/ADDRESS:5443
        cp ca.pem home/.config/docker/certs.d/ADDRESS:5443/ca.crt
        vellum push web ADDRESS:5443/web:1
        vellum pull ADDRESS:5443/web:1 by-own-root
        rm -r home/.config
        SSL_CERT_FILE=$PWD/ca.pem vellum pull ADDRESS:5443/web:1 by-file
        ! vellum push web ADDRESS:5080/web:1 2>plain
        vellum push web ADDRESS:5080/web:1 --plain-http
        vellum run --rm --plain-http ADDRESS:5080/web:1 -- /bin/sh -c 'cat /etc/web' > said
    "#;
    let script = script
        .replace("ADDRESS", ADDRESS)
        .replace("VELLUM", VELLUM)
        .replace("ROOT", &store.root.display().to_string());
    fs::write(store.path("script"), script).unwrap();
    shell(
        store.dir.path(),
        "mkdir home; HOME=$PWD/home DOCKER_CONFIG=$PWD/home unshare -n sh -eu script",
    );
    let read = |name: &str| fs::read_to_string(store.path(name)).unwrap();
    assert!(
        read("unknown").contains("certificate"),
        "{}",
        read("unknown")
    );
    assert!(read("plain").contains("--plain-http"), "{}", read("plain"));
    assert_eq!(read("said"), "web\n");
    clean(&store);
}
