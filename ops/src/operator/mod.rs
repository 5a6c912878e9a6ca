//! What an operator asks of a running cluster, with the operator's identity kept in a data directory.
//!
//! Here belong the commands that talk to coordinators: status, models, tenants, tokens. Not here: setting up a node
//! (room `setup`), running one (room `node`).

mod model;
mod status;
mod tenant;
mod token;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result};
use coordinator::control::ControlHandle;
use coordinator::transport::Transport;

use crate::credentials;

pub use model::{NewModel, add, list, plan, remove};
pub use status::status;
pub use tenant::{add_key, add_tenant, list_keys, list_tenants, remove_tenant, revoke_key};
pub use token::token;

/// An operator's connection to the cluster.
pub struct Operator {
    pub transport: Transport,
    pub control: ControlHandle,
    pub seeds: Vec<SocketAddr>,
    pub ca_fingerprint: [u8; 32],
}

/// Takes the operator's identity from `data`; connects when first asked.
///
/// # Errors
/// When there is no identity or no socket.
pub fn connect(data: &Path) -> Result<Operator> {
    let (identity, seeds) = credentials::load_operator(data)?;
    let ca_fingerprint = identity.ca_fingerprint()?;
    let transport = Transport::bind(&identity, SocketAddr::new(source(&seeds), 0))?;
    let control = ControlHandle::connect(transport.clone(), seeds.clone());
    Ok(Operator {
        transport,
        control,
        seeds,
        ca_fingerprint,
    })
}

/// The narrowest address from which all coordinators can be reached.
fn source(seeds: &[SocketAddr]) -> IpAddr {
    let v6 = seeds.iter().any(SocketAddr::is_ipv6);
    match (seeds.iter().all(|s| s.ip().is_loopback()), v6) {
        (true, false) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        (true, true) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        (false, false) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        (false, true) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }
}

/// Prints `value` as JSON.
pub fn print_json(value: &serde_json::Value) -> Result<()> {
    println!(
        "{}",
        serde_json::to_string_pretty(value).context("cannot print as JSON")?
    );
    Ok(())
}

/// Prints rows under a head, columns aligned.
fn print_table(head: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<_> = cells
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        println!("{}", padded.join("  ").trim_end());
    };
    line(&mut head.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
}

/// Bytes for people.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_rounded_for_people() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (98_362_432, "93.8 MiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn an_operator_binds_no_wider_than_its_coordinators_need() {
        let of = |seeds: &[&str]| {
            source(
                &seeds
                    .iter()
                    .map(|s| s.parse().expect("address"))
                    .collect::<Vec<_>>(),
            )
            .to_string()
        };
        assert_eq!(of(&["127.0.0.1:1", "127.0.0.1:2"]), "127.0.0.1");
        assert_eq!(of(&["127.0.0.1:1", "10.0.0.1:2"]), "0.0.0.0");
        assert_eq!(of(&["[::1]:1"]), "::1");
        assert_eq!(of(&["[fd00::1]:1"]), "::");
    }
}
