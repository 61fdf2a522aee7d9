//! Makes messages, servers and clients of containerd's APIs from their descriptions, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = "src/proto";
    println!("cargo:rerun-if-changed={dir}");
    let files = [
        "snapshots.proto",
        "diff.proto",
        "content.proto",
        "leases.proto",
        "mount.proto",
        "descriptor.proto",
    ];
    // Tests need the other side of each, too.
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(protox::compile(files, [dir])?)?;
    Ok(())
}
