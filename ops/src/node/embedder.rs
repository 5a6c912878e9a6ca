//! Lets the store ask the cluster's own embedding model.

use coordinator::Redacted;
use coordinator::ids::TenantId;
use futures::future::BoxFuture;
use rag_store::{EmbedKind, Embedder};
use worker::client::{self, EmbedRequest, InferenceClient};

pub struct Inference(pub InferenceClient);

impl Embedder for Inference {
    fn embed(
        &self,
        tenant: &TenantId,
        kind: EmbedKind,
        texts: Vec<Redacted<String>>,
    ) -> BoxFuture<'static, Result<Vec<Vec<f32>>, String>> {
        let client = self.0.clone();
        let kind = match kind {
            EmbedKind::Query => client::EmbedKind::Query,
            EmbedKind::Passage => client::EmbedKind::Passage,
        };
        let request = EmbedRequest {
            tenant: tenant.clone(),
            model: None,
            input: texts,
            kind,
        };
        Box::pin(async move {
            client
                .embed(request)
                .await
                .map(|e| e.vectors)
                .map_err(|e| e.to_string())
        })
    }
}
