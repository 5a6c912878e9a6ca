//! Processes of an earlier `verbund up` that was killed: the kernel asks them to end, and until they have they hold the
//! ports and the databases of the cluster.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep};

use super::say;

/// A node ends within 7 s (`node::SHUTDOWN_WITHIN` and the drain time), and much later on a machine that is overloaded.
const ENDED_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Waits until no node of the cluster in `dir` runs any more.
///
/// # Errors
/// Names the processes that do not end.
pub async fn ended(dir: &Path) -> Result<()> {
    let started = Instant::now();
    let mut told = false;
    loop {
        let running = running(dir);
        if running.is_empty() {
            return Ok(());
        }
        if started.elapsed() > ENDED_WITHIN {
            let pids: Vec<_> = running.iter().map(u32::to_string).collect();
            bail!(
                "processes of an earlier start on {} do not end; end them and start again: kill -9 {}",
                dir.display(),
                pids.join(" ")
            );
        }
        if !told {
            say("Waiting for the processes of an earlier start to end");
            told = true;
        }
        sleep(LOOK_EVERY).await;
    }
}

/// The processes that run a node whose configuration lies in a folder of `dir`.
fn running(dir: &Path) -> Vec<u32> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| runs_node_of(&line, dir))
        })
        .collect()
}

/// Whether a command line, its words ended by NUL, is `… node --config DIR/<name>/node.toml`.
fn runs_node_of(command_line: &[u8], dir: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let words: Vec<_> = command_line.split(|byte| *byte == 0).collect();
    let Some(at) = words.iter().position(|word| *word == b"--config") else {
        return false;
    };
    let config = words
        .get(at + 1)
        .map(|w| Path::new(std::ffi::OsStr::from_bytes(w)));
    at > 0
        && words[at - 1] == b"node"
        && config.and_then(Path::parent).and_then(Path::parent) == Some(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nodes_of_this_very_directory_are_waited_for() {
        let cases: [(&[u8], bool); 6] = [
            (
                b"/bin/verbund\0node\0--config\0/data/demo/node1/node.toml\0",
                true,
            ),
            (
                b"/bin/verbund\0node\0--config\0/data/demo2/node1/node.toml\0",
                false,
            ),
            (
                b"/bin/verbund\0node\0--config\0/data/demo/node.toml\0",
                false,
            ),
            (b"/bin/verbund\0up\0--data\0/data/demo\0", false),
            (b"/bin/verbund\0node\0--config\0", false),
            (b"", false),
        ];
        for (line, expected) in cases {
            assert_eq!(
                runs_node_of(line, Path::new("/data/demo")),
                expected,
                "{}",
                String::from_utf8_lossy(line)
            );
        }
    }
}
