//! `verbund tenant`: municipalities and their API keys.

use anyhow::{Result, bail};
use coordinator::clock::now_ms;
use coordinator::control::{Command, api_key};
use coordinator::ids::TenantId;
use serde_json::json;

use super::{Operator, print_json, print_table};

pub async fn add_tenant(
    operator: &Operator,
    id: TenantId,
    name: String,
    as_json: bool,
) -> Result<()> {
    operator
        .control
        .propose(Command::CreateTenant {
            id: id.clone(),
            name: name.clone(),
            now_ms: now_ms(),
        })
        .await?;
    if as_json {
        return print_json(&json!({"id": id, "name": name}));
    }
    println!("Tenant {id} ({name}) added. Give it a key: verbund tenant key add {id} --name NAME");
    Ok(())
}

pub async fn list_tenants(operator: &Operator, as_json: bool) -> Result<()> {
    let state = operator.control.read().await?;
    let keys = |id: &TenantId| state.api_keys.values().filter(|k| k.tenant == *id).count();
    if as_json {
        let all: Vec<_> = state
            .tenants
            .values()
            .map(|t| json!({"id": t.id, "name": t.name, "store_group": t.store_group, "created_ms": t.created_ms, "api_keys": keys(&t.id)}))
            .collect();
        return print_json(&json!(all));
    }
    let row = |t: &coordinator::control::Tenant| {
        vec![
            t.id.to_string(),
            t.name.clone(),
            t.store_group.to_string(),
            keys(&t.id).to_string(),
        ]
    };
    print_table(
        &["TENANT", "NAME", "STORE GROUP", "KEYS"],
        &state.tenants.values().map(row).collect::<Vec<_>>(),
    );
    Ok(())
}

pub async fn remove_tenant(operator: &Operator, id: TenantId, as_json: bool) -> Result<()> {
    operator
        .control
        .propose(Command::RemoveTenant { id: id.clone() })
        .await?;
    if as_json {
        return print_json(&json!({"id": id, "removed": true}));
    }
    println!("Tenant {id} and its keys removed");
    Ok(())
}

/// Prints the new key: the only time that it is seen.
pub async fn add_key(
    operator: &Operator,
    tenant: TenantId,
    name: &str,
    admin: bool,
    as_json: bool,
) -> Result<()> {
    let new = api_key(tenant, name, admin, now_ms());
    let id = new.key.id.clone();
    operator
        .control
        .propose(Command::CreateApiKey {
            sha256: new.sha256,
            key: new.key,
        })
        .await?;
    if as_json {
        return print_json(&json!({"id": id, "name": name, "admin": admin, "api_key": new.secret}));
    }
    println!("{}", new.secret);
    eprintln!("Key {id}. It is shown only now; the cluster keeps nothing but its SHA-256.");
    Ok(())
}

pub async fn list_keys(operator: &Operator, tenant: TenantId, as_json: bool) -> Result<()> {
    let state = operator.control.read().await?;
    if !state.tenants.contains_key(&tenant) {
        bail!("unknown tenant \"{tenant}\"; `verbund tenant list` shows all");
    }
    let keys = || state.api_keys.values().filter(|k| k.tenant == tenant);
    if as_json {
        let all: Vec<_> = keys().map(|k| json!({"id": k.id, "name": k.name, "admin": k.admin, "created_ms": k.created_ms})).collect();
        return print_json(&json!(all));
    }
    let rows: Vec<_> = keys()
        .map(|k| {
            vec![
                k.id.clone(),
                k.name.clone(),
                if k.admin { "admin" } else { "user" }.to_owned(),
            ]
        })
        .collect();
    print_table(&["KEY", "NAME", "RIGHTS"], &rows);
    Ok(())
}

pub async fn revoke_key(
    operator: &Operator,
    tenant: TenantId,
    id: String,
    as_json: bool,
) -> Result<()> {
    operator
        .control
        .propose(Command::RevokeApiKey {
            tenant: tenant.clone(),
            id: id.clone(),
        })
        .await?;
    if as_json {
        return print_json(&json!({"tenant": tenant, "id": id, "revoked": true}));
    }
    println!("Key {id} revoked; gateways refuse it at once");
    Ok(())
}
