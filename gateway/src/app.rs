//! What every route holds: the three clients below the gateway, its configuration and its numbers.

use std::sync::Arc;

use coordinator::control::ControlHandle;
use rag_store::StoreClient;
use tokio::sync::Semaphore;
use worker::client::InferenceClient;

use crate::config::GatewayConfig;
use crate::health::Readiness;

/// Shared state of all routes; cheap to clone.
#[derive(Clone)]
pub struct App {
    pub control: ControlHandle,
    pub inference: InferenceClient,
    pub store: StoreClient,
    pub config: Arc<GatewayConfig>,
    /// Bounds the memory that uploads hold.
    pub uploads: Arc<Semaphore>,
    pub readiness: Arc<Readiness>,
}

impl App {
    /// The state of a gateway with these clients.
    pub fn new(
        mut config: GatewayConfig,
        control: ControlHandle,
        inference: InferenceClient,
        store: StoreClient,
    ) -> Self {
        // More than the store takes would be refused there, after it was sent in vain.
        config.max_upload_bytes = config
            .max_upload_bytes
            .min(rag_store::client::MAX_UPLOAD_BYTES);
        let uploads = Arc::new(Semaphore::new(config.max_uploads.max(1)));
        Self {
            control,
            inference,
            store,
            config: Arc::new(config),
            uploads,
            readiness: Arc::default(),
        }
    }
}
