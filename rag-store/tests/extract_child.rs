//! The sandboxed child process, with this very binary as the program: `extract` as first argument makes it the child.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use rag_store::chunk::chunk;
use rag_store::extract::{
    ExtractError, MAX_DOCUMENT_BYTES, child_main, extract, in_child, in_child_with_progress,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// For a damaged PDF of some pages, which takes milliseconds; one that takes so long hangs.
const HANGS: Duration = Duration::from_secs(10);
/// Damaged PDFs read; each is a process.
const DAMAGED: u64 = 96;
/// The extraction child; `verbund extract` in production.
const EXTRACT: &str = "extract";
/// Tries the child's walls and exits with what [`rag_store::extract::sandbox_breaches`] says.
#[cfg(target_os = "linux")]
const TRY_WALLS: &str = "try-walls";
/// Starts an extraction child, says its process id and sleeps, to be killed.
#[cfg(target_os = "linux")]
const BE_PARENT: &str = "be-parent";

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some(EXTRACT) => std::process::exit(child_main()),
        #[cfg(target_os = "linux")]
        Some(TRY_WALLS) => std::process::exit(rag_store::extract::sandbox_breaches()),
        #[cfg(target_os = "linux")]
        Some(BE_PARENT) => be_parent(),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("runtime");
    let program = std::env::current_exe().expect("own path");
    runtime.block_on(async {
        reads_every_example_as_in_process(&program).await;
        carries_errors(&program).await;
        ends_children_that_hang().await;
        survives_children_that_fail(&program).await;
        reads_or_refuses_damaged_pdfs(&program).await;
        #[cfg(target_os = "linux")]
        {
            walls_hold(&program).await;
            ends_with_its_parent(&program).await;
        }
    });
    println!("extract_child: all passed");
}

/// Whether a file of the examples is a document; beside them lie the questions and settings.
fn is_document(path: &Path) -> bool {
    let kinds = ["pdf", "docx", "odt", "html", "md", "txt"];
    path.extension()
        .and_then(|ending| ending.to_str())
        .is_some_and(|ending| kinds.contains(&ending))
}

fn examples() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ops/examples");
    let files = std::fs::read_dir(dir)
        .expect("examples")
        .map(|e| e.expect("entry").path());
    let mut documents: Vec<PathBuf> = files.filter(|path| is_document(path)).collect();
    documents.sort();
    documents
}

async fn reads_every_example_as_in_process(program: &Path) {
    let documents = examples();
    assert!(documents.len() >= 6);
    for path in documents {
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .expect("name")
            .to_string();
        let bytes = std::fs::read(&path).expect("example");
        let mut reports = Vec::new();
        let child =
            in_child_with_progress(program, &bytes, &name, "", PATIENCE, |p| reports.push(p)).await;
        assert_eq!(child, extract(&bytes, &name, ""), "{name}");
        assert!(child.is_ok(), "{name}: {child:?}");
        assert!(
            reports.windows(2).all(|w| w[0] < w[1]),
            "{name}: {reports:?}"
        );
        assert_eq!(reports.last(), Some(&1.0), "{name}");
    }
}

async fn carries_errors(program: &Path) {
    let read = async |bytes: &[u8], name: &str| in_child(program, bytes, name, "", PATIENCE).await;
    assert_eq!(read(b"", "leer.txt").await, Err(ExtractError::Empty));
    assert_eq!(read(b"  \n ", "leer.txt").await, Err(ExtractError::Empty));
    assert!(matches!(
        read(b"%PDF-1.7 kaputt", "a.pdf").await,
        Err(ExtractError::Broken { .. })
    ));
    assert!(matches!(
        read(b"\x89PNG\r\n\x1a\n\0\0", "a.png").await,
        Err(ExtractError::UnsupportedType { .. })
    ));
    let large = vec![b'x'; MAX_DOCUMENT_BYTES as usize + 1];
    let limit = ExtractError::TooLarge {
        limit: MAX_DOCUMENT_BYTES,
        got: MAX_DOCUMENT_BYTES + 1,
    };
    assert_eq!(read(&large, "a.txt").await, Err(limit));
    let long_name = "n".repeat(1 << 20);
    assert!(matches!(
        read(b"Text", &long_name).await,
        Err(ExtractError::Broken { .. })
    ));
}

/// `yes` writes for ever; what it writes is no frame, and it does not end by itself.
async fn ends_children_that_hang() {
    let hanging = in_child(
        Path::new("/usr/bin/yes"),
        b"Text",
        "a.txt",
        "",
        Duration::from_millis(300),
    )
    .await;
    assert_eq!(hanging, Err(ExtractError::Timeout));
}

