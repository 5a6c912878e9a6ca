//! The web page, built from `gateway/ui` and carried in the binary.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use rust_embed::RustEmbed;

use crate::error::ApiError;
use crate::http::layers::is_data;

#[derive(RustEmbed)]
#[folder = "ui/dist"]
struct Dist;

/// Shown when the binary was built before the page.
const NO_PAGE: &str = "<!doctype html><html lang=\"de\"><meta charset=\"utf-8\"><title>Verbund</title>\
    <h1>Verbund</h1><p>Diese Programmdatei wurde ohne die Weboberfläche gebaut. Bauen Sie sie mit <code>make</code>; \
    die Schnittstellen unter <code>/v1</code> und <code>/api</code> stehen zur Verfügung (<a href=\"/openapi.json\">Beschreibung</a>).</p>";

/// Everything that is no API: a file of the page, or the page itself for its own addresses.
pub async fn serve(request: Request) -> Response {
    let path = request.uri().path();
    if is_data(path) {
        let message = format!(
            "no such route: {} {path}; /openapi.json describes all",
            request.method()
        );
        return ApiError::no_route(message).into_response();
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return ApiError::method_not_allowed("expected GET for the page").into_response();
    }
    let name = path.trim_start_matches('/');
    let name = if name.is_empty() { "index.html" } else { name };
    if let Some(response) = file(name, request.headers()) {
        return response;
    }
    // A missing script must fail as such; an address of the page's own is the page.
    if name != "index.html"
        && name
            .rsplit('/')
            .next()
            .is_some_and(|last| last.contains('.'))
    {
        return (StatusCode::NOT_FOUND, "not found").into_response();
    }
    file("index.html", request.headers()).unwrap_or_else(|| Html(NO_PAGE).into_response())
}

fn file(name: &str, asked: &HeaderMap) -> Option<Response> {
    let file = Dist::get(name)?;
    let hash = file.metadata.sha256_hash();
    let tag = format!(
        "\"{}\"",
        hash[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    );
    let known = asked
        .get(header::IF_NONE_MATCH)
        .is_some_and(|given| given.as_bytes() == tag.as_bytes());
    let mut response = if known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        let mut response = Response::new(axum::body::Body::from(file.data.into_owned()));
        let media_type = content_type(file.metadata.mimetype());
        if let Ok(value) = HeaderValue::from_str(&media_type) {
            response.headers_mut().insert(header::CONTENT_TYPE, value);
        }
        response
    };
    // Names under assets/ hold a hash of their content; all others may change with the next version.
    let caching = if name.starts_with("assets/") {
        "public, max-age=31536000, immutable"
    } else {
        "no-cache"
    };
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static(caching));
    if let Ok(value) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(header::ETAG, value);
    }
    Some(response)
}

/// Text of the page is UTF-8, and says so.
fn content_type(media_type: &str) -> String {
    let is_text = media_type.starts_with("text/")
        || matches!(media_type, "application/javascript" | "application/json");
    if is_text {
        format!("{media_type}; charset=utf-8")
    } else {
        media_type.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    async fn get(path: &str) -> Response {
        serve(Request::builder().uri(path).body(Body::empty()).unwrap()).await
    }

    #[tokio::test]
    async fn an_unknown_api_path_is_an_error_object_and_an_unknown_page_is_the_page() {
        for path in ["/v1/nothing", "/api/", "/api/nothing"] {
            let response = get(path).await;
            assert_eq!(response.status(), StatusCode::NOT_FOUND, "{path}");
            let body = axum::body::to_bytes(response.into_body(), 10_000)
                .await
                .unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["error"]["code"], "unknown_url");
        }
        for path in ["/", "/dokumente", "/a/b"] {
            let response = get(path).await;
            assert_eq!(response.status(), StatusCode::OK, "{path}");
            assert!(
                response.headers()[header::CONTENT_TYPE]
                    .to_str()
                    .unwrap()
                    .starts_with("text/html"),
                "{path}"
            );
        }
    }

    #[tokio::test]
    async fn a_missing_file_is_404_and_no_path_leaves_the_page() {
        for path in [
            "/assets/gone.js",
            "/../Cargo.toml",
            "/..%2fCargo.toml",
            "/src/page.rs",
        ] {
            assert_eq!(get(path).await.status(), StatusCode::NOT_FOUND, "{path}");
        }
    }
}
