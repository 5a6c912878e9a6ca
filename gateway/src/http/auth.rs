//! Who asks: the key of a request gives tenant and rights.

use axum::extract::{FromRef, FromRequestParts};
use axum::http::header;
use axum::http::request::Parts;
use coordinator::control::ApiKey;
use coordinator::ids::TenantId;

use crate::app::App;
use crate::error::ApiError;
use crate::http::layers::Trail;

/// The sender of a request, proven by its API key.
#[derive(Debug, Clone)]
pub struct Caller {
    pub key: ApiKey,
    /// Whether the key may see and change tenants other than its own.
    pub operator: bool,
}

impl Caller {
    /// The tenant that the request belongs to.
    pub fn tenant(&self) -> &TenantId {
        &self.key.tenant
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller
where
    App: FromRef<S>,
{
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let app = App::from_ref(state);
        let header = parts.headers.get(header::AUTHORIZATION);
        let token = bearer(header.map(|value| value.as_bytes()))?;
        let Some(key) = app.control.authenticate(token) else {
            // A gateway that has not heard from the coordinators yet knows no key at all.
            if app.control.state().revision == 0 {
                return Err(ApiError::unavailable(
                    "cluster_unknown",
                    "this gateway has not reached a coordinator yet; try again in a few seconds",
                ));
            }
            return Err(ApiError::unauthenticated(
                "the API key is not valid; check it, or ask your administrator for a new one",
            ));
        };
        if let Some(trail) = parts.extensions.get::<Trail>() {
            trail.set_tenant(&key.tenant);
        }
        let operator = key.admin && app.config.operator_tenant.as_ref() == Some(&key.tenant);
        Ok(Self { key, operator })
    }
}

/// A caller whose key may administer its tenant.
#[derive(Debug, Clone)]
pub struct Admin(pub Caller);

impl Admin {
    /// Whether the key may administer `tenant`. Another tenant looks as one that does not exist.
    pub fn may_administer(&self, tenant: &TenantId) -> bool {
        self.0.operator || self.0.tenant() == tenant
    }

    /// Refuses all but the operator's keys.
    pub fn require_operator(&self) -> Result<(), ApiError> {
        if self.0.operator {
            return Ok(());
        }
        Err(ApiError::forbidden(
            "this needs an admin key of the operator's tenant (operator_tenant in the gateway's configuration)",
        ))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Admin
where
    App: FromRef<S>,
{
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let caller = Caller::from_request_parts(parts, state).await?;
        if !caller.key.admin {
            return Err(ApiError::forbidden(
                "this needs an admin key; the key that came is an ordinary one",
            ));
        }
        Ok(Self(caller))
    }
}

/// The token of an `Authorization: Bearer …` header.
fn bearer(header: Option<&[u8]>) -> Result<&str, ApiError> {
    let Some(header) = header else {
        return Err(ApiError::unauthenticated(
            "no API key; send it as the header `Authorization: Bearer KEY`",
        ));
    };
    let wrong = || {
        ApiError::unauthenticated(
            "expected the header `Authorization: Bearer KEY`, got another form",
        )
    };
    let header = std::str::from_utf8(header).map_err(|_| wrong())?;
    let (scheme, token) = header.split_once(' ').ok_or_else(wrong)?;
    let token = token.trim();
    if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
        return Err(wrong());
    }
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bearer_token_is_taken() {
        assert_eq!(bearer(Some(b"Bearer vbk-1")).unwrap(), "vbk-1");
        assert_eq!(bearer(Some(b"bearer   vbk-1 ")).unwrap(), "vbk-1");
        for wrong in [
            &b"Basic dTpw"[..],
            b"Bearer",
            b"Bearer ",
            b"vbk-1",
            b"\xff\xfe",
            b"",
        ] {
            assert_eq!(
                bearer(Some(wrong)).unwrap_err().status().as_u16(),
                401,
                "{wrong:?}"
            );
        }
        assert_eq!(bearer(None).unwrap_err().status().as_u16(), 401);
    }
}
