//! What a schema costs a token: the same model writes JSON under a schema and freely, one stream at a time.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Setting;
use crate::server::{Cluster, Server};

/// Milliseconds between tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Constrained {
    pub model: String,
    pub free_ms: f64,
    pub schema_ms: f64,
    pub tokens: usize,
}

/// Measures in turn; the fastest answer of each kind counts.
pub async fn run(setting: &Setting) -> Result<Constrained> {
    let cluster = Cluster {
        binary: setting.verbund.clone(),
        model: None,
        ranks: 1,
        env: Vec::new(),
    };
    let server = Server::verbund(&cluster).await?;
    let tokens = if setting.quick { 16 } else { 200 };
    // No answer can end before so many items, and there are many ways to go on at each token.
    let schema = json!({
        "type": "object",
        "properties": { "towns": { "type": "array", "minItems": 200, "items": {
            "type": "object",
            "properties": { "name": { "type": "string" }, "people": { "type": "integer" } },
            "required": ["name", "people"], "additionalProperties": false
        } } },
        "required": ["towns"], "additionalProperties": false
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "towns", "strict": true, "schema": schema } });
    let (mut free_ms, mut schema_ms) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..2 * setting.rounds {
        free_ms = free_ms.min(between_ms(&server, tokens, None).await?);
        schema_ms = schema_ms.min(between_ms(&server, tokens, Some(&format)).await?);
    }
    Ok(Constrained {
        model: "SmolLM2 135M Q4_1".into(),
        free_ms,
        schema_ms,
        tokens,
    })
}

/// Mean milliseconds a token, the first one left out: it carries the prompt, and the schema's preparation.
async fn between_ms(server: &Server, tokens: usize, format: Option<&Value>) -> Result<f64> {
    let mut body = json!({
        "model": server.target.model,
        "messages": [{ "role": "user", "content": "List many towns and how many people live there, as JSON." }],
        "max_tokens": tokens,
        "temperature": 0.8,
        "seed": 3,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    if let Some(format) = format {
        body["response_format"] = format.clone();
    }
    let url = format!("{}/v1/chat/completions", server.target.base_url);
    let request = server.http.post(url).bearer_auth(&server.key).json(&body);
    let reply = request.timeout(Duration::from_secs(120)).send().await?;
    let status = reply.status();
    ensure!(
        status.is_success(),
        "HTTP {status}: {}",
        reply.text().await?
    );
    let mut bytes = reply.bytes_stream();
    let (mut text, mut first, mut last) = (String::new(), None, None);
    while let Some(piece) = bytes.next().await {
        let piece = piece?;
        let piece = String::from_utf8_lossy(&piece);
        if piece.contains("\"content\"") {
            let now = Instant::now();
            first.get_or_insert(now);
            last = Some(now);
        }
        text.push_str(&piece);
    }
    let usage = text
        .lines()
        .filter_map(|l| l.strip_prefix("data: "))
        .filter_map(|l| serde_json::from_str::<Value>(l).ok())
        .find_map(|event| event.pointer("/usage/completion_tokens")?.as_u64());
    let count = usage.context("the stream brought no usage")?;
    let (first, last) = first.zip(last).context("the stream brought no token")?;
    ensure!(count > 8, "an answer of {count} tokens says nothing");
    Ok(1e3 * last.duration_since(first).as_secs_f64() / (count - 1) as f64)
}

/// The table.
pub fn table(c: &Constrained) -> String {
    let over = c.schema_ms / c.free_ms - 1.0;
    format!(
        "{}, one stream, {} tokens.\n\n| free | under a schema | overhead | goal |\n| ---: | ---: | ---: | ---: |\n| {:.2} ms a token | {:.2} ms a token | {:.1} % | ≤ 5 % {} |\n",
        c.model,
        c.tokens,
        c.free_ms,
        c.schema_ms,
        100.0 * over,
        if over <= 0.05 { "✓" } else { "✗" }
    )
}
