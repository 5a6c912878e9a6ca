//! Lets the crate compile before the web page was built, and again whenever the built page changes.

use std::path::Path;

fn main() {
    let dist = Path::new("ui/dist");
    // An empty folder is enough: the gateway serves a note in place of the page (src/page.rs).
    if !dist.exists()
        && let Err(error) = std::fs::create_dir_all(dist)
    {
        println!(
            "cargo::warning=cannot create gateway/{}: {error}",
            dist.display()
        );
    }
    println!("cargo::rerun-if-changed=ui/dist");
    println!("cargo::rerun-if-changed=build.rs");
}
