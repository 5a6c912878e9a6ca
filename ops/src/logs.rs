//! Structured logs: JSON lines or text, to standard error or to a file that is rotated small.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::{LogFormat, LogSection};

/// Sends this process's logs where `section` says. Once per process; panics are logged too.
pub fn init(section: &LogSection) -> Result<()> {
    let filter = EnvFilter::try_new(&section.level).with_context(|| {
        format!(
            "log.level: expected a filter as \"info\" or \"info,coordinator=debug\", got {:?}",
            section.level
        )
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        // It would tell standard error by a macro that panics when that cannot be written either: a full disk.
        .log_internal_errors(false);
    let set = match (&section.file, section.format) {
        (Some(path), LogFormat::Json) => builder
            .json()
            .with_writer(Rotating::open(path, section.max_bytes)?)
            .try_init(),
        (Some(path), LogFormat::Text) => builder
            .with_writer(Rotating::open(path, section.max_bytes)?)
            .try_init(),
        (None, LogFormat::Json) => builder.json().with_writer(io::stderr).try_init(),
        (None, LogFormat::Text) => builder.with_writer(io::stderr).try_init(),
    };
    set.map_err(|e| anyhow!("cannot set up logging: {e}"))?;
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let place = panic
            .location()
            .map(ToString::to_string)
            .unwrap_or_default();
        tracing::error!(place, "panic");
        default(panic);
    }));
    Ok(())
}

/// A log file that is renamed to `<name>.1` when it has grown to its limit.
#[derive(Clone)]
struct Rotating(Arc<Mutex<Inner>>);

struct Inner {
    path: PathBuf,
    file: File,
    bytes: u64,
    max_bytes: u64,
}

impl Rotating {
    fn open(path: &Path, max_bytes: u64) -> Result<Rotating> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
        let file =
            append(path).with_context(|| format!("cannot write the log {}", path.display()))?;
        let bytes = file.metadata()?.len();
        Ok(Rotating(Arc::new(Mutex::new(Inner {
            path: path.to_owned(),
            file,
            bytes,
            max_bytes,
        }))))
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

impl Write for Rotating {
    /// One call is one line: it is never cut by a rotation.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.bytes > 0 && inner.bytes + line.len() as u64 > inner.max_bytes {
            let mut older = inner.path.clone().into_os_string();
            older.push(".1");
            fs::rename(&inner.path, older)?;
            inner.file = append(&inner.path)?;
            inner.bytes = 0;
        }
        inner.file.write_all(line)?;
        inner.bytes += line.len() as u64;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Rotating {
    type Writer = Rotating;

    fn make_writer(&'a self) -> Rotating {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_rotated_between_lines_and_keeps_one_older_file() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("deep/log");
        let mut log = Rotating::open(&path, 10).expect("opened");
        for line in [
            "one\n",
            "two\n",
            "three\n",
            "a line longer than the limit\n",
            "four\n",
        ] {
            log.write_all(line.as_bytes()).expect("written");
        }
        assert_eq!(fs::read_to_string(&path).expect("log"), "four\n");
        assert_eq!(
            fs::read_to_string(dir.path().join("deep/log.1")).expect("older"),
            "a line longer than the limit\n"
        );
        let mut again = Rotating::open(&path, 10).expect("opened again");
        again.write_all(b"five\n").expect("written");
        assert_eq!(fs::read_to_string(&path).expect("log"), "four\nfive\n");
    }
}
