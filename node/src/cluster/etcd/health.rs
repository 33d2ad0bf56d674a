//! What an etcd says of itself, for people: no decision is made from it.

use std::time::Duration;

use etcd_client::{AlarmAction, AlarmType, MaintenanceClient};
use futures::future::join_all;

use super::pool::Connection;
use super::settings::EtcdSettings;
use super::{EtcdStore, READ_TIMEOUT, errors};
use crate::cluster::store::{StoreError, StoreResult};

/// How an etcd is, as one of its members says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Health {
    /// The member that answered.
    pub member: String,
    /// The etcd to which it belongs, by etcd's own number: the same for all of its members.
    pub etcd_id: u64,
    /// Its version.
    pub version: String,
    /// Bytes of its database, which its quota limits.
    pub db_bytes: u64,
    /// It has refused changes since its quota was used up, until an operator disarms it. `None`: this user may not ask.
    pub out_of_space: Option<bool>,
}

impl EtcdStore {
    /// Asks the member that this client is connected to.
    pub async fn health(&self) -> StoreResult<Health> {
        self.repeat(true, READ_TIMEOUT, |connection| async move { ask(&connection).await }).await
    }

    /// Asks every member that the address names, all at once, each for itself and once; in their order. A member
    /// that has no majority with it does not answer.
    pub async fn members(&self) -> Vec<(String, StoreResult<Health>)> {
        let settings = self.pool.settings();
        let asked = settings.members.iter().map(|member| async move {
            let alone = EtcdSettings { members: vec![member.clone()], ..settings.clone() };
            (member.clone(), EtcdStore::with_retry(alone, Duration::ZERO).health().await)
        });
        join_all(asked).await
    }
}

async fn ask(connection: &Connection) -> StoreResult<Health> {
    let mut client: MaintenanceClient = connection.maintenance();
    let status = client.status().await.map_err(errors::error)?.0;
    let alarms = tokio::time::timeout(ALARMS_WAIT_MAX, client.alarm(AlarmAction::Get, AlarmType::None, None));
    let out_of_space = match alarms.await {
        Ok(Ok(answer)) => {
            let nospace = AlarmType::Nospace as i32;
            Some(answer.0.alarms.iter().any(|member| member.alarm == nospace))
        }
        Ok(Err(_)) | Err(_) => None,
    };
    Ok(Health {
        member: connection.member().to_owned(),
        etcd_id: connection.etcd_id(),
        version: status.version,
        db_bytes: u64::try_from(status.db_size)
            .map_err(|_| StoreError::Failed("a negative size of the database".into()))?,
        out_of_space,
    })
}

/// Users who may not ask are answered at once; a member that has other troubles is not waited for.
const ALARMS_WAIT_MAX: Duration = Duration::from_secs(1);
