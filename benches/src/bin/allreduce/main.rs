//! What ranks pay for being several: sums over the network and through shared memory beside their floors, and a model on several
//! ranks beside one.

mod measure;
mod net;
mod quality;
mod ranks;
mod relay;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Sums through shared memory, over loopback, and between network namespaces with delay and limited rate (needs root)
    Net(net::Options),
    /// Perplexity and top-1 agreement of each wire format
    Quality(quality::Options),
    /// A model on one rank of several threads beside several ranks of one
    Ranks(ranks::Options),
}

fn main() -> Result<()> {
    match Options::parse().what {
        What::Net(options) => net::run(&options),
        What::Quality(options) => quality::run(&options),
        What::Ranks(options) => ranks::run(&options),
    }
}
