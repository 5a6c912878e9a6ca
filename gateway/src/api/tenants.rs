//! Tenants and their keys, for admin keys. An ordinary admin sees and changes its own tenant; the operator's, all.

use axum::Json as Reply;
use axum::extract::State;
use axum::http::StatusCode;
use coordinator::clock;
use coordinator::control::{self, Command, Rejection, api_key};
use coordinator::ids::TenantId;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Deleted, List};
use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::http::auth::Admin;
use crate::http::body::{Id, Ids, Json};

/// A municipality.
#[derive(Debug, Serialize, ToSchema)]
pub struct Tenant {
    #[schema(example = "musterstadt")]
    pub id: String,
    #[schema(example = "Stadt Musterstadt")]
    pub name: String,
    /// Milliseconds since the Unix epoch.
    pub created_ms: u64,
}

/// A new municipality.
#[derive(Debug, Deserialize, ToSchema)]
pub struct NewTenant {
    /// 1 to 40 characters of a–z, 0–9 and `-`; never changes.
    #[schema(example = "musterstadt")]
    pub id: String,
    #[schema(example = "Stadt Musterstadt")]
    pub name: String,
}

/// A key, without its secret.
#[derive(Debug, Serialize, ToSchema)]
pub struct Key {
    #[schema(example = "key_0190c0de0190")]
    pub id: String,
    pub tenant: String,
    pub name: String,
    pub admin: bool,
    /// Milliseconds since the Unix epoch.
    pub created_ms: u64,
}

/// A new key.
#[derive(Debug, Deserialize, ToSchema)]
pub struct NewKey {
    /// What it is for.
    #[schema(example = "Fachverfahren Gewerbe")]
    pub name: String,
    /// Whether it may administer its tenant; not when absent.
    #[serde(default)]
    pub admin: bool,
}

/// A key that was just made.
#[derive(Debug, Serialize, ToSchema)]
pub struct MadeKey {
    #[serde(flatten)]
    pub key: Key,
    /// The key itself, shown this once and never again.
    #[schema(example = "vb-…")]
    pub secret: String,
}

impl From<&control::ApiKey> for Key {
    fn from(key: &control::ApiKey) -> Self {
        Self {
            id: key.id.clone(),
            tenant: key.tenant.to_string(),
            name: key.name.clone(),
            admin: key.admin,
            created_ms: key.created_ms,
        }
    }
}

impl From<&control::Tenant> for Tenant {
    fn from(tenant: &control::Tenant) -> Self {
        Self {
            id: tenant.id.to_string(),
            name: tenant.name.clone(),
            created_ms: tenant.created_ms,
        }
    }
}

/// The tenants that the key may administer.
#[utoipa::path(
    get, path = "/api/tenants", tag = "administration",
    responses(
        (status = 200, body = List<Tenant>),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 403, description = "Not an admin key", body = ErrorBody)
    )
)]
pub async fn list(State(app): State<App>, admin: Admin) -> Reply<List<Tenant>> {
    let state = app.control.state();
    Reply(List::of(
        state
            .tenants
            .values()
            .filter(|tenant| admin.may_administer(&tenant.id)),
    ))
}

/// Makes a tenant. Needs an operator's key.
#[utoipa::path(
    post, path = "/api/tenants", tag = "administration", request_body = NewTenant,
    responses(
        (status = 201, body = Tenant),
        (status = 400, description = "The id or the name is not allowed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 403, description = "Not an operator's key", body = ErrorBody),
        (status = 409, description = "There is a tenant of this id", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 503, description = "The coordinators do not answer; ask again", body = ErrorBody)
    )
)]
pub async fn create(
    State(app): State<App>,
    admin: Admin,
    Json(new): Json<NewTenant>,
) -> Result<(StatusCode, Reply<Tenant>), ApiError> {
    admin.require_operator()?;
    let id =
        TenantId::new(new.id).map_err(|error| ApiError::invalid("id", format!("id: {error}")))?;
    let now_ms = clock::now_ms();
    let command = Command::CreateTenant {
        id: id.clone(),
        name: new.name.clone(),
        now_ms,
    };
    app.control
        .propose(command)
        .await
        .map_err(|error| refused(error, "tenant", id.as_str()))?;
    Ok((
        StatusCode::CREATED,
        Reply(Tenant {
            id: id.to_string(),
            name: new.name,
            created_ms: now_ms,
        }),
    ))
}

/// The keys of a tenant, without their secrets.
#[utoipa::path(
    get, path = "/api/tenants/{id}/keys", tag = "administration",
    params(("id" = String, Path, description = "Id of the tenant")),
    responses(
        (status = 200, body = List<Key>),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 403, description = "Not an admin key", body = ErrorBody),
        (status = 404, description = "No such tenant", body = ErrorBody)
    )
)]
pub async fn keys(
    State(app): State<App>,
    admin: Admin,
    Id(id): Id,
) -> Result<Reply<List<Key>>, ApiError> {
    let tenant = administered(&app, &admin, &id)?;
    let state = app.control.state();
    let mut keys: Vec<Key> = state
        .api_keys
        .values()
        .filter(|key| key.tenant == tenant)
        .map(Key::from)
        .collect();
    keys.sort_by(|a, b| (a.created_ms, &a.id).cmp(&(b.created_ms, &b.id)));
    Ok(Reply(List {
        object: "list",
        data: keys,
    }))
}

