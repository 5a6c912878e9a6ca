//! One process of the cluster: started, watched, started again when it dies, stopped in the end.

use std::fs::{self, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::layout::Member;

/// A process that dies is started again after this pause, doubled with each death up to the maximum.
const RESTART_FIRST: Duration = Duration::from_millis(200);
const RESTART_MAX: Duration = Duration::from_secs(5);
/// A process that ran so long has not died of its start.
const STEADY: Duration = Duration::from_secs(10);
/// A process that was asked to end and still runs after this time is killed.
const STOP_WITHIN: Duration = Duration::from_secs(10);
/// Exit status of a process that cannot start with what it was given; starting it again would change nothing.
pub const EXIT_CONFIG: i32 = 78;
/// How much of a dead process's last words is shown.
const LAST_WORDS_BYTES: usize = 2_000;

/// What a supervised process reports.
#[derive(Debug)]
pub enum Event {
    Started {
        name: String,
        pid: u32,
    },
    /// It will be started again after `pause`.
    Died {
        name: String,
        why: String,
        pause: Duration,
    },
    /// It will not be started again.
    Hopeless {
        name: String,
        why: String,
    },
}

/// Keeps `member` running until `stop`; events go to `events`. Must run on the main thread of the process: the kernel
/// ends the child when the thread that started it ends.
pub async fn supervise(
    member: Member,
    program: PathBuf,
    stop: CancellationToken,
    events: tokio::sync::mpsc::UnboundedSender<Event>,
) {
    let name = member.name.clone();
    let mut pause = RESTART_FIRST;
    // A receiver that is gone means that the supervisor itself is ending.
    let tell = |event| drop(events.send(event));
    while !stop.is_cancelled() {
        let started = Instant::now();
        let why = match start(&member, &program) {
            Ok(mut child) => {
                tell(Event::Started {
                    name: name.clone(),
                    pid: child.id().unwrap_or_default(),
                });
                let status = tokio::select! {
                    status = child.wait() => status,
                    () = stop.cancelled() => {
                        end(&mut child, &name).await;
                        break;
                    }
                };
                let why = last_words(&member.dir, status);
                if let Some(why) = why.hopeless {
                    tell(Event::Hopeless { name, why });
                    return;
                }
                why.text
            }
            Err(error) => format!("{error:#}"),
        };
        if started.elapsed() > STEADY {
            pause = RESTART_FIRST;
        }
        tell(Event::Died {
            name: name.clone(),
            why,
            pause,
        });
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => break,
        }
        pause = (pause * 2).min(RESTART_MAX);
    }
}

fn start(member: &Member, program: &Path) -> Result<Child> {
    let words = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(member.dir.join("stderr"))
        .with_context(|| format!("cannot write below {}", member.dir.display()))?;
    let mut command = Command::new(program);
    command
        .arg("node")
        .arg("--config")
        .arg(member.dir.join("node.toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(words)
        // A group of its own: Ctrl-C in the terminal reaches `up` alone, which then stops all in order.
        .process_group(0)
        .kill_on_drop(true);
    let parent = std::process::id();
    // SAFETY: between fork and exec only prctl and getppid are called, both async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            // The parent may have died before the line above.
            if libc::getppid() as u32 == parent {
                Ok(())
            } else {
                Err(std::io::Error::other("the parent died"))
            }
        });
    }
    command
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))
}

/// Asks the child to end, and kills it if it does not.
async fn end(child: &mut Child, name: &str) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // SAFETY: sends a signal to our own child, which has not been waited for yet.
        unsafe { libc::kill(pid, libc::SIGTERM) };
    }
    if timeout(STOP_WITHIN, child.wait()).await.is_err() {
        warn!(name, "does not end by itself, killing it");
        let _ = child.kill().await;
    }
}

struct LastWords {
    text: String,
    hopeless: Option<String>,
}

/// How a child ended and what it said last.
fn last_words(dir: &Path, status: std::io::Result<ExitStatus>) -> LastWords {
    let said = fs::read(dir.join("stderr")).unwrap_or_default();
    let said = String::from_utf8_lossy(&said[said.len().saturating_sub(LAST_WORDS_BYTES)..])
        .trim()
        .to_owned();
    let status = match status {
        Ok(status) => status,
        Err(why) => {
            return LastWords {
                text: why.to_string(),
                hopeless: None,
            };
        }
    };
    if status.code() == Some(EXIT_CONFIG) {
        return LastWords {
            text: said.clone(),
            hopeless: Some(said),
        };
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (None, Some(signal)) => format!("ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    };
    let text = if said.is_empty() {
        how
    } else {
        format!("{how}: {said}")
    };
    LastWords {
        text,
        hopeless: None,
    }
}
