//! How an etcd is reached: its members, TLS, user and password. Data only; nothing is opened here but the files
//! with certificates, keys and the password, and those anew for every connection, so that they may be replaced
//! while a node runs.
//!
//! A password is never part of an address or of a setting: it is in a file or in the environment.

use std::fmt;
use std::path::{Path, PathBuf};

use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::cluster::store::{StoreError, StoreResult};

/// Members that one address may name: an etcd has three to seven.
const MEMBERS_MAX: usize = 15;
/// The password of the etcd user, if no file has it.
pub const PASSWORD_VARIABLE: &str = "SHARDFS_META_PASSWORD";

/// How a certificate begins in PEM.
const PEM_CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----";

/// How an etcd is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EtcdSettings {
    /// `HOST:PORT` of each member that is known.
    pub members: Vec<String>,
    /// Absent: without TLS.
    pub tls: Option<TlsFiles>,
    /// Absent: without a user.
    pub user: Option<User>,
}

/// Files in PEM.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TlsFiles {
    /// Who must have signed the members' certificates; absent: whom this machine trusts.
    pub ca: Option<PathBuf>,
    /// The certificate that this side shows, and its key.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// A user of etcd.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct User {
    /// Its name.
    pub name: String,
    /// The file with its password; absent: [`PASSWORD_VARIABLE`] has it.
    pub password_file: Option<PathBuf>,
}

/// Text that is shown to nobody.
pub(super) struct Secret(pub(super) String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Takes `HOST:PORT[,HOST:PORT...]` apart.
pub fn parse_members(list: &str) -> Result<Vec<String>, String> {
    let list = list.trim_end_matches('/');
    let members: Vec<String> = list.split(',').map(str::to_owned).collect();
    if members.len() > MEMBERS_MAX {
        return Err(format!("{} members; {MEMBERS_MAX} are enough to find an etcd", members.len()));
    }
    for (i, member) in members.iter().enumerate() {
        if member.contains('@') {
            return Err("an address holds no user and no password: give the user by --meta-user, and the password in a \
                 file (--meta-password-file) or in SHARDFS_META_PASSWORD"
                .into());
        }
        let parts = member.rsplit_once(':');
        // Only an IPv6 address in brackets has more colons.
        let host_fits = |host: &str| {
            !host.is_empty()
                && !host.contains(['/', '?', '#', ' '])
                && (!host.contains(':') || host.starts_with('['))
        };
        match parts {
            Some((host, port)) if host_fits(host) && port.parse::<u16>().is_ok_and(|p| p != 0) => {}
            _ => {
                return Err(format!(
                    "{member:?} is no HOST:PORT; an etcd is named as etcd://HOST:PORT[,HOST:PORT...], each member once"
                ));
            }
        }
        if members[..i].contains(member) {
            return Err(format!("{member} is named twice"));
        }
    }
    Ok(members)
}

impl EtcdSettings {
    /// The address as it was given.
    pub fn address(&self) -> String {
        let scheme = if self.tls.is_some() { "etcds" } else { "etcd" };
        format!("{scheme}://{}", self.members.join(","))
    }

    /// Reads all files once, so that what is wrong with them is said before anything is started.
    pub fn check_files(&self) -> StoreResult<()> {
        if let Some(files) = &self.tls {
            let tls = tls_config(files)?;
            // A certificate that cannot be used is refused here.
            tonic::transport::Endpoint::from_static("https://localhost").tls_config(tls).map_err(|e| {
                StoreError::Invalid(format!(
                    "the certificates for etcd: {}",
                    crate::cluster::retry::chain(&e)
                ))
            })?;
        }
        self.credentials().map(drop)
    }

    /// What TLS is made with now.
    pub(super) fn tls(&self) -> StoreResult<Option<ClientTlsConfig>> {
        self.tls.as_ref().map(tls_config).transpose()
    }

    /// The user and the password that it has now.
    pub(super) fn credentials(&self) -> StoreResult<Option<(String, Secret)>> {
        let Some(user) = &self.user else { return Ok(None) };
        let password = match &user.password_file {
            Some(path) => {
                let bytes = read(path, "--meta-password-file")?;
                String::from_utf8(bytes).map_err(|_| {
                    StoreError::Invalid(format!("--meta-password-file {}: it is not UTF-8", path.display()))
                })?
            }
            None => std::env::var(PASSWORD_VARIABLE).map_err(|_| {
                StoreError::Invalid(format!(
                    "the etcd user {} has no password: name a file that holds it with --meta-password-file, or set \
                     {PASSWORD_VARIABLE}",
                    user.name
                ))
            })?,
        };
        let password = password.trim_end_matches(['\n', '\r']).to_owned();
        Ok(Some((user.name.clone(), Secret(password))))
    }
}

fn tls_config(files: &TlsFiles) -> StoreResult<ClientTlsConfig> {
    let mut tls = ClientTlsConfig::new();
    tls = match &files.ca {
        Some(ca) => {
            let pem = read(ca, "--meta-ca-file")?;
            // TLS would take it for a list of nobody.
            if !pem.windows(PEM_CERTIFICATE.len()).any(|window| window == PEM_CERTIFICATE) {
                return Err(StoreError::Invalid(format!(
                    "--meta-ca-file {}: there is no certificate in PEM in it",
                    ca.display()
                )));
            }
            tls.ca_certificate(Certificate::from_pem(pem))
        }
        None => tls.with_native_roots(),
    };
    if let Some((certificate, key)) = &files.client {
        let identity =
            Identity::from_pem(read(certificate, "--meta-cert-file")?, read(key, "--meta-key-file")?);
        tls = tls.identity(identity);
    }
    Ok(tls)
}

fn read(path: &Path, flag: &str) -> StoreResult<Vec<u8>> {
    std::fs::read(path).map_err(|e| StoreError::Invalid(format!("{flag} {}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_taken_apart() {
        assert_eq!(parse_members("a:1").unwrap(), ["a:1"]);
        assert_eq!(parse_members("a:1,10.0.0.1:2379,[::1]:3/").unwrap(), ["a:1", "10.0.0.1:2379", "[::1]:3"]);
        for bad in
            ["", "a", "a:", ":1", "a:0", "a:70000", "a:1,", "a:1,a:1", "::1:2379", "a:1/x", "http://a:1"]
        {
            assert!(parse_members(bad).is_err(), "{bad:?}");
        }
        let secret = parse_members("root:geheim@a:1").unwrap_err();
        assert!(secret.contains("--meta-password-file") && !secret.contains("geheim"), "{secret}");
    }

    #[test]
    fn passwords_come_from_files_and_are_not_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "geheim\n").unwrap();
        let user = User { name: "u".into(), password_file: Some(file.path().to_owned()) };
        let settings = EtcdSettings { members: vec!["a:1".into()], tls: None, user: Some(user) };
        let (name, secret) = settings.credentials().unwrap().unwrap();
        assert_eq!((name.as_str(), secret.0.as_str()), ("u", "geheim"));
        assert!(!format!("{settings:?}{secret:?}").contains("geheim"));
        let user = User { name: "u".into(), password_file: Some("/nonexistent".into()) };
        let error = EtcdSettings { user: Some(user), ..settings }.check_files().unwrap_err().to_string();
        assert!(error.contains("--meta-password-file /nonexistent"), "{error}");
    }
}