/// Makes a key. The answer holds the key itself, this once.
#[utoipa::path(
    post, path = "/api/tenants/{id}/keys", tag = "administration", request_body = NewKey,
    params(("id" = String, Path, description = "Id of the tenant")),
    responses(
        (status = 201, body = MadeKey),
        (status = 400, description = "The name is not allowed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 403, description = "Not an admin key", body = ErrorBody),
        (status = 404, description = "No such tenant", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 503, description = "The coordinators do not answer; ask again", body = ErrorBody)
    )
)]
pub async fn create_key(
    State(app): State<App>,
    admin: Admin,
    Id(id): Id,
    Json(new): Json<NewKey>,
) -> Result<(StatusCode, Reply<MadeKey>), ApiError> {
    let tenant = administered(&app, &admin, &id)?;
    let made = api_key(tenant, &new.name, new.admin, clock::now_ms());
    let command = Command::CreateApiKey {
        sha256: made.sha256,
        key: made.key.clone(),
    };
    app.control
        .propose(command)
        .await
        .map_err(|error| refused(error, "tenant", &id))?;
    Ok((
        StatusCode::CREATED,
        Reply(MadeKey {
            key: Key::from(&made.key),
            secret: made.secret,
        }),
    ))
}

/// Revokes a key; requests with it are refused from then on.
#[utoipa::path(
    delete, path = "/api/tenants/{id}/keys/{key}", tag = "administration",
    params(("id" = String, Path, description = "Id of the tenant"), ("key" = String, Path, description = "key_…")),
    responses(
        (status = 200, body = Deleted),
        (status = 400, description = "The key that asks cannot revoke itself", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 403, description = "Not an admin key", body = ErrorBody),
        (status = 404, description = "No such tenant or key", body = ErrorBody),
        (status = 503, description = "The coordinators do not answer; ask again", body = ErrorBody)
    )
)]
pub async fn revoke_key(
    State(app): State<App>,
    admin: Admin,
    Ids(id, key): Ids,
) -> Result<Reply<Deleted>, ApiError> {
    let tenant = administered(&app, &admin, &id)?;
    if key == admin.0.key.id {
        return Err(ApiError::invalid(
            "key",
            "key: a key cannot revoke itself; use another admin key",
        ));
    }
    let command = Command::RevokeApiKey {
        tenant,
        id: key.clone(),
    };
    app.control
        .propose(command)
        .await
        .map_err(|error| refused(error, "key", &key))?;
    Ok(Reply(Deleted::new(key)))
}

/// The tenant in a path, if it exists and the key may administer it; both failures look the same.
fn administered(app: &App, admin: &Admin, id: &str) -> Result<TenantId, ApiError> {
    TenantId::new(id)
        .ok()
        .filter(|tenant| {
            admin.may_administer(tenant) && app.control.state().tenants.contains_key(tenant)
        })
        .ok_or_else(|| ApiError::not_found("tenant", id))
}

/// Why control did not do it.
fn refused(error: control::Error, what: &'static str, id: &str) -> ApiError {
    let message = error.to_string();
    match error {
        control::Error::Rejected(Rejection::Unknown { .. }) => ApiError::not_found(what, id),
        control::Error::Rejected(Rejection::Exists { .. }) => ApiError::conflict("id", message),
        control::Error::Rejected(Rejection::Invalid { what, .. }) => {
            ApiError::invalid(what, message)
        }
        control::Error::Rejected(_) => ApiError::malformed("rejected", message),
        control::Error::Denied { .. } => ApiError::internal(message),
        control::Error::Unavailable { .. } => ApiError::unavailable("cluster_unavailable", message),
        control::Error::Protocol { .. } => ApiError::internal(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_control_refuses_becomes_the_fitting_status() {
        use coordinator::control::Subject;
        let cases = [
            (
                Rejection::Unknown {
                    what: Subject::ApiKey,
                    id: "key_1".into(),
                },
                404,
            ),
            (
                Rejection::Exists {
                    what: Subject::Tenant,
                    id: "a".into(),
                },
                409,
            ),
            (
                Rejection::Invalid {
                    what: "name".into(),
                    expected: "1 to 200 bytes".into(),
                    got: "0".into(),
                },
                400,
            ),
            (
                Rejection::Limit {
                    what: Subject::Tenant,
                    limit: 5000,
                },
                400,
            ),
        ];
        for (rejection, status) in cases {
            let error = refused(rejection.clone().into(), "key", "key_1");
            assert_eq!(error.status().as_u16(), status, "{rejection:?}");
        }
        let unavailable = control::Error::Unavailable {
            waited_ms: 5000,
            why: "none".into(),
        };
        assert_eq!(refused(unavailable, "key", "key_1").status().as_u16(), 503);
    }
}
