//! The route table, and the description that is made from it.

use axum::Router;
use axum::extract::Request;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi as _};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::error::ApiError;
use crate::http::layers;
use crate::openai::{chat, completions, embeddings, models};
use crate::{api, health, page};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Verbund",
        description = "Chat, documents and administration of a Verbund cluster. Routes under /v1 follow OpenAI's API; every error \
            is OpenAI's error object. Each request belongs to the tenant of its key; another tenant's id answers as an unknown one."
    ),
    tags(
        (name = "openai", description = "As OpenAI defines it"),
        (name = "knowledge", description = "Collections, documents, retrieval"),
        (name = "account", description = "The key that asks"),
        (name = "administration", description = "For admin keys"),
        (name = "operation", description = "For monitoring")
    ),
    security(("api_key" = [])),
    modifiers(&BearerKey)
)]
struct Description;

struct BearerKey;

impl Modify for BearerKey {
    fn modify(&self, openapi: &mut OpenApi) {
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some("An API key of a tenant"))
            .build();
        openapi
            .components
            .get_or_insert_default()
            .add_security_scheme("api_key", SecurityScheme::Http(scheme));
    }
}

fn described() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(models::list))
        .routes(routes!(models::get))
        .routes(routes!(chat::complete))
        .routes(routes!(completions::complete))
        .routes(routes!(embeddings::create))
        .routes(routes!(api::me::get))
        .routes(routes!(api::collections::list, api::collections::create))
        .routes(routes!(api::collections::get, api::collections::delete))
        .routes(routes!(api::documents::list, api::documents::upload))
        .routes(routes!(api::documents::get, api::documents::delete))
        .routes(routes!(api::documents::chunks))
        .routes(routes!(api::documents::original))
        .routes(routes!(api::retrieve::retrieve))
        .routes(routes!(api::tenants::list, api::tenants::create))
        .routes(routes!(api::tenants::keys, api::tenants::create_key))
        .routes(routes!(api::tenants::revoke_key))
        .routes(routes!(api::status::get))
        .routes(routes!(health::health))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
}

/// The OpenAPI description of all routes.
pub fn openapi() -> OpenApi {
    described().into_openapi()
}

/// All routes with everything around them.
pub fn router(app: App) -> Router {
    let (routes, description) = described().split_for_parts();
    let description = description.to_json().unwrap_or_else(|_| "{}".to_owned());
    routes
        .route(
            "/openapi.json",
            get(move || std::future::ready(serve_description(description))),
        )
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(page::serve)
        .with_state(app)
        .layer(CatchPanicLayer::custom(layers::panicked))
        .layer(axum::middleware::from_fn(layers::follow))
}

fn serve_description(description: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], description).into_response()
}

async fn method_not_allowed(request: Request) -> ApiError {
    ApiError::method_not_allowed(format!(
        "{} is not offered here; /openapi.json says which methods are",
        request.method()
    ))
}

#[cfg(test)]
#[path = "router_tests.rs"]
mod tests;
