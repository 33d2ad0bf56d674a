//! How an etcd is reached: the flags beside `--meta` that commands share.

use std::path::{Path, PathBuf};

use shardfs_node::cluster::connect::MetaSettings;

/// The flags; the command has `--meta` itself.
#[derive(clap::Args, Clone, Debug)]
pub struct MetaFlags {
    /// Who signed the certificates of etcds://, in PEM [default: whom this machine trusts]
    #[arg(long, value_name = "FILE", requires = "meta")]
    meta_ca_file: Option<PathBuf>,
    /// Certificate to show to etcds://, in PEM; needs --meta-key-file
    #[arg(long, value_name = "FILE", requires = "meta")]
    meta_cert_file: Option<PathBuf>,
    /// Key of --meta-cert-file, in PEM
    #[arg(long, value_name = "FILE", requires = "meta")]
    meta_key_file: Option<PathBuf>,
    /// User of etcd; its password is in --meta-password-file or in SHARDFS_META_PASSWORD
    #[arg(long, value_name = "NAME", requires = "meta")]
    meta_user: Option<String>,
    /// File with the password of --meta-user
    #[arg(long, value_name = "FILE", requires = "meta")]
    meta_password_file: Option<PathBuf>,
}

impl MetaFlags {
    /// The settings for an address. Paths become absolute: who uses them may have another working directory.
    pub fn settings(&self, address: &str) -> std::io::Result<MetaSettings> {
        let absolute = |path: &Option<PathBuf>| path.as_deref().map(std::path::absolute::<&Path>).transpose();
        Ok(MetaSettings {
            address: address.to_owned(),
            ca_file: absolute(&self.meta_ca_file)?,
            cert_file: absolute(&self.meta_cert_file)?,
            key_file: absolute(&self.meta_key_file)?,
            user: self.meta_user.clone(),
            password_file: absolute(&self.meta_password_file)?,
        })
    }
}
