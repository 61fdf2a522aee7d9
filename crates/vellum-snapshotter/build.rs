//! Makes the server's side of the snapshots API from its description, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = "src/proto";
    println!("cargo:rerun-if-changed={dir}");
    let files = protox::compile(["snapshots.proto", "mount.proto"], [dir])?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_transport(false)
        .compile_fds(files)?;
    Ok(())
}
