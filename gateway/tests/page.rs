//! The web page when things go wrong, in headless Chromium against a made-up gateway (`ui/tests/page.mjs`). A whole cluster and
//! the page on it are ops' tests.

use std::path::Path;
use std::process::Command;

#[test]
fn the_page_says_in_german_what_went_wrong_and_goes_on() {
    let ui = Path::new(env!("CARGO_MANIFEST_DIR")).join("ui");
    let done = Command::new("node")
        .current_dir(ui)
        .arg("tests/page.mjs")
        .status()
        .expect("node; `ops/setup tools` installs it");
    assert!(
        done.success(),
        "the page's checks failed; they need `ops/setup page` and `ops/setup tests`"
    );
}
