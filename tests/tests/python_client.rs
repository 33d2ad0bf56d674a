//! A Python client made from the .proto files alone does every Storage call.
//!
//! Needs grpcio from PyPI; the virtual environment is kept beside the build and made anew when
//! requirements.txt changes.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use shardfs_tests::cluster::bin_dir;
use shardfs_tests::{Cluster, Shell};

#[test]
fn every_storage_call_from_python() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("python");
    let idl = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto/idl");
    let cluster = Cluster::shared();
    let venv = bin_dir().join("../test-python");
    let stubs = cluster.scratch("stubs");
    fs::create_dir_all(&venv).unwrap();
    let shell = Shell::new(&here)
        .with("VENV", &venv)
        .with("STUBS", &stubs)
        .with("IDL", &idl)
        .with("ADDRESSES", cluster.tcp_addresses().join(" "))
        .deadline_seconds(600);
    shell.run(
        r#"if ! cmp -s requirements.txt "$VENV/made-from"; then
               rm -rf "$VENV"
               python3 -m venv "$VENV"
               "$VENV/bin/pip" install --quiet --disable-pip-version-check -r requirements.txt
               cp requirements.txt "$VENV/made-from"
           fi"#,
    );
    shell.run(
        r#""$VENV/bin/python" -m grpc_tools.protoc -I "$IDL" --python_out="$STUBS" --grpc_python_out="$STUBS" \
              shardfs/v1/common.proto shardfs/v1/storage.proto shardfs/v1/files.proto shardfs/v1/admin.proto"#,
    );
    let said = shell.run("\"$VENV/bin/python\" client.py \"$STUBS\" $ADDRESSES");
    println!("{said}");
    assert!(said.trim_end().starts_with("ok ") && said.trim_end().ends_with(" checks"), "{said}");
}
