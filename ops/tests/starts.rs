//! What `verbund up` does with what it finds: example documents, a folder of models without an embedder.

mod cluster;

use cluster::{Cluster, examples};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn examples_are_uploaded_once_and_a_deleted_one_stays_deleted() {
    let folder = examples().display().to_string();
    let more = ["--examples", folder.as_str()];
    let mut cluster = Cluster::start_with(1, &more, &[]).await;
    cluster
        .has_said("The example documents can be asked about")
        .await;
    let (collection, before) = example_documents_in(&cluster).await;
    assert!(before.len() >= 6, "{before:?}");

    let (id, name) = &before[0];
    let (code, body) = cluster.delete(&format!("/api/documents/{id}")).await;
    assert!((200..300).contains(&code), "delete {name}: {code} {body}");

    assert!(cluster.stop().success(), "verbund up ends cleanly");
    let again = cluster.start_again(1, &more).await;
    again
        .has_said("The example documents were uploaded by an earlier start")
        .await;
    let (same, after) = example_documents_in(&again).await;
    assert_eq!(same, collection);
    assert_eq!(after, before[1..], "all but {name}");
}

/// The collection of the examples, and id and name of its documents by name.
async fn example_documents_in(cluster: &Cluster) -> (String, Vec<(String, String)>) {
    let (code, all) = cluster.get("/api/collections").await;
    assert_eq!(code, 200, "{all}");
    let collection = all["data"]
        .as_array()
        .and_then(|all| all.iter().find(|c| c["name"] == "Beispiele"))
        .unwrap_or_else(|| panic!("no collection of examples in {all}"));
    let id = collection["id"].as_str().expect("id").to_owned();
    let (code, list) = cluster
        .get(&format!("/api/collections/{id}/documents"))
        .await;
    assert_eq!(code, 200, "{list}");
    let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
    let mut documents: Vec<_> = list["data"]
        .as_array()
        .expect("documents")
        .iter()
        .map(|d| (text(&d["id"]), text(&d["name"])))
        .collect();
    documents.sort_by(|a, b| a.1.cmp(&b.1));
    (id, documents)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_embedding_model_the_cluster_is_ready_and_chats() {
    let all = std::env::var("VERBUND_MODELS").expect("VERBUND_MODELS; run with `ops/setup env`");
    let models = tempfile::tempdir().expect("directory");
    let name = "SmolLM2-135M-Instruct.Q4_1.gguf";
    std::os::unix::fs::symlink(
        std::path::Path::new(&all).join(name),
        models.path().join(name),
    )
    .expect("link");
    let models = models.path().display().to_string();
    let cluster = Cluster::start_with(1, &[], &[("VERBUND_MODELS", &models)]).await;
    cluster.has_said("Page and API").await;
    assert!(
        cluster.said().contains("No embedding model at"),
        "{}",
        cluster.said()
    );
    let request = json!({
        "model": "SmolLM2-135M-Instruct", "max_tokens": 4, "temperature": 0,
        "messages": [{"role": "user", "content": "Hallo"}],
    });
    let (code, body) = cluster.post("/v1/chat/completions", request).await;
    assert_eq!(code, 200, "{body}");
}
