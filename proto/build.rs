//! Generates the wire types and the gRPC clients and servers from idl/.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    tonic_prost_build::configure()
        .bytes(".")
        .file_descriptor_set_path(out.join("shardfs_descriptor.bin"))
        .compile_protos(
            &[
                "idl/shardfs/v1/common.proto",
                "idl/shardfs/v1/storage.proto",
                "idl/shardfs/v1/files.proto",
                "idl/shardfs/v1/admin.proto",
                "idl/shardfs/v1/backups.proto",
                "idl/shardfs/meta/v1/meta.proto",
            ],
            &["idl"],
        )?;
    Ok(())
}
