//! The example documents: uploaded once into a collection of their own.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use coordinator::ids::TenantId;
use rag_store::{CollectionId, Status, StoreClient};
use tokio::time::{Instant, sleep};

use super::{say, write_whole};
use crate::operator::Operator;

const COLLECTION: &str = "Beispiele";
/// The store answers again within seconds of a death; a minute covers a slow machine.
const ATTEMPTS: u32 = 12;
const RETRY_AFTER: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The examples take seconds to read; a bound against waiting for a store that will not.
const READ_WITHIN: Duration = Duration::from_secs(600);
const KINDS: [&str; 6] = ["pdf", "docx", "odt", "html", "md", "txt"];

/// Uploads the documents of `folder` that no start uploaded yet, by the names noted in the file `note`, and waits until
/// they can be asked about. The cluster works without them, so what goes wrong is said and tried again some times.
pub async fn upload(operator: &Operator, tenant: &TenantId, folder: &Path, note: &Path) {
    let store = StoreClient::new(operator.transport.clone(), operator.control.clone());
    for attempt in 1..=ATTEMPTS {
        match upload_missing(&store, tenant, folder, note).await {
            Ok(None) => return,
            Ok(Some(collection)) => return wait_until_read(&store, tenant, collection).await,
            Err(error) if attempt < ATTEMPTS => {
                say(&format!(
                    "The example documents cannot be uploaded: {error:#}; trying again in {} s",
                    RETRY_AFTER.as_secs()
                ));
                sleep(RETRY_AFTER).await;
            }
            Err(error) => say(&format!(
                "The example documents cannot be uploaded: {error:#}; the next start tries again"
            )),
        }
    }
}

/// The collection, when something was uploaded into it.
async fn upload_missing(
    store: &StoreClient,
    tenant: &TenantId,
    folder: &Path,
    note: &Path,
) -> Result<Option<CollectionId>> {
    let mut noted: BTreeSet<String> = std::fs::read_to_string(note)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect();
    let mut missing = documents(folder)?;
    missing.retain(|path| !noted.contains(&name_of(path)));
    if missing.is_empty() {
        say("The example documents were uploaded by an earlier start");
        return Ok(None);
    }
    let found = store.collections(tenant).await?;
    let collection = match found.into_iter().find(|c| c.name == COLLECTION) {
        Some(collection) => collection,
        None => store.create_collection(tenant, COLLECTION).await?,
    };
    let present = store.documents(tenant, collection.id).await?;
    let mut uploaded = 0;
    for path in missing {
        let name = name_of(&path);
        if !present.iter().any(|d| d.name == name) {
            let bytes =
                std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            store
                .upload(
                    tenant,
                    collection.id,
                    &name,
                    media_type(&path),
                    bytes.into(),
                )
                .await?;
            uploaded += 1;
        }
        noted.insert(name);
        let lines: String = noted.iter().map(|name| format!("{name}\n")).collect();
        write_whole(note, lines.as_bytes(), 0o600)?;
    }
    say(&format!(
        "Uploaded {uploaded} example documents into the collection {COLLECTION}"
    ));
    Ok((uploaded > 0).then_some(collection.id))
}

async fn wait_until_read(store: &StoreClient, tenant: &TenantId, collection: CollectionId) {
    let started = Instant::now();
    while started.elapsed() < READ_WITHIN {
        sleep(LOOK_EVERY).await;
        // A store that does not answer now does later.
        let Ok(documents) = store.documents(tenant, collection).await else {
            continue;
        };
        let open = |status| matches!(status, Status::Queued | Status::Processing);
        if documents.iter().any(|d| open(d.status)) {
            continue;
        }
        for document in documents.iter().filter(|d| d.status == Status::Failed) {
            let why = document.error.as_deref().unwrap_or("failed");
            say(&format!("{}: {why}", document.name));
        }
        say("The example documents can be asked about");
        return;
    }
    say("The example documents are still being read; the page shows when they are done");
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn documents(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("no examples in {}", folder.display()))?;
    let mut paths: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|p| kind(p).is_some())
        .collect();
    paths.sort();
    Ok(paths)
}

fn kind(path: &Path) -> Option<&'static str> {
    let ending = path.extension()?.to_str()?.to_ascii_lowercase();
    KINDS.into_iter().find(|k| *k == ending)
}

fn media_type(path: &Path) -> &'static str {
    match kind(path) {
        Some("pdf") => "application/pdf",
        Some("docx") => "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
        Some("odt") => "application/vnd.oasis.opendocument.text",
        Some("html") => "text/html",
        Some("md") => "text/markdown",
        _ => "text/plain",
    }
}
