//! What a tenant does with documents, and what bad input gets.

use super::cluster::*;
use super::*;
use crate::client::MAX_UPLOAD_BYTES;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_uploaded_document_becomes_ready_and_is_found_down_to_its_passage_on_every_replica() {
    let cluster = Cluster::start().await;
    let owner = tenant("musterstadt");
    let collection = cluster.collection(&owner, "Satzungen").await;
    let exists = cluster
        .client
        .create_collection(&owner, " Satzungen ")
        .await;
    assert_eq!(
        exists,
        Err(Error::Exists {
            what: "collection \"Satzungen\"".into()
        })
    );

    let document = cluster
        .upload(&owner, collection, "ordner/hundesteuer.md", DOG_TAX)
        .await;
    assert_eq!(
        (document.name.as_str(), document.bytes),
        ("hundesteuer.md", DOG_TAX.len() as u64)
    );
    assert_eq!((document.progress, &document.error), (1.0, &None));
    let parking = cluster
        .upload(&owner, collection, "parken.md", PARKING)
        .await;

    let hits = cluster
        .search(&owner, "Wie hoch ist die Hundesteuer für den ersten Hund?")
        .await;
    assert_eq!(hits[0].document_id, document.id);
    assert!(
        hits[0]
            .text
            .expose()
            .contains("für den ersten Hund 96 Euro")
    );
    assert!(
        DOG_TAX.contains(hits[0].text.expose().lines().last().unwrap()),
        "the passage is literal"
    );
    assert!(hits[0].heading.contains("§ 5 Steuersatz"));
    assert_eq!(
        cluster.search(&owner, "Parkausweis für Bewohner").await[0].document_id,
        parking.id
    );

    let chunks = ask(async || cluster.client.chunks(&owner, document.id).await).await;
    assert_eq!(chunks.len(), document.chunks as usize);
    let (about, original) = ask(async || cluster.client.original(&owner, document.id).await).await;
    assert_eq!(
        (about, original.as_ref()),
        (document.clone(), DOG_TAX.as_bytes())
    );
    assert_eq!(
        ask(async || cluster.client.documents(&owner, collection).await).await,
        [document.clone(), parking]
    );
    assert_eq!(
        ask(async || cluster.client.collections(&owner).await).await[0].documents,
        2
    );

    for running in cluster.nodes.values() {
        let group = running.node.group(GROUP).unwrap();
        group.fresh_view().await.unwrap();
        group.machine.follower.caught_up().await;
        let arms = group
            .machine
            .follower
            .indexes()
            .search(&owner, "Rettungshunde", None, None, 3)
            .unwrap();
        assert_eq!(
            arms.text[0].0.document, document.id,
            "on node {}",
            group.node
        );
        assert!(running.node.ready());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_tenants_ids_answer_exactly_as_unknown_ones_on_every_method() {
    let cluster = Cluster::start().await;
    let (owner, stranger) = (tenant("musterstadt"), tenant("musterstadt-2"));
    let collection = cluster.collection(&owner, "Akten").await;
    let document = cluster.upload(&owner, collection, "a.md", DOG_TAX).await;
    // Names are per tenant.
    let own = cluster.collection(&stranger, "Akten").await;
    cluster.upload(&stranger, own, "b.md", PARKING).await;
    assert_eq!(
        ask(async || cluster.client.collections(&stranger).await)
            .await
            .len(),
        1
    );

    let client = &cluster.client;
    for (c, d) in [
        (collection, document.id),
        (CollectionId::generate(), DocumentId::generate()),
    ] {
        let answers = [
            client.collection(&stranger, c).await.err(),
            client.delete_collection(&stranger, c).await.err(),
            client
                .upload(&stranger, c, "x.txt", "", Bytes::from_static(b"x"))
                .await
                .err(),
            client.documents(&stranger, c).await.err(),
            client.document(&stranger, d).await.err(),
            client.delete_document(&stranger, d).await.err(),
            client.original(&stranger, d).await.err(),
            client.chunks(&stranger, d).await.err(),
            client
                .retrieve(&stranger, question("Hund", &[c]))
                .await
                .err(),
            client
                .retrieve(&stranger, question("Hund", &[own, c]))
                .await
                .err(),
        ];
        for (method, answer) in answers.iter().enumerate() {
            assert_eq!(answer, &Some(Error::NotFound), "method {method} with {c}");
        }
    }
    let hits = cluster.search(&stranger, "Hundesteuer erster Hund").await;
    assert!(hits.iter().all(|hit| hit.document == "b.md"));
    assert_eq!(
        ask(async || cluster.client.document(&owner, document.id).await).await,
        document
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_model_delays_documents_and_neither_fails_them_nor_holds_up_deletion() {
    let cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = cluster.collection(&owner, "Akten").await;
    cluster.embedder.ready.store(false, Ordering::SeqCst);
    let one = cluster.queue(&owner, collection, "a.md", DOG_TAX).await;
    let two = cluster.queue(&owner, collection, "b.md", PARKING).await;
    assert!(matches!(one.status, Status::Queued | Status::Processing));
    cluster.status(&owner, one.id, Status::Processing).await;
    cluster.delete(&owner, one.id).await;
    assert_eq!(
        cluster.client.document(&owner, one.id).await,
        Err(Error::NotFound)
    );
    assert_eq!(cluster.search(&owner, "Hund").await, []);
    cluster.embedder.ready.store(true, Ordering::SeqCst);
    cluster.status(&owner, two.id, Status::Ready).await;
    assert_eq!(
        ask(async || cluster.client.documents(&owner, collection).await)
            .await
            .len(),
        1
    );
    ask(
        async || match cluster.client.delete_collection(&owner, collection).await {
            Err(Error::NotFound) => Ok(()),
            other => other,
        },
    )
    .await;
    assert_eq!(
        cluster.client.document(&owner, two.id).await,
        Err(Error::NotFound)
    );
    assert_eq!(cluster.search(&owner, "Parken").await, []);
    let group = cluster.nodes[&cluster.leader().await]
        .node
        .group(GROUP)
        .unwrap();
    eventually("sweeping", async || {
        let view = group.fresh_view().await.ok()?;
        let left = view.scan_prefix(&keys::originals(&owner, two.id)).next();
        left.is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_uploads_and_questions_get_a_typed_error_and_unreadable_files_a_german_reason() {
    let cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = cluster.collection(&owner, "Akten").await;
    let upload = async |name: &str, bytes: Vec<u8>| {
        cluster
            .client
            .upload(&owner, collection, name, "", bytes.into())
            .await
    };

    let got = 100 * 1024 * 1024;
    assert_eq!(
        upload("gross.pdf", vec![0; got]).await,
        Err(Error::TooLarge {
            limit: MAX_UPLOAD_BYTES,
            got: got as u64
        })
    );
    assert!(matches!(
        upload("leer.pdf", vec![]).await,
        Err(Error::Invalid { .. })
    ));
    assert!(matches!(
        upload("", b"x".to_vec()).await,
        Err(Error::Invalid { .. })
    ));
    assert!(matches!(
        cluster.client.create_collection(&owner, "  ").await,
        Err(Error::Invalid { .. })
    ));
    assert!(matches!(
        cluster
            .client
            .create_collection(&owner, &"x".repeat(201))
            .await,
        Err(Error::Invalid { .. })
    ));
    for (query, top_k) in [("", 5), ("Hund", 0), ("Hund", 101)] {
        let request = RetrieveRequest {
            top_k,
            ..question(query, &[])
        };
        assert!(
            matches!(
                cluster.client.retrieve(&owner, request).await,
                Err(Error::Invalid { .. })
            ),
            "{query:?} {top_k}"
        );
    }
    assert!(matches!(
        cluster
            .client
            .retrieve(&owner, question(&"x".repeat(40_000), &[]))
            .await,
        Err(Error::Invalid { .. })
    ));
    for (name, bytes) in [
        ("kaputt.pdf", b"%PDF-1.7 nichts".to_vec()),
        ("kaputt.docx", b"PK\x03\x04 nichts".to_vec()),
    ] {
        let document = ask(async || upload(name, bytes.clone()).await).await;
        let failed = cluster.status(&owner, document.id, Status::Failed).await;
        let reason = failed.error.expect("a failed document says why");
        assert!(reason.contains("Bitte"), "{name}: {reason}");
        assert_eq!(
            ask(async || cluster.client.original(&owner, document.id).await)
                .await
                .1
                .as_ref(),
            bytes
        );
        assert_eq!(
            ask(async || cluster.client.chunks(&owner, document.id).await).await,
            []
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_original_and_many_chunks_travel_in_parts_and_come_back_whole() {
    let cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = cluster.collection(&owner, "Akten").await;
    let mut text = String::new();
    for section in 1..=1500 {
        text.push_str(&format!(
            "# § {section} Vorschrift {section}\n\n{}\n\n",
            "Die Gemeinde regelt dies durch Satzung. ".repeat(40)
        ));
    }
    assert!(text.len() > 2 * crate::store::PART_BYTES, "several parts");
    let document = cluster
        .upload(&owner, collection, "gross.md", text.clone())
        .await;
    assert!(document.chunks >= 1500);
    let (_, original) = ask(async || cluster.client.original(&owner, document.id).await).await;
    assert!(original.as_ref() == text.as_bytes());
    let chunks = ask(async || cluster.client.chunks(&owner, document.id).await).await;
    assert!(
        chunks
            .iter()
            .enumerate()
            .all(|(at, chunk)| chunk.ordinal as usize == at)
    );
    assert_eq!(chunks.len(), document.chunks as usize);
    let hits = cluster.search(&owner, "Was steht in § 777?").await;
    assert!(
        hits.iter().any(|hit| hit.heading.contains("§ 777 ")),
        "section numbers are found"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heading_line_of_megabytes_does_not_keep_a_document_from_being_read() {
    let cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = cluster.collection(&owner, "Akten").await;
    let text = format!(
        "# {}\n\n{PARKING}",
        "Verwaltungsgebührensatzung ".repeat(120_000)
    );
    assert!(text.len() > 3_000_000);
    let document = cluster.upload(&owner, collection, "x.md", text).await;
    assert!(document.chunks > 1_000);
    let chunks = ask(async || cluster.client.chunks(&owner, document.id).await).await;
    assert_eq!(chunks.len(), document.chunks as usize);
    let hits = cluster.search(&owner, "Bewohnerparkausweise").await;
    assert!(hits[0].text.expose().contains("30,70 Euro"));
}
