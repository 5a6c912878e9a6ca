//! The sandboxed child process, with this very binary as the program: `extract` as first argument makes it the child.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rag_store::extract::{
    ExtractError, MAX_DOCUMENT_BYTES, child_main, extract, in_child, in_child_with_progress,
};

const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    if std::env::args().nth(1).as_deref() == Some("extract") {
        std::process::exit(child_main());
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
    });
    println!("extract_child: all passed");
}

fn examples() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ops/examples");
    let files = std::fs::read_dir(dir)
        .expect("examples")
        .map(|e| e.expect("entry").path());
    let mut documents: Vec<PathBuf> = files
        .filter(|p| {
            p.extension()
                .and_then(|e| e.to_str())
                .is_some_and(|e| e != "jsonl")
        })
        .collect();
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