async fn survives_children_that_fail(program: &Path) {
    for silent in ["/bin/true", "/bin/false"] {
        let got = in_child(Path::new(silent), b"Text", "a.txt", "", PATIENCE).await;
        assert!(
            matches!(got, Err(ExtractError::Broken { .. })),
            "{silent}: {got:?}"
        );
    }
    let missing = in_child(&program.join("nothing"), b"Text", "a.txt", "", PATIENCE).await;
    assert!(
        matches!(missing, Err(ExtractError::Broken { .. })),
        "{missing:?}"
    );
}

/// The PDF parser is not ours: damaged files make it panic, overflow its stack or loop. Whatever it does, the child answers or
/// is ended, and a text that comes is sound. The damage is drawn from a fixed seed, so that a failure comes again.
async fn reads_or_refuses_damaged_pdfs(program: &Path) {
    let original = std::fs::read(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../ops/examples/niederschrift-stadtrat.pdf"),
    )
    .expect("example");
    let mut read = 0;
    for seed in 0..DAMAGED {
        let mut rng = StdRng::seed_from_u64(seed);
        let bytes = match seed % 4 {
            // Random bytes behind a PDF's beginning.
            0 => {
                let mut bytes = b"%PDF-1.4\n".to_vec();
                let length = rng.random_range(0..400);
                bytes.extend((0..length).map(|_| rng.random::<u8>()));
                bytes
            }
            cut => {
                let mut bytes = original.clone();
                for _ in 0..rng.random_range(1..30) {
                    let at = rng.random_range(0..bytes.len());
                    match rng.random_range(0..4) {
                        0 => drop(bytes.remove(at)),
                        1 => bytes.insert(at, rng.random()),
                        _ => bytes[at] = rng.random(),
                    }
                }
                if cut == 1 {
                    bytes.truncate(rng.random_range(1..bytes.len()));
                }
                bytes
            }
        };
        match in_child(program, &bytes, "a.pdf", "", HANGS).await {
            Ok(document) => {
                read += 1;
                for piece in chunk(&document) {
                    assert!(
                        document.page_text(piece.page).contains(&piece.text),
                        "seed {seed}"
                    );
                }
            }
            Err(ExtractError::Timeout) => panic!("seed {seed} hangs the reader"),
            Err(
                ExtractError::Broken { .. }
                | ExtractError::NoText
                | ExtractError::Empty
                | ExtractError::PasswordProtected
                | ExtractError::TooLarge { .. },
            ) => {}
            Err(error) => panic!("seed {seed}: {error:?}"),
        }
    }
    assert!(read > 0, "some damage leaves a readable file");
}

#[cfg(target_os = "linux")]
async fn walls_hold(program: &Path) {
    let tried = tokio::process::Command::new(program)
        .arg(TRY_WALLS)
        .kill_on_drop(true)
        .status();
    let status = tokio::time::timeout(PATIENCE, tried)
        .await
        .expect("the walls are tried in time")
        .expect("started");
    assert_eq!(
        status.code(),
        Some(0),
        "100 and the number of the wall that did not hold"
    );
}

/// A child whose parent was killed with -9 is ended by the kernel.
#[cfg(target_os = "linux")]
async fn ends_with_its_parent(program: &Path) {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let mut parent = tokio::process::Command::new(program)
        .arg(BE_PARENT)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("started");
    // Held to the end: the child waits for what comes from here.
    let input = parent.stdin.take().expect("piped");
    let mut lines = BufReader::new(parent.stdout.take().expect("piped")).lines();
    let line = tokio::time::timeout(PATIENCE, lines.next_line()).await;
    let child = line.expect("in time").expect("a line").expect("a line");
    let running = || {
        std::fs::read_to_string(format!("/proc/{child}/stat")).is_ok_and(|stat| {
            let state = stat.rsplit(')').next().map(str::trim_start);
            state.is_some_and(|state| !state.starts_with('Z'))
        })
    };
    assert!(running());
    parent.kill().await.expect("killed");
    let gone = async {
        while running() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone)
        .await
        .expect("the child ends with its parent");
    drop(input);
}

/// Starts a child that reads what the test holds open, so that only the death of its parent, this process, can end it.
#[cfg(target_os = "linux")]
fn be_parent() {
    use std::process::{Command, Stdio};
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .arg(EXTRACT)
        .stdin(Stdio::inherit())
        .stdout(Stdio::null())
        .spawn()
        .expect("started");
    let status = format!("/proc/{}/status", child.id());
    let walled =
        || std::fs::read_to_string(&status).is_ok_and(|status| status.contains("Seccomp:\t2"));
    for _ in 0..1000 {
        if walled() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    println!("{}", child.id());
    // Killed while it waits; else the test is over and the child's input ended.
    let _ = child.wait();
}
