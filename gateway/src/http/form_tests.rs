use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

const BOUNDARY: &str = "grenze";

/// Name, file name, media type, content.
type Part<'a> = (&'a str, Option<&'a str>, Option<&'a str>, &'a [u8]);

fn form(parts: &[Part<'_>]) -> Request {
    let mut body = Vec::new();
    for (name, file, media_type, content) in parts {
        body.extend(
            format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"").bytes(),
        );
        if let Some(file) = file {
            body.extend(format!("; filename=\"{file}\"").bytes());
        }
        if let Some(media_type) = media_type {
            body.extend(format!("\r\nContent-Type: {media_type}").bytes());
        }
        body.extend(b"\r\n\r\n");
        body.extend(*content);
        body.extend(b"\r\n");
    }
    body.extend(format!("--{BOUNDARY}--\r\n").bytes());
    request(body)
}

fn request(body: Vec<u8>) -> Request {
    let content_type = format!("multipart/form-data; boundary={BOUNDARY}");
    Request::builder()
        .method("POST")
        .header("content-type", content_type)
        .body(Body::from(body))
        .unwrap()
}

async fn read(request: Request, limit: u64) -> Result<File, ApiError> {
    read_file(request, limit, ()).await.map(|(file, ())| file)
}

/// A body that comes piece by piece without a declared length, and how many of its bytes were taken.
fn chunked(first: &str, pieces: usize, piece: Bytes) -> (Request, Arc<AtomicUsize>) {
    let taken = Arc::new(AtomicUsize::new(0));
    let count = taken.clone();
    let first = Bytes::from(format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; {first}"
    ));
    let frames = std::iter::once(first).chain(std::iter::repeat_n(piece, pieces));
    let stream = futures::stream::iter(frames).map(move |bytes| {
        count.fetch_add(bytes.len(), Ordering::SeqCst);
        Ok::<_, std::io::Error>(bytes)
    });
    let mut request = request(Vec::new());
    *request.body_mut() = Body::from_stream(stream);
    (request, taken)
}

#[tokio::test]
async fn the_file_is_taken_from_among_other_parts() {
    let parts = [
        ("note", None, None, &b"x"[..]),
        (
            "file",
            Some("C:\\Ablage\\Gebühren.md"),
            Some("application/octet-stream"),
            "Gebühr".as_bytes(),
        ),
    ];
    let file = read(form(&parts), 100).await.unwrap();
    assert_eq!(
        (file.name.as_str(), file.media_type.as_str()),
        ("Gebühren.md", "text/markdown")
    );
    assert_eq!(file.bytes, "Gebühr".as_bytes());
}

#[tokio::test]
async fn a_file_of_the_limit_is_taken_and_one_byte_more_is_not() {
    let content = vec![b'x'; 1000];
    let parts = [(
        "file",
        Some("a.txt"),
        Some("text/plain"),
        content.as_slice(),
    )];
    assert_eq!(read(form(&parts), 1000).await.unwrap().bytes.len(), 1000);
    let error = read(form(&parts), 999).await.unwrap_err();
    assert_eq!((error.status().as_u16(), error.code()), (413, "too_large"));
    assert!(error.message().contains("999 bytes"), "{}", error.message());
}

#[tokio::test]
async fn a_form_without_a_usable_file_is_refused() {
    let cases = [
        (form(&[("other", Some("a.txt"), None, b"x")]), "got none"),
        (form(&[("file", None, None, b"x")]), "file name"),
        (form(&[("file", Some(".."), None, b"x")]), "file name"),
        (request(b"not a form at all".to_vec()), "could not be read"),
        (request(format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\ncut").into_bytes()), "could not be read"),
        (Request::builder().header("content-type", "application/json").body(Body::from("{}")).unwrap(), "multipart/form-data"),
    ];
    for (request, expected) in cases {
        let error = read(request, 100).await.expect_err(expected);
        assert_eq!(error.status().as_u16(), 400, "{expected}");
        assert!(
            error.message().contains(expected),
            "{expected}: {}",
            error.message()
        );
    }
}

#[test]
fn names_lose_their_folders_and_keep_no_control_characters() {
    let cases = [
        ("a.pdf", Some("a.pdf")),
        ("../../etc/passwd", Some("passwd")),
        ("C:\\x\\b.docx", Some("b.docx")),
        ("  c.txt ", Some("c.txt")),
        ("", None),
        ("x/", None),
        ("a\u{0}b", None),
        ("a\nb", None),
    ];
    for (name, expected) in cases {
        assert_eq!(clean_name(name).as_deref(), expected, "{name:?}");
    }
    assert_eq!(clean_name(&"x".repeat(MAX_NAME_CHARS + 1)), None);
}

#[tokio::test]
async fn a_file_of_5_mib_comes_whole() {
    let content: Vec<u8> = (0..5 << 20).map(|i: u32| ((i * 31) >> 7) as u8).collect();
    let parts = [("file", Some("a.pdf"), None, content.as_slice())];
    let file = read(form(&parts), 50 << 20).await.unwrap();
    assert!(
        file.bytes == content,
        "{} bytes came or others",
        file.bytes.len()
    );
}

#[tokio::test]
async fn what_is_too_large_is_refused_read_to_its_end_and_gives_its_slot_back_before() {
    const PIECE: usize = 16 << 10;
    for first in [
        "name=\"file\"; filename=\"a.txt\"\r\n\r\n",
        "name=\"note\"\r\n\r\n",
        "name=\"file\"; filename=\"a.txt\"\r\nX-Header-Without-End: ",
    ] {
        #[derive(Debug)]
        struct Slot(Arc<AtomicUsize>, Arc<AtomicUsize>);
        impl Drop for Slot {
            fn drop(&mut self) {
                self.1
                    .store(self.0.load(Ordering::SeqCst), Ordering::SeqCst);
            }
        }
        let (request, taken) = chunked(first, 100, Bytes::from(vec![b'x'; PIECE]));
        let taken_at_release = Arc::new(AtomicUsize::new(0));
        let slot = Slot(taken.clone(), taken_at_release.clone());
        let error = read_file(request, 1 << 20, slot).await.unwrap_err();
        assert_eq!(
            (error.status().as_u16(), error.code()),
            (413, "too_large"),
            "{first}: {}",
            error.message()
        );
        let released = taken_at_release.load(Ordering::SeqCst);
        let most = (1 << 20) + OVERHEAD_BYTES as usize + 2 * PIECE;
        assert!(released <= most, "{first}: {released} bytes were held");
        assert!(
            taken.load(Ordering::SeqCst) > 100 * PIECE,
            "{first}: the client still writes and would not read the answer"
        );
    }
}
