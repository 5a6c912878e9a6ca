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
    let file = read_file(form(&parts), 100).await.unwrap();
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
    assert_eq!(
        read_file(form(&parts), 1000).await.unwrap().bytes.len(),
        1000
    );
    let error = read_file(form(&parts), 999).await.err().unwrap();
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
        let error = read_file(request, 100).await.err().expect(expected);
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

#[test]
fn what_a_browser_would_run_goes_out_as_bytes() {
    for dangerous in [
        "text/html",
        "image/svg+xml",
        "application/xhtml+xml",
        "text/html; charset=utf-8",
        "",
        "nonsense",
    ] {
        assert_eq!(
            presentation(dangerous),
            ("application/octet-stream", "attachment"),
            "{dangerous}"
        );
    }
    assert_eq!(
        presentation("application/pdf"),
        ("application/pdf", "inline")
    );
}

#[test]
fn file_names_travel_in_headers_whatever_they_hold() {
    assert_eq!(
        percent_encode("Gebühr \"1\";\r\n.pdf"),
        "Geb%C3%BChr%20%221%22%3B%0D%0A.pdf"
    );
}
