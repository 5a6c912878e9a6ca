//! One request over HTTP, its answer taken token by token as it streams.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use serde_json::{Value, json};

/// Which of OpenAI's interfaces is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Endpoint {
    /// `/v1/completions`: the prompt as it stands.
    Completions,
    /// `/v1/chat/completions`: the prompt as a user's message.
    Chat,
}

/// A server.
#[derive(Debug, Clone)]
pub struct Target {
    /// Without a slash at the end.
    pub base_url: String,
    pub model: String,
    pub endpoint: Endpoint,
}

impl Target {
    /// A server at `base_url`, which must be on this machine unless `anywhere`.
    ///
    /// # Errors
    /// Another machine: a load generator in the wrong place is an attack.
    pub fn new(base_url: &str, model: &str, endpoint: Endpoint, anywhere: bool) -> Result<Self> {
        let base_url = base_url.trim_end_matches('/');
        let url = reqwest::Url::parse(base_url).with_context(|| format!("{base_url} is no URL"))?;
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let here = host == "localhost"
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|ip| ip.is_loopback());
        ensure!(
            here || anywhere,
            "{base_url} is not on this machine; add --anywhere if that server may be loaded"
        );
        Ok(Target {
            base_url: base_url.into(),
            model: model.into(),
            endpoint,
        })
    }
}

/// What one request brought.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// HTTP status; 0 where no answer came.
    pub status: u16,
    /// When each token came.
    pub tokens: Vec<Instant>,
    pub text: String,
    /// As the server counted them, where it did.
    pub prompt_tokens: Option<usize>,
    pub completion_tokens: Option<usize>,
    pub cached_tokens: Option<usize>,
    /// The client went away on purpose.
    pub cancelled: bool,
    /// Whether the stream ended as it should.
    pub complete: bool,
    /// What went wrong, if not only by status.
    pub error: Option<String>,
}

/// A client for many requests at once, without a proxy, each with a bound in time.
pub fn http(timeout: Duration) -> Result<reqwest::Client> {
    Ok(reqwest::Client::builder()
        .no_proxy()
        .timeout(timeout)
        .tcp_nodelay(true)
        .build()?)
}

/// What is asked besides the prompt.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    pub key: &'a str,
    pub prompt: &'a str,
    pub answer_tokens: usize,
    /// Go away after so many tokens.
    pub cancel_after: Option<usize>,
    pub temperature: f32,
}

/// Asks and takes the stream to its end.
pub async fn ask(http: &reqwest::Client, target: &Target, ask: Ask<'_>) -> Answer {
    let mut answer = Answer::default();
    ask_into(http, target, ask, &mut answer).await;
    answer
}

/// The same, keeping what came so far in `answer` where the caller stops waiting.
pub async fn ask_into(http: &reqwest::Client, target: &Target, ask: Ask<'_>, answer: &mut Answer) {
    if let Err(error) = stream(http, target, ask, answer).await {
        answer.error = Some(format!("{error:#}"));
    }
}

async fn stream(
    http: &reqwest::Client,
    target: &Target,
    ask: Ask<'_>,
    answer: &mut Answer,
) -> Result<()> {
    let mut body = json!({
        "model": target.model,
        "max_tokens": ask.answer_tokens,
        "temperature": ask.temperature,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let path = match target.endpoint {
        Endpoint::Completions => {
            body["prompt"] = ask.prompt.into();
            "/v1/completions"
        }
        Endpoint::Chat => {
            body["messages"] = json!([{ "role": "user", "content": ask.prompt }]);
            "/v1/chat/completions"
        }
    };
    let mut request = http.post(format!("{}{path}", target.base_url)).json(&body);
    if !ask.key.is_empty() {
        request = request.bearer_auth(ask.key);
    }
    let reply = request.send().await?;
    answer.status = reply.status().as_u16();
    if !reply.status().is_success() {
        let text = reply.text().await.unwrap_or_default();
        answer.error = Some(text.chars().take(300).collect());
        return Ok(());
    }
    let mut lines = Lines::default();
    let mut bytes = reply.bytes_stream();
    while let Some(piece) = bytes.next().await {
        let now = Instant::now();
        for event in lines.events(&piece?) {
            if event == "[DONE]" {
                answer.complete = true;
                return Ok(());
            }
            let event: Value = serde_json::from_str(&event).context("an event that is not JSON")?;
            take(&event, now, answer)?;
            if ask.cancel_after.is_some_and(|n| answer.tokens.len() >= n) {
                answer.cancelled = true;
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Adds one event of the stream to the answer.
fn take(event: &Value, now: Instant, answer: &mut Answer) -> Result<()> {
    if let Some(error) = event.get("error").filter(|e| !e.is_null()) {
        anyhow::bail!("the stream brought an error: {error}");
    }
    let usage = |pointer| event.pointer(pointer).and_then(Value::as_u64);
    let count = |pointer| usage(pointer).map(|n| n as usize);
    answer.prompt_tokens = count("/usage/prompt_tokens").or(answer.prompt_tokens);
    answer.completion_tokens = count("/usage/completion_tokens").or(answer.completion_tokens);
    answer.cached_tokens =
        count("/usage/prompt_tokens_details/cached_tokens").or(answer.cached_tokens);
    let text = event
        .pointer("/choices/0/text")
        .or_else(|| event.pointer("/choices/0/delta/content"))
        .and_then(Value::as_str)
        .unwrap_or_default();
    if !text.is_empty() {
        answer.tokens.push(now);
        answer.text.push_str(text);
    }
    Ok(())
}

/// The `data:` lines of a stream of server-sent events, whatever pieces it comes in.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// The events that are whole with this piece.
    fn events(&mut self, piece: &[u8]) -> Vec<String> {
        self.rest.extend_from_slice(piece);
        let mut events = Vec::new();
        while let Some(end) = self.rest.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if let Some(data) = line.trim_end().strip_prefix("data:") {
                events.push(data.trim_start().to_owned());
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_whole_whatever_pieces_they_come_in() {
        let text = "data: {\"a\":\"ü\"}\r\n\r\n: comment\ndata:[DONE]\n\n";
        for size in 1..text.len() {
            let mut lines = Lines::default();
            let events: Vec<String> = text
                .as_bytes()
                .chunks(size)
                .flat_map(|piece| lines.events(piece))
                .collect();
            assert_eq!(events, ["{\"a\":\"ü\"}", "[DONE]"], "pieces of {size}");
        }
    }

    #[test]
    fn only_this_machine_is_loaded_unless_told() {
        let new = |url, anywhere| Target::new(url, "m", Endpoint::Chat, anywhere);
        for url in [
            "http://127.0.0.1:1/",
            "http://localhost:1",
            "http://[::1]:1",
        ] {
            assert!(new(url, false).is_ok(), "{url}");
        }
        let error = new("http://192.0.2.1:1", false).unwrap_err().to_string();
        assert!(error.contains("--anywhere"), "{error}");
        assert!(new("http://192.0.2.1:1", true).is_ok());
        assert!(new("nonsense", true).is_err());
    }
}
