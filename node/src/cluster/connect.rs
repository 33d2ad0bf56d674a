//! From an address and its settings to a metadata store: the one place where the kind of store is chosen.
//!
//! | address | store |
//! |---|---|
//! | `http://HOST:PORT`, `unix:/PATH` | the embedded one |
//! | `etcd://HOST:PORT[,HOST:PORT...]` | an etcd |
//! | `etcds://HOST:PORT[,HOST:PORT...]` | the same over TLS |

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::embedded::EmbeddedStore;
use super::etcd::EtcdStore;
use super::etcd::settings::{EtcdSettings, TlsFiles, User, parse_members};
use super::store::MetaStore;
use crate::net::ListenAddr;

/// How long questions about an etcd itself are repeated: people wait for the answer.
const QUESTIONS_RETRY_MAX: Duration = Duration::from_secs(2);

/// Where the metadata store is, and how it is reached; as given, not yet checked.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MetaSettings {
    /// The address, in one of the forms above.
    pub address: String,
    /// `--meta-ca-file`: who signed the members' certificates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// `--meta-cert-file`: the certificate that is shown to etcd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cert_file: Option<PathBuf>,
    /// `--meta-key-file`: the key of that certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// `--meta-user`: the user of etcd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// `--meta-password-file`: the file with its password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
}

enum Kind {
    Embedded,
    Etcd(EtcdSettings),
}

impl MetaSettings {
    /// An address without further settings.
    pub fn of(address: impl Into<String>) -> MetaSettings {
        MetaSettings { address: address.into(), ..MetaSettings::default() }
    }

    /// Whether the address names an etcd.
    pub fn is_etcd(&self) -> bool {
        self.address.starts_with("etcd://") || self.address.starts_with("etcds://")
    }

    /// Checks everything that can be checked without a connection.
    pub fn check(&self) -> Result<()> {
        match self.kind()? {
            Kind::Embedded => Ok(()),
            Kind::Etcd(settings) => Ok(settings.check_files()?),
        }
    }

    /// A client of the store. No I/O but for reading the files that are named.
    pub fn connect(&self) -> Result<Arc<dyn MetaStore>> {
        Ok(match self.kind()? {
            Kind::Embedded => Arc::new(EmbeddedStore::new(&self.address)?),
            Kind::Etcd(settings) => {
                settings.check_files()?;
                Arc::new(EtcdStore::new(settings))
            }
        })
    }

    /// A client of the etcd, for questions about itself, with less patience than that of a node; `None`: the address names
    /// no etcd.
    pub fn etcd(&self) -> Result<Option<EtcdStore>> {
        Ok(match self.kind()? {
            Kind::Embedded => None,
            Kind::Etcd(settings) => {
                settings.check_files()?;
                Some(EtcdStore::with_retry(settings, QUESTIONS_RETRY_MAX))
            }
        })
    }

