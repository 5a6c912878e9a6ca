use super::*;

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
