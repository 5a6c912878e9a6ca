//! The example documents: uploaded once into a collection of their own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use coordinator::ids::TenantId;
use rag_store::{Status, StoreClient};
use tokio::time::sleep;

use super::say;
use crate::operator::Operator;

const COLLECTION: &str = "Beispiele";
const KINDS: [&str; 6] = ["pdf", "docx", "odt", "html", "md", "txt"];

/// Uploads the documents of `folder` that the collection lacks, and waits until they can be asked about.
pub async fn upload(operator: &Operator, tenant: &TenantId, folder: &Path) -> Result<()> {
    let store = StoreClient::new(operator.transport.clone(), operator.control.clone());
    let found = store
        .collections(tenant)
        .await?
        .into_iter()
        .find(|c| c.name == COLLECTION);
    let collection = match found {
        Some(collection) => collection,
        None => store.create_collection(tenant, COLLECTION).await?,
    };
    let present = store.documents(tenant, collection.id).await?;
    let mut uploaded = 0;
    for path in documents(folder)? {
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        if present.iter().any(|d| d.name == name) {
            continue;
        }
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
    if uploaded == 0 {
        return Ok(());
    }
    say(&format!(
        "Uploaded {uploaded} example documents into the collection {COLLECTION}"
    ));
    loop {
        let documents = store.documents(tenant, collection.id).await?;
        let open = documents
            .iter()
            .filter(|d| matches!(d.status, Status::Queued | Status::Processing))
            .count();
        if open == 0 {
            for document in documents.iter().filter(|d| d.status == Status::Failed) {
                say(&format!(
                    "{}: {}",
                    document.name,
                    document.error.as_deref().unwrap_or("failed")
                ));
            }
            say("The example documents can be asked about");
            return Ok(());
        }
        sleep(Duration::from_millis(200)).await;
    }
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
