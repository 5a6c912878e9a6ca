//! A gateway over HTTP with a real coordinator behind it, some with a store, all without workers: keys, tenants, errors,
//! limits, uploads.

mod site;

use futures::StreamExt;
use serde_json::{Value, json};

use site::Site;

#[tokio::test(flavor = "multi_thread")]
async fn a_key_says_who_it_is_and_what_it_may() {
    let site = Site::start().await;
    let (status, me) = site.get("/api/me", &site.operator).await;
    assert_eq!(status, 200, "{me}");
    assert_eq!(
        (&me["tenant"], &me["name"], &me["key"]),
        (
            &json!("musterstadt"),
            &json!("Stadt Musterstadt"),
            &json!("Betrieb")
        )
    );
    assert_eq!(
        (&me["admin"], &me["operator"]),
        (&json!(true), &json!(true))
    );
    let (_, me) = site.get("/api/me", &site.neighbour).await;
    assert_eq!(
        (&me["admin"], &me["operator"]),
        (&json!(true), &json!(false))
    );

    for path in [
        "/api/tenants",
        "/api/tenants/musterstadt/keys",
        "/api/status",
    ] {
        assert_eq!(
            site.get(path, &site.clerk).await.0,
            403,
            "{path} with an ordinary key"
        );
    }
    let (status, state) = site.get("/api/status", &site.operator).await;
    assert_eq!(
        (status, &state["nodes"][0]["name"]),
        (200, &json!("one")),
        "{state}"
    );
    assert_eq!(site.get("/api/status", &site.neighbour).await.0, 403);

    let ids = |list: &Value| -> Vec<String> {
        list["data"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|t| t["id"].as_str().expect("id").to_owned())
            .collect()
    };
    assert_eq!(
        ids(&site.get("/api/tenants", &site.operator).await.1),
        ["musterstadt", "nachbarort"]
    );
    assert_eq!(
        ids(&site.get("/api/tenants", &site.neighbour).await.1),
        ["nachbarort"]
    );
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_made_used_and_revoked() {
    let site = Site::start().await;
    let path = "/api/tenants/nachbarort/keys";
    let (status, made) = site
        .post(path, &site.neighbour, &json!({"name": "Fachverfahren"}))
        .await;
    assert_eq!((status, &made["admin"]), (201, &json!(false)), "{made}");
    let secret = made["secret"].as_str().expect("the key itself");
    let (status, me) = site.get("/api/me", secret).await;
    assert_eq!((status, &me["key"]), (200, &json!("Fachverfahren")), "{me}");

    let (_, listed) = site.get(path, &site.neighbour).await;
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(2), "{listed}");
    assert!(
        !listed.to_string().contains(secret),
        "a secret is shown once only"
    );

    let id = made["id"].as_str().expect("id");
    let (status, gone) = site
        .send(site.request("DELETE", &format!("{path}/{id}"), &site.neighbour))
        .await;
    assert_eq!((status, &gone["deleted"]), (200, &json!(true)), "{gone}");
    assert_eq!(site.get("/api/me", secret).await.0, 401);
    let (status, again) = site
        .send(site.request("DELETE", &format!("{path}/{id}"), &site.neighbour))
        .await;
    assert_eq!(status, 404, "{again}");

    let (_, me) = site.get("/api/me", &site.neighbour).await;
    let own = format!("{path}/{}", me["key_id"].as_str().expect("id"));
    assert_eq!(
        site.send(site.request("DELETE", &own, &site.neighbour))
            .await
            .0,
        400,
        "nobody locks himself out"
    );
    site.stop().await;
}

