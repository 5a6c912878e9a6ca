//! Microbenchmarks: `cargo bench --locked --workspace --bench micro -- attention` runs those whose name contains a word.
//!
//! For a kernel's share of the machine's limits there is the program `kernels`.

mod kernel;
mod plan;
mod text;

fn main() {
    divan::main();
}
