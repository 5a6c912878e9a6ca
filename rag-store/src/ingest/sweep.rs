//! Removes what is left over: parts and chunks of deleted collections, and uploads that were never finished.

use std::time::Duration;

use coordinator::clock;

use crate::node::group::{Group, Refusal};
use crate::store::reader::Reader;
use crate::store::{Command, Stage};

/// Documents swept in one command: their removal is some writes each.
const AT_ONCE: usize = 100;
/// An upload takes seconds; one that began so long ago was given up by its client.
const UPLOAD_LIMIT_MS: u64 = 60 * 60 * 1000;
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Sweeps until dropped.
pub async fn run(group: &Group) {
    loop {
        if let Err(refusal) = once(group).await {
            tracing::debug!(?refusal, "sweeping is put off");
        }
        tokio::select! {
            () = group.machine.garbage.notified() => {}
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    }
}

async fn once(group: &Group) -> Result<(), Refusal> {
    let view = group.fresh_view().await?;
    let reader = Reader::new(&view, &group.root);
    for tenant in reader.tenants()? {
        for documents in reader.garbage(&tenant)?.chunks(AT_ONCE) {
            group
                .change(
                    &tenant,
                    Command::Sweep {
                        documents: documents.to_vec(),
                    },
                )
                .await?;
        }
        for (document, record) in reader.unfinished(&tenant)? {
            let age_ms = clock::now_ms().saturating_sub(record.created_ms);
            if record.stage == Stage::Uploading && age_ms > UPLOAD_LIMIT_MS {
                group
                    .change(&tenant, Command::DeleteDocument { document })
                    .await?;
            }
        }
    }
    Ok(())
}