/// The gateway has its copy of the control state from a coordinator; what it has acknowledged itself it must show at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_tenants_keys_can_be_made_and_used_in_the_next_request() {
    let site = Site::start().await;
    for i in 0..30 {
        let id = format!("ort-{i}");
        let new = json!({"id": id, "name": id});
        let (status, made) = site.post("/api/tenants", &site.operator, &new).await;
        assert_eq!(status, 201, "{made}");
        let keys = format!("/api/tenants/{id}/keys");
        let new = json!({"name": "Fachverfahren"});
        let (status, made) = site.post(&keys, &site.operator, &new).await;
        assert_eq!(status, 201, "{made}");
        let secret = made["secret"].as_str().expect("the key itself");
        let (status, me) = site.get("/api/me", secret).await;
        assert_eq!((status, &me["tenant"]), (200, &json!(id)), "{me}");
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_things_look_as_things_that_do_not_exist() {
    let site = Site::start().await;
    let other = site
        .get("/api/tenants/musterstadt/keys", &site.neighbour)
        .await;
    let unknown = site
        .get("/api/tenants/unbekannt/keys", &site.neighbour)
        .await;
    assert_eq!((other.0, unknown.0), (404, 404));
    let body = |value: &Value| {
        value
            .to_string()
            .replace("musterstadt", "ID")
            .replace("unbekannt", "ID")
    };
    assert_eq!(body(&other.1), body(&unknown.1));
    let (status, refused) = site
        .post(
            "/api/tenants",
            &site.neighbour,
            &json!({"id": "neu", "name": "Neu"}),
        )
        .await;
    assert_eq!(status, 403, "{refused}");
    for (id, status) in [("neu", 201), ("neu", 409), ("Neu!", 400)] {
        let (got, body) = site
            .post(
                "/api/tenants",
                &site.operator,
                &json!({"id": id, "name": "Neu"}),
            )
            .await;
        assert_eq!(got, status, "{id}: {body}");
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_is_openais_error_object() {
    let site = Site::start().await;
    let hello = json!([{"role": "user", "content": "Hallo"}]);
    let bare = |method: &str, path: &str| {
        site.http.request(
            method.parse().expect("a method"),
            format!("{}{path}", site.base),
        )
    };
    let chat = "/v1/chat/completions";
    let cases = [
        (bare("GET", "/v1/models"), 401, "invalid_api_key"),
        (
            bare("GET", "/v1/models").header("authorization", "Basic dTpw"),
            401,
            "invalid_api_key",
        ),
        (
            site.request("GET", "/v1/models", "vb-falsch"),
            401,
            "invalid_api_key",
        ),
        (
            site.request("GET", "/v1/nothing", &site.clerk),
            404,
            "unknown_url",
        ),
        (
            site.request("POST", "/api/", &site.clerk),
            404,
            "unknown_url",
        ),
        (
            site.request("DELETE", "/v1/models", &site.clerk),
            405,
            "method_not_allowed",
        ),
        (
            site.request("POST", chat, &site.clerk).body("{\"model\": "),
            400,
            "invalid_json",
        ),
        (
            site.request("POST", chat, &site.clerk)
                .json(&json!({"model": "m"})),
            400,
            "missing_required_parameter",
        ),
        (
            site.request("POST", chat, &site.clerk)
                .json(&json!({"model": "gpt-4", "messages": hello})),
            404,
            "model_not_found",
        ),
        (
            site.request("GET", "/v1/models/gpt%2F4", &site.clerk),
            404,
            "model_not_found",
        ),
        (
            site.request("GET", "/api/collections/nonsense", &site.clerk),
            404,
            "not_found",
        ),
        (
            site.request("GET", "/api/documents/%ff", &site.clerk),
            400,
            "invalid_value",
        ),
        (
            site.request("POST", "/api/retrieve", &site.clerk)
                .json(&json!({"query": ""})),
            400,
            "invalid_value",
        ),
        // Written out by size: 9 MiB are over the limit of a JSON body.
        (
            site.request("POST", chat, &site.clerk)
                .body(vec![b' '; 9 << 20]),
            413,
            "too_large",
        ),
    ];
    for (request, status, code) in cases {
        let described = format!("{request:?}");
        let (got, body) = site.send(request).await;
        let error = &body["error"];
        assert_eq!(
            (got, &error["code"]),
            (status, &json!(code)),
            "{described}: {body}"
        );
        assert!(
            error["message"].as_str().is_some_and(|m| m.len() > 10) && error["type"].is_string(),
            "{body}"
        );
        assert!(error.get("param").is_some(), "{body}");
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_over_the_limit_is_refused_with_an_answer_that_the_client_gets_to_read() {
    let site = Site::start().await;
    let part = reqwest::multipart::Part::bytes(vec![b'%'; 60 << 20]).file_name("riesig.pdf");
    let form = reqwest::multipart::Form::new().part("file", part);
    let path = format!("/api/collections/col_{}/documents", "0".repeat(32));
    let (status, body) = site
        .send(site.request("POST", &path, &site.clerk).multipart(form))
        .await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (413, &json!("too_large")),
        "{body}"
    );
    assert!(
        body["error"]["message"]
            .as_str()
            .is_some_and(|m| m.contains("50 MiB")),
        "{body}"
    );
    site.stop().await;
}

async fn collection(site: &Site) -> String {
    let (status, made) = site
        .post("/api/collections", &site.clerk, &json!({"name": "Akten"}))
        .await;
    assert_eq!(status, 201, "{made}");
    made["id"].as_str().expect("id").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_of_every_allowed_size_are_kept_byte_by_byte() {
    let site = Site::with_store().await;
    let path = format!("/api/collections/{}/documents", collection(&site).await);
    for size in [1_usize, (2 << 20) + 1, 5 << 20] {
        let content: Vec<u8> = (0..size).map(|i| ((i * 31) >> 7) as u8).collect();
        let part = reqwest::multipart::Part::bytes(content.clone()).file_name("Akte.pdf");
        let form = reqwest::multipart::Form::new().part("file", part);
        let (status, made) = site
            .send(site.request("POST", &path, &site.clerk).multipart(form))
            .await;
        assert_eq!(
            (status, &made["bytes"]),
            (201, &json!(size)),
            "{size} bytes: {made}"
        );
        let original = format!(
            "/api/documents/{}/original",
            made["id"].as_str().expect("id")
        );
        let response = site
            .request("GET", &original, &site.clerk)
            .send()
            .await
            .expect("an answer");
        let bytes = response.bytes().await.expect("the file");
        assert!(bytes == content, "{size} bytes went, {} came", bytes.len());
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_over_the_limit_without_a_declared_length_is_refused_readably() {
    let site = Site::with_store().await;
    let path = format!("/api/collections/{}/documents", collection(&site).await);
    let piece = bytes::Bytes::from(vec![b'%'; 1 << 20]);
    let pieces = futures::stream::iter(std::iter::repeat_n(piece, 60)).map(Ok::<_, std::io::Error>);
    let part = reqwest::multipart::Part::stream(reqwest::Body::wrap_stream(pieces))
        .file_name("riesig.pdf");
    let form = reqwest::multipart::Form::new().part("file", part);
    let request = site.request("POST", &path, &site.clerk).multipart(form);
    let (status, body) = site.send(request).await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (413, &json!("too_large")),
        "{body}"
    );
    let (status, listed) = site.get(&path, &site.clerk).await;
    assert_eq!((status, &listed["data"]), (200, &json!([])), "{listed}");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operation_routes_answer_without_a_key_and_say_what_is_missing() {
    let site = Site::start().await;
    let get = |path: &str| site.http.get(format!("{}{path}", site.base));
    assert_eq!(
        site.send(get("/health")).await,
        (200, json!({"status": "ok"}))
    );
    let (status, ready) = site.send(get("/ready")).await;
    assert_eq!((status, &ready["ready"]), (503, &json!(false)), "{ready}");
    assert_eq!(
        ready["reasons"],
        json!([
            "no chat model has a group yet",
            "the store has no group yet",
            "the store does not answer"
        ]),
        "nothing of tenants, models and nodes"
    );
    let (status, state) = site.get("/api/status", &site.operator).await;
    let problems = state["problems"].to_string();
    assert_eq!(status, 200);
    assert!(
        problems.contains("the store does not answer: no answer within"),
        "{problems}"
    );

    assert_eq!(
        site.get("/v1/models", &site.clerk).await.1,
        json!({"object": "list", "data": []})
    );
    let (status, text) = site.send(get("/metrics")).await;
    let text = text.as_str().expect("text").to_owned();
    assert_eq!(status, 200);
    assert!(
        text.contains("verbund_http_requests_total{code=\"200\",route=\"/v1/models\"}"),
        "{text}"
    );
    let proxied = get("/metrics").header("x-forwarded-for", "192.0.2.1");
    assert_eq!(
        site.send(proxied).await.0,
        401,
        "from another machine a key is needed"
    );

    let (status, description) = site.send(get("/openapi.json")).await;
    assert_eq!((status, description["openapi"].is_string()), (200, true));
    site.stop().await;
}
