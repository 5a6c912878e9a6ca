//! Readers in a process of their own: what a hostile file breaks there stays there.
//!
//! The protocol is one request and a few frames. Parent to child: a header frame (postcard of name and media type), then the
//! file to the end of the stream. Child to parent: frames of [`Message`]. A frame is a u32-LE length and that many bytes.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::{
    ExtractError, ExtractedDocument, MAX_DOCUMENT_BYTES, MAX_TEXT_BYTES, extract_with_progress,
    sandbox,
};

/// The name of the hidden subcommand that calls [`child_main`].
const SUBCOMMAND: &str = "extract";
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Heading paths repeat headings in every block, hence more than the text itself.
const MAX_FRAME_BYTES: usize = 8 * MAX_TEXT_BYTES;
/// Progress is reported in steps of at least this share.
const PROGRESS_STEP: f32 = 0.02;
/// `SIGXCPU`, and `SIGKILL` at the hard limit, end a child that computes too long.
const TIME_SIGNALS: [i32; 2] = [libc::SIGXCPU, libc::SIGKILL];

#[derive(Serialize, Deserialize)]
struct Header {
    filename: String,
    media_type: String,
}

#[derive(Serialize, Deserialize)]
enum Message {
    Progress(f32),
    Done(Result<ExtractedDocument, ExtractError>),
}

/// The child: reads one document from standard input, writes the result to standard output. Returns the exit status.
///
/// Call it first thing in `main`, before any thread exists: limits on memory count what the process already maps, and
/// a process with threads cannot leave its namespaces.
pub fn child_main() -> i32 {
    // A panic's message may quote the document: it must reach no log.
    std::panic::set_hook(Box::new(|_| {}));
    let Ok(mut out) = sandbox::take_stdout() else {
        return 2;
    };
    sandbox::enter();
    let mut input = std::io::stdin().lock();
    let Some((header, bytes)) = read_request(&mut input) else {
        return 2;
    };
    let mut last = 0.0;
    let mut progress = |done: f32| {
        if done - last >= PROGRESS_STEP {
            last = done;
            // A parent that went away is noticed at the result.
            let _ = write_message(&mut out, &Message::Progress(done));
        }
    };
    let result = extract_with_progress(&bytes, &header.filename, &header.media_type, &mut progress);
    match write_message(&mut out, &Message::Done(result)) {
        Ok(()) => 0,
        Err(_) => 2,
    }
}

fn read_request(input: &mut impl Read) -> Option<(Header, Vec<u8>)> {
    let mut length = [0; 4];
    input.read_exact(&mut length).ok()?;
    let length = usize::try_from(u32::from_le_bytes(length))
        .ok()
        .filter(|l| *l <= MAX_HEADER_BYTES)?;
    let mut header = vec![0; length];
    input.read_exact(&mut header).ok()?;
    let header = postcard::from_bytes(&header).ok()?;
    let mut bytes = Vec::new();
    // One byte more than allowed is enough to be told that it is too much.
    input
        .take(MAX_DOCUMENT_BYTES + 1)
        .read_to_end(&mut bytes)
        .ok()?;
    Some((header, bytes))
}

fn write_message(out: &mut impl Write, message: &Message) -> std::io::Result<()> {
    let frame = frame(message)?;
    out.write_all(&frame)?;
    out.flush()
}

fn frame(value: &impl Serialize) -> std::io::Result<Vec<u8>> {
    let body = postcard::to_stdvec(value).map_err(std::io::Error::other)?;
    let length = u32::try_from(body.len()).map_err(std::io::Error::other)?;
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// Reads a document in a child process: `program extract`, killed after `timeout` or when the future is dropped.
///
/// `program` is the `verbund` binary (`std::env::current_exe()`), or any that calls [`child_main`] for this subcommand.
pub async fn in_child(
    program: &Path,
    bytes: &[u8],
    filename: &str,
    media_type: &str,
    timeout: Duration,
) -> Result<ExtractedDocument, ExtractError> {
    in_child_with_progress(program, bytes, filename, media_type, timeout, |_| {}).await
}

/// As [`in_child`]; `progress` is told how far the child is, from 0 to 1.
pub async fn in_child_with_progress(
    program: &Path,
    bytes: &[u8],
    filename: &str,
    media_type: &str,
    timeout: Duration,
    progress: impl FnMut(f32) + Send,
) -> Result<ExtractedDocument, ExtractError> {
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(ExtractError::TooLarge {
            limit: MAX_DOCUMENT_BYTES,
            got: bytes.len() as u64,
        });
    }
    if bytes.is_empty() {
        return Err(ExtractError::Empty);
    }
    let header = Header {
        filename: filename.to_string(),
        media_type: media_type.to_string(),
    };
    let header = frame(&header).map_err(|_| ExtractError::broken("its name cannot be sent"))?;
    if header.len() > MAX_HEADER_BYTES {
        return Err(ExtractError::broken(format!(
            "its name is longer than {MAX_HEADER_BYTES} bytes"
        )));
    }
    match tokio::time::timeout(timeout, converse(program, &header, bytes, progress)).await {
        Ok(result) => result,
        // Dropping the future has killed the child.
        Err(_) => Err(ExtractError::Timeout),
    }
}

async fn converse(
    program: &Path,
    header: &[u8],
    bytes: &[u8],
    mut progress: impl FnMut(f32) + Send,
) -> Result<ExtractedDocument, ExtractError> {
    let started = Command::new(program)
        .arg(SUBCOMMAND)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let mut child = started
        .map_err(|e| ExtractError::broken(format!("the reading process did not start: {e}")))?;
    let (Some(mut stdin), Some(mut stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(ExtractError::broken("the reading process has no pipes"));
    };
    let send = async move {
        // A child that ends early closes the pipe; its result or exit status says why.
        if stdin.write_all(header).await.is_ok() {
            let _ = stdin.write_all(bytes).await;
        }
        drop(stdin);
    };
    let receive = async {
        while let Some(message) = read_message(&mut stdout).await {
            match message {
                Message::Progress(done) => progress(done.clamp(0.0, 1.0)),
                Message::Done(result) => return Some(result),
            }
        }
        None
    };
    let ((), received) = tokio::join!(send, receive);
    let status = child.wait().await;
    received.unwrap_or_else(|| {
        let signal = status
            .ok()
            .and_then(|s| std::os::unix::process::ExitStatusExt::signal(&s));
        Err(match signal {
            Some(signal) if TIME_SIGNALS.contains(&signal) => ExtractError::Timeout,
            Some(_) => ExtractError::broken(
                "reading it took more memory than allowed or crashed the reader",
            ),
            None => ExtractError::broken("the reading process ended without a result"),
        })
    })
}

async fn read_message(from: &mut (impl AsyncRead + Unpin)) -> Option<Message> {
    let length = usize::try_from(from.read_u32_le().await.ok()?)
        .ok()
        .filter(|l| *l <= MAX_FRAME_BYTES)?;
    let mut body = vec![0; length];
    from.read_exact(&mut body).await.ok()?;
    postcard::from_bytes(&body).ok()
}
