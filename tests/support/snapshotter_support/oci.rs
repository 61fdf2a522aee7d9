//! Images as archives, made by hand.

use serde_json::{Value, json};

use super::content::digest;

/// An archive of an OCI image with these layers, plain tars.
pub fn archive_of(name: &str, layers: &[Vec<u8>], command: &[&str]) -> Vec<u8> {
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": { "Cmd": command, "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| digest(layer)).collect::<Vec<_>>() },
    });
    let config = serde_json::to_vec(&config).unwrap();
    let described = |kind: &str, bytes: &[u8]| -> Value {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": digest(bytes),
            "size": bytes.len(),
        })
    };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": described("config.v1+json", &config),
        "layers": layers.iter().map(|l| described("layer.v1.tar", l)).collect::<Vec<_>>(),
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let mut entry = described("manifest.v1+json", &manifest);
    entry["annotations"] = json!({ "io.containerd.image.name": name });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    let index = serde_json::to_vec(&index).unwrap();
    let blob = |bytes: &[u8]| format!("blobs/{}", digest(bytes).replace(':', "/"));
    let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
    let layers: Vec<(String, &Vec<u8>)> = layers.iter().map(|l| (blob(l), l)).collect();
    let (config_name, manifest_name) = (blob(&config), blob(&manifest));
    let mut files: Vec<(&str, &[u8], u32)> = vec![
        ("oci-layout", layout, 0o644),
        ("index.json", &index, 0o644),
        (&config_name, &config, 0o644),
        (&manifest_name, &manifest, 0o644),
    ];
    files.extend(
        layers
            .iter()
            .map(|(name, layer)| (&**name, &layer[..], 0o644)),
    );
    tar_of(&files)
}

/// A plain tar of files with their modes.
pub fn tar_of(files: &[(&str, &[u8], u32)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, bytes, mode) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(*mode);
        header.set_mtime(1_600_000_000);
        tar.append_data(&mut header, path, *bytes).unwrap();
    }
    tar.into_inner().unwrap()
}
