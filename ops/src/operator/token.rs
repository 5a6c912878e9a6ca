//! `verbund token`: lets one more node in.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, bail};
use coordinator::clock::now_ms;
use coordinator::control::{Role, new_join_token};
use serde_json::json;

use super::{Operator, print_json};

/// A token is for a node that is being set up right now.
const MAX_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Makes a one-time token for a node with these roles and prints it.
pub async fn token(
    operator: &Operator,
    roles: BTreeSet<Role>,
    life: Duration,
    as_json: bool,
) -> Result<()> {
    if life.is_zero() || life > MAX_LIFE {
        bail!(
            "--valid-for: expected 1 second to 7 days, got {} s",
            life.as_secs()
        );
    }
    let state = operator.control.read().await?;
    let coordinators = state
        .nodes_with(Role::Coordinator)
        .filter(|n| n.up)
        .map(|n| n.addr);
    let mut addrs: Vec<_> = coordinators.collect();
    if addrs.is_empty() {
        addrs = operator.seeds.clone();
    }
    let expires_ms = now_ms().saturating_add(u64::try_from(life.as_millis()).unwrap_or(u64::MAX));
    let (token, command) =
        new_join_token(operator.ca_fingerprint, addrs, roles.clone(), expires_ms);
    operator.control.propose(command).await?;
    if as_json {
        return print_json(
            &json!({"token": token.to_string(), "roles": roles, "expires_ms": expires_ms}),
        );
    }
    println!("{token}");
    eprintln!(
        "Valid once, for {} minutes. On the new node: verbund join --token vbj1-…",
        life.as_secs() / 60
    );
    Ok(())
}
