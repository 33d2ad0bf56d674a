//! The Backups service: decode, one call of the catalog, encode.

use std::sync::Arc;

use shardfs_proto::convert;
use shardfs_proto::types::VolumeId;
use shardfs_proto::wire::{self, backups_server::Backups};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use super::stream::{self, Answer};
use super::{Services, caller, panicked};

const VERIFY: &str = "Backups/VerifyBackup";
/// Items of a verification that wait to be sent; more wait in it, which then pauses.
const ITEMS_AHEAD: usize = 16;

/// The handlers.
pub struct BackupsService(Services);

impl BackupsService {
    pub(super) fn new(services: Services) -> BackupsService {
        BackupsService(services)
    }
}

#[tonic::async_trait]
impl Backups for BackupsService {
    async fn create_backup(
        &self,
        request: Request<wire::CreateBackupRequest>,
    ) -> Result<Response<wire::VolumeBackup>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let backup = self.0.catalog.create_backup(&VolumeId::new(r.volume_id)?).await?;
            Ok(convert::volume_backup_to_wire(&backup))
        };
        self.0.unary("Backups/CreateBackup", call).await
    }

    async fn list_backups(
        &self,
        request: Request<wire::ListBackupsRequest>,
    ) -> Result<Response<wire::ListBackupsReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let volume = if r.volume_id.is_empty() { None } else { Some(VolumeId::new(r.volume_id)?) };
            let backups = self.0.catalog.list_backups(volume.as_ref()).await?;
            Ok(wire::ListBackupsReply {
                backups: backups.iter().map(convert::volume_backup_to_wire).collect(),
            })
        };
        self.0.unary("Backups/ListBackups", call).await
    }

    async fn delete_backup(
        &self,
        request: Request<wire::DeleteBackupRequest>,
    ) -> Result<Response<wire::DeleteBackupReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            self.0.catalog.delete_backup(&r.backup_id).await?;
            Ok(wire::DeleteBackupReply {})
        };
        self.0.unary("Backups/DeleteBackup", call).await
    }

    async fn restore_backup(
        &self,
        request: Request<wire::RestoreBackupRequest>,
    ) -> Result<Response<wire::RestoreBackupReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let (backup, to) = convert::restore_from_wire(r)?;
            Ok(convert::restored_to_wire(&self.0.catalog.restore_backup(&backup, to).await?))
        };
        self.0.unary("Backups/RestoreBackup", call).await
    }

    type VerifyBackupStream = Answer<wire::VerifyBackupReply>;

    async fn verify_backup(
        &self,
        request: Request<wire::VerifyBackupRequest>,
    ) -> Result<Response<Self::VerifyBackupStream>, Status> {
        self.0
            .streaming(VERIFY, async |observation| {
                let (metadata, _, r) = request.into_parts();
                caller(&metadata)?;
                let (items, mut found) = mpsc::channel(ITEMS_AHEAD);
                let (sender, receiver) = mpsc::channel(ITEMS_AHEAD);
                let catalog = Arc::clone(&self.0.catalog);
                // It goes to its end by itself: what it has made goes also if the client has gone.
                let verifying = tokio::spawn(catalog.verify_backup(r.backup_id, r.quick, items));
                tokio::spawn(async move {
                    while let Some(item) = found.recv().await {
                        if sender.send(Ok(vec![convert::verify_item_to_wire(&item)])).await.is_err() {
                            break;
                        }
                    }
                    drop(found);
                    let outcome = verifying.await.unwrap_or_else(|_| Err(panicked(VERIFY)));
                    if let Err(error) = outcome {
                        // Nobody may be left to tell.
                        let _ = sender.send(Err(error)).await;
                    }
                });
                Ok(stream::fed(receiver, observation))
            })
            .await
    }

    async fn set_backup_schedule(
        &self,
        request: Request<wire::SetBackupScheduleRequest>,
    ) -> Result<Response<wire::SetBackupScheduleReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let volume = VolumeId::new(r.volume_id)?;
            self.0.catalog.set_backup_schedule(&volume, r.every_seconds, r.keep).await?;
            Ok(wire::SetBackupScheduleReply {})
        };
        self.0.unary("Backups/SetBackupSchedule", call).await
    }

    async fn list_backup_schedules(
        &self,
        request: Request<wire::ListBackupSchedulesRequest>,
    ) -> Result<Response<wire::ListBackupSchedulesReply>, Status> {
        let call = async {
            caller(request.metadata())?;
            let schedules = self.0.catalog.backup_schedules().await?;
            Ok(wire::ListBackupSchedulesReply {
                schedules: schedules.iter().map(convert::schedule_to_wire).collect(),
            })
        };
        self.0.unary("Backups/ListBackupSchedules", call).await
    }
}
