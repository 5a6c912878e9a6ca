//! `/health` and `/metrics` over plain HTTP, for nodes without a gateway. Two fixed answers need no web framework.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use coordinator::control::ControlHandle;
use prometheus::{Encoder, TextEncoder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// A monitoring system asks one at a time; more connections wait.
const MAX_CONNECTIONS: usize = 8;
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
/// A request line and headers; what is longer is cut off and refused.
const MAX_REQUEST_BYTES: usize = 8 * 1024;

/// Serves until `stop`.
pub async fn serve(
    listen: SocketAddr,
    name: String,
    control: ControlHandle,
    stop: CancellationToken,
) -> Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| {
        format!("node.admin_listen: cannot listen on {listen}; choose a free port")
    })?;
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    tokio::spawn(async move {
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            let stream = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    // Out of file descriptors: others must close some first.
                    Err(_) => { tokio::time::sleep(Duration::from_millis(100)).await; continue }
                },
            };
            let (name, control) = (name.clone(), control.clone());
            tokio::spawn(async move {
                let _slot = slot;
                // A monitor that gives up in the middle is its own affair.
                let _ = timeout(REQUEST_WITHIN, answer(stream, &name, &control)).await;
            });
        }
    });
    Ok(())
}

async fn answer(mut stream: TcpStream, name: &str, control: &ControlHandle) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") && request.len() < MAX_REQUEST_BYTES {
        match stream.read(&mut buffer).await? {
            0 => break,
            count => request.extend_from_slice(&buffer[..count]),
        }
    }
    let (status, kind, body) = route(&request, name, control);
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&body).await?;
    stream.shutdown().await
}

fn route(
    request: &[u8],
    name: &str,
    control: &ControlHandle,
) -> (&'static str, &'static str, Vec<u8>) {
    let line = request.split(|b| *b == b'\r').next().unwrap_or_default();
    match line {
        l if l.starts_with(b"GET /health ") => {
            let revision = control.state().revision;
            let body = serde_json::json!({"status": "ok", "node": name, "revision": revision});
            ("200 OK", "application/json", body.to_string().into_bytes())
        }
        l if l.starts_with(b"GET /metrics ") => {
            let mut body = Vec::new();
            match TextEncoder::new().encode(&prometheus::gather(), &mut body) {
                Ok(()) => ("200 OK", "text/plain; version=0.0.4", body),
                Err(why) => (
                    "500 Internal Server Error",
                    "text/plain",
                    why.to_string().into_bytes(),
                ),
            }
        }
        _ => (
            "404 Not Found",
            "text/plain",
            b"expected GET /health or GET /metrics\n".to_vec(),
        ),
    }
}
