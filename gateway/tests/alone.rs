//! A gateway over HTTP that reaches no coordinator: it says so, and what needs no cluster works.

use std::time::Duration;

use coordinator::control::ControlHandle;
use coordinator::identity::Ca;
use coordinator::ids::NodeId;
use coordinator::transport::Transport;
use gateway::{Gateway, GatewayConfig};
use rag_store::StoreClient;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use worker::client::InferenceClient;

const PATIENCE: Duration = Duration::from_secs(20);

struct Site {
    base: String,
    http: reqwest::Client,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<()>,
}

impl Site {
    async fn start() -> Site {
        let ca = Ca::create("test").expect("CA");
        let identity = ca.issue(NodeId(1), "one").expect("identity");
        let transport =
            Transport::bind(&identity, "127.0.0.1:0".parse().expect("address")).expect("transport");
        let control = ControlHandle::connect(transport.clone(), Vec::new());
        let config = GatewayConfig {
            listen: "127.0.0.1:0".parse().expect("address"),
            drain_s: 5,
            ..GatewayConfig::default()
        };
        let gateway = Gateway::bind(config).await.expect("a free port");
        let base = format!("http://{}", gateway.local_addr());
        let inference = InferenceClient::new(transport.clone(), control.clone());
        let store = StoreClient::new(transport, control.clone());
        let stop = CancellationToken::new();
        let served = tokio::spawn(gateway.run(control, inference, store, stop.clone()));
        let http = reqwest::Client::builder()
            .timeout(PATIENCE)
            .build()
            .expect("client");
        Site {
            base,
            http,
            stop,
            served,
        }
    }

    fn get(&self, path: &str) -> reqwest::RequestBuilder {
        self.http.get(format!("{}{path}", self.base))
    }

    async fn stop(self) {
        self.stop.cancel();
        self.served.await.expect("the gateway ends");
    }
}

async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.send().await.expect("an answer");
    let status = response.status().as_u16();
    let text = response.text().await.expect("a body");
    (
        status,
        serde_json::from_str(&text).unwrap_or(Value::String(text)),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_knows_no_key_yet_says_try_again_and_not_wrong_key() {
    let site = Site::start().await;
    let response = site
        .get("/v1/models")
        .bearer_auth("vb-1")
        .send()
        .await
        .expect("an answer");
    assert_eq!(response.status().as_u16(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let body: Value = response.json().await.expect("JSON");
    assert_eq!(body["error"]["code"], "cluster_unknown", "{body}");

    let (status, body) = answer(site.get("/v1/models")).await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (401, &json!("invalid_api_key")),
        "{body}"
    );
    let (status, body) = answer(site.get("/ready")).await;
    assert_eq!((status, &body["ready"]), (503, &json!(false)), "{body}");
    assert!(
        body["reasons"][0]
            .as_str()
            .is_some_and(|why| why.contains("coordinator")),
        "{body}"
    );
    assert_eq!(
        answer(site.get("/health")).await,
        (200, json!({"status": "ok"}))
    );
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_an_error_object_under_the_apis_and_the_page_elsewhere() {
    let site = Site::start().await;
    for (method, path, status, code) in [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/api/", 404, "unknown_url"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/", 405, "method_not_allowed"),
    ] {
        let request = site.http.request(
            method.parse().expect("a method"),
            format!("{}{path}", site.base),
        );
        let (got, body) = answer(request).await;
        assert_eq!(
            (got, &body["error"]["code"]),
            (status, &json!(code)),
            "{method} {path}: {body}"
        );
    }
    for path in ["/", "/dokumente"] {
        let page = site.get(path).send().await.expect("an answer");
        assert_eq!(page.status().as_u16(), 200, "{path}");
        let policy = page.headers()["content-security-policy"]
            .to_str()
            .expect("text")
            .to_owned();
        assert!(
            policy.contains("script-src 'self'") && !policy.contains("unsafe"),
            "{policy}"
        );
        assert!(page.text().await.expect("text").contains("<html"), "{path}");
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_carry_an_id_and_forbid_caching_and_framing() {
    let site = Site::start().await;
    let response = site
        .get("/api/me")
        .header("x-request-id", "abc-1")
        .send()
        .await
        .expect("an answer");
    let header = |name: &str| {
        response
            .headers()
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned()
    };
    assert_eq!(header("x-request-id"), "abc-1");
    assert_eq!(header("cache-control"), "no-store");
    assert_eq!(header("x-content-type-options"), "nosniff");
    assert_eq!(header("www-authenticate"), "Bearer");
    assert!(header("content-security-policy").contains("frame-ancestors 'none'"));
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_for_this_machine_and_name_routes_by_their_pattern() {
    let site = Site::start().await;
    answer(site.get("/api/documents/doc_geheim")).await;
    let (status, text) = answer(site.get("/metrics")).await;
    let text = text.as_str().expect("text").to_owned();
    assert_eq!(status, 200);
    assert!(
        text.contains("verbund_http_requests_total{code=\"401\",route=\"/api/documents/{id}\"}"),
        "{text}"
    );
    assert!(!text.contains("geheim"), "{text}");
    let (status, _) = answer(site.get("/metrics").header("x-forwarded-for", "192.0.2.1")).await;
    assert_eq!(status, 401, "from another machine a key is needed");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_a_clear_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let listen = taken.local_addr().expect("address");
    let config = GatewayConfig {
        listen,
        ..GatewayConfig::default()
    };
    let error = Gateway::bind(config)
        .await
        .err()
        .expect("the port is taken")
        .to_string();
    assert!(
        error.contains(&listen.to_string()) && error.contains("choose another port"),
        "{error}"
    );
}
