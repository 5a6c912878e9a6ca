//! The child process that reads documents, by itself: the store's tests start it in place of the `verbund` binary.

fn main() {
    std::process::exit(rag_store::extract::child_main());
}
