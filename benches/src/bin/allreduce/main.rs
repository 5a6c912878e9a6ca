//! What ranks pay for being several: sums over the network and through shared memory beside their floors, and a model on several
//! ranks beside one.

mod ranks;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// A model on one rank of several threads beside several ranks of one
    Ranks(ranks::Options),
}

fn main() -> Result<()> {
    match Options::parse().what {
        What::Ranks(options) => ranks::run(&options),
    }
}