    fn kind(&self) -> Result<Kind> {
        let (tls, members) =
            match (self.address.strip_prefix("etcd://"), self.address.strip_prefix("etcds://")) {
                (Some(members), _) => (false, members),
                (_, Some(members)) => (true, members),
                (None, None) => {
                    self.refuse(&self.etcd_flags(), "an etcd (etcd://HOST:PORT or etcds://HOST:PORT)")?;
                    if self.address.starts_with("http://") {
                        return Ok(Kind::Embedded);
                    }
                    ListenAddr::from_str(&self.address).map_err(|_| {
                    anyhow::anyhow!(
                        "{:?} is no metadata store: give http://HOST:PORT or unix:/PATH for an embedded one, \
                         etcd://HOST:PORT[,HOST:PORT...] for an etcd, etcds://... for one with TLS",
                        self.address
                    )
                })?;
                    return Ok(Kind::Embedded);
                }
            };
        let members = parse_members(members).map_err(anyhow::Error::msg)?;
        let tls = if tls {
            let client = match (&self.cert_file, &self.key_file) {
                (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
                (None, None) => None,
                (Some(_), None) => bail!("--meta-cert-file needs --meta-key-file"),
                (None, Some(_)) => bail!("--meta-key-file needs --meta-cert-file"),
            };
            Some(TlsFiles { ca: self.ca_file.clone(), client })
        } else {
            // Else a typing error would switch TLS off.
            self.refuse(&self.tls_flags(), "TLS: write etcds:// instead of etcd://")?;
            None
        };
        let user = match &self.user {
            Some(name) if name.is_empty() => bail!("--meta-user is empty"),
            Some(name) => Some(User { name: name.clone(), password_file: self.password_file.clone() }),
            None if self.password_file.is_some() => bail!("--meta-password-file needs --meta-user"),
            None => None,
        };
        Ok(Kind::Etcd(EtcdSettings { members, tls, user }))
    }

    fn tls_flags(&self) -> [(&'static str, bool); 3] {
        [
            ("--meta-ca-file", self.ca_file.is_some()),
            ("--meta-cert-file", self.cert_file.is_some()),
            ("--meta-key-file", self.key_file.is_some()),
        ]
    }

    fn etcd_flags(&self) -> Vec<(&'static str, bool)> {
        let user =
            [("--meta-user", self.user.is_some()), ("--meta-password-file", self.password_file.is_some())];
        self.tls_flags().into_iter().chain(user).collect()
    }

    fn refuse(&self, flags: &[(&str, bool)], purpose: &str) -> Result<()> {
        match flags.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(anyhow::anyhow!("{flag} is for {purpose}"))
                .with_context(|| format!("the metadata store is {}", self.address)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(settings: &MetaSettings) -> String {
        format!("{:#}", settings.check().expect_err(&settings.address))
    }

    #[tokio::test]
    async fn addresses_choose_the_kind() {
        for good in ["http://meta.example:7500", "unix:/run/meta.sock", "etcd://a:2379,b:2379,[::1]:2379"] {
            let settings = MetaSettings::of(good);
            settings.check().unwrap();
            assert!(!settings.connect().unwrap().reachable());
            assert_eq!(settings.is_etcd(), good.starts_with("etcd"));
        }
        for bad in ["", "ftp:x", "etcd:/a:1", "etcd://", "etcd://a", "etcds://a:1,", "https://a:1"] {
            let said = wrong(&MetaSettings::of(bad));
            assert!(said.contains("etcd://HOST:PORT"), "{bad}: {said}");
        }
    }

    #[test]
    fn settings_that_do_not_fit_are_refused() {
        let file = || Some(PathBuf::from("/nonexistent"));
        let etcd = MetaSettings::of("etcd://a:1");
        let etcds = MetaSettings::of("etcds://a:1");
        let embedded = MetaSettings::of("unix:/m");
        for (settings, expected) in [
            (MetaSettings { ca_file: file(), ..etcd.clone() }, "write etcds://"),
            (MetaSettings { user: Some("u".into()), ..embedded.clone() }, "--meta-user is for an etcd"),
            (MetaSettings { cert_file: file(), ..etcds.clone() }, "needs --meta-key-file"),
            (MetaSettings { ca_file: file(), ..etcds.clone() }, "--meta-ca-file /nonexistent"),
            (MetaSettings { password_file: file(), ..etcd.clone() }, "needs --meta-user"),
            (MetaSettings { user: Some("u".into()), password_file: file(), ..etcd.clone() }, "/nonexistent"),
            (MetaSettings::of("etcd://u:p@a:1"), "--meta-password-file"),
        ] {
            let said = wrong(&settings);
            assert!(said.contains(expected), "{said}");
        }
    }

    #[test]
    fn stored_settings_are_short() {
        let settings = MetaSettings::of("etcd://a:1");
        assert_eq!(serde_json::to_string(&settings).unwrap(), r#"{"address":"etcd://a:1"}"#);
    }
}
