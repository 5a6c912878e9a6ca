//! `verbund`: one binary for every role of the cluster and for its operators.
//!
//! Tour: [`cli`] says what can be asked; [`node`] runs one server process; [`up`] runs a whole cluster of them on one
//! machine; [`setup`] makes a node's directory; [`operator`] talks to a running cluster; [`config`] reads node.toml.

mod cli;
mod config;
mod credentials;
mod logs;
mod machine;
mod models;
mod node;
mod operator;
mod setup;
mod up;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    bound_allocator();
    match cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("verbund: {error:#}");
            ExitCode::from(exit_status(&error))
        }
    }
}

/// A wrong configuration or directory stays wrong: whoever supervises the process need not start it again.
fn exit_status(error: &anyhow::Error) -> u8 {
    use coordinator::{identity, replication};
    let hopeless = error.chain().any(|cause| {
        cause.is::<config::Error>()
            || cause.is::<identity::Error>()
            || matches!(
                cause.downcast_ref(),
                Some(
                    replication::Error::Format { .. }
                        | replication::Error::Foreign { .. }
                        | replication::Error::Config { .. }
                )
            )
    });
    if hopeless { up::EXIT_CONFIG as u8 } else { 1 }
}

/// glibc keeps an arena a thread, up to eight a core, each with its own freed memory; two serve a node well.
fn bound_allocator() {
    #[cfg(target_env = "gnu")]
    // SAFETY: called before any other thread exists; sets two numbers inside the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 20);
    }
}
