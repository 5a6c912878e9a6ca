//! `/v1/models`, and finding the model that a request names.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use worker::client::{ModelCard, ModelKind};

use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::http::auth::Caller;
use crate::http::body::Id;

/// All models of the cluster.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    pub object: &'static str,
    pub data: Vec<Model>,
}

/// A model that the cluster offers.
#[derive(Debug, Serialize, ToSchema)]
pub struct Model {
    #[schema(example = "smollm2-135m-instruct")]
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// Seconds since the Unix epoch; 0, because a deployment has no date.
    pub created: u64,
    pub owned_by: &'static str,
    /// `generate` (chat and completions) or `embed` (embeddings). Ours.
    pub kind: &'static str,
    /// Tokens that prompt and answer share. Ours.
    pub context_tokens: u32,
    /// Whether it answers now. Ours.
    pub ready: bool,
}

impl From<ModelCard> for Model {
    fn from(card: ModelCard) -> Self {
        Self {
            id: card.id,
            object: "model",
            created: 0,
            owned_by: "verbund",
            kind: match card.kind {
                ModelKind::Generate => "generate",
                ModelKind::Embed => "embed",
            },
            context_tokens: card.context_tokens,
            ready: card.ready,
        }
    }
}

/// The models that this cluster offers.
#[utoipa::path(
    get, path = "/v1/models", tag = "openai",
    responses((status = 200, body = ModelList), (status = 401, description = "No valid key", body = ErrorBody))
)]
pub async fn list(State(app): State<App>, _: Caller) -> Json<ModelList> {
    Json(ModelList {
        object: "list",
        data: app
            .inference
            .models()
            .into_iter()
            .map(Model::from)
            .collect(),
    })
}

/// One model.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "openai", params(("id" = String, Path, description = "Id of a model")),
    responses(
        (status = 200, body = Model),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such model", body = ErrorBody)
    )
)]
pub async fn get(State(app): State<App>, _: Caller, Id(id): Id) -> Result<Json<Model>, ApiError> {
    let mut models = app.inference.models();
    match models.iter().position(|model| model.id == id) {
        Some(at) => Ok(Json(models.swap_remove(at).into())),
        None => Err(unknown(&id, &models)),
    }
}

/// The model that a request names, when it does what the request wants.
pub fn find(models: Vec<ModelCard>, id: &str, kind: ModelKind) -> Result<ModelCard, ApiError> {
    let Some(model) = models.iter().find(|model| model.id == id) else {
        let fitting: Vec<ModelCard> = models
            .into_iter()
            .filter(|model| model.kind == kind)
            .collect();
        return Err(unknown(id, &fitting));
    };
    if model.kind == kind {
        return Ok(model.clone());
    }
    let fitting: Vec<&str> = models
        .iter()
        .filter(|model| model.kind == kind)
        .map(|model| model.id.as_str())
        .collect();
    let (is, wanted) = match kind {
        ModelKind::Generate => ("makes embeddings", "writes text"),
        ModelKind::Embed => ("writes text", "makes embeddings"),
    };
    let message = format!(
        "model: expected one that {wanted} ({}), got {id:?}, which {is}",
        fitting.join(", ")
    );
    Err(ApiError::invalid("model", message))
}

fn unknown(id: &str, models: &[ModelCard]) -> ApiError {
    let known: Vec<String> = models.iter().map(|model| model.id.clone()).collect();
    ApiError::model_not_found(id, &known)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn models() -> Vec<ModelCard> {
        let card = |id: &str, kind| ModelCard {
            id: id.into(),
            kind,
            context_tokens: 512,
            ready: true,
        };
        vec![
            card("smollm2", ModelKind::Generate),
            card("e5", ModelKind::Embed),
        ]
    }

    #[test]
    fn a_model_is_found_by_its_id_and_kind() {
        assert_eq!(
            find(models(), "smollm2", ModelKind::Generate).unwrap().id,
            "smollm2"
        );
        assert_eq!(find(models(), "e5", ModelKind::Embed).unwrap().id, "e5");
    }

    #[test]
    fn an_unknown_model_is_404_and_names_those_that_would_do() {
        let error = find(models(), "gpt-4", ModelKind::Generate).unwrap_err();
        assert_eq!(
            (error.status().as_u16(), error.code()),
            (404, "model_not_found")
        );
        assert!(
            error.message().ends_with("has: smollm2"),
            "{}",
            error.message()
        );
    }

    #[test]
    fn a_model_of_the_other_kind_is_400_and_names_those_that_would_do() {
        let error = find(models(), "e5", ModelKind::Generate).unwrap_err();
        assert_eq!(
            (error.status().as_u16(), error.param()),
            (400, Some("model"))
        );
        assert!(
            error.message().contains("writes text (smollm2)"),
            "{}",
            error.message()
        );
    }
}
