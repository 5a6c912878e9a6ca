//! API keys and the hashes under which secrets are kept.

use rand::RngCore;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::state::{ApiKey, ControlState};
use crate::ids::TenantId;

/// What every API key begins with, so that secret scanners and people recognise one.
pub const API_KEY_PREFIX: &str = "vb-";
/// A key is the prefix and 64 hexadecimal digits; anything longer is refused before it is hashed.
const MAX_API_KEY_BYTES: usize = 128;

/// SHA-256 of a secret: what the state keeps instead of it. Plain hashing is right for 256 random bits.
pub fn sha256(secret: &[u8]) -> [u8; 32] {
    Sha256::digest(secret).into()
}

/// 32 bytes from the operating system's generator.
pub fn random_secret() -> [u8; 32] {
    let mut secret = [0; 32];
    rand::rng().fill_bytes(&mut secret);
    secret
}

/// A fresh API key: `secret` is shown once and never kept.
pub struct NewApiKey {
    pub secret: String,
    pub sha256: [u8; 32],
    pub key: ApiKey,
}

/// Makes a fresh key of 256 random bits for `tenant`.
pub fn api_key(tenant: TenantId, name: &str, admin: bool, now_ms: u64) -> NewApiKey {
    let secret = format!("{API_KEY_PREFIX}{}", hex::encode(random_secret()));
    api_key_from(secret, tenant, name, admin, now_ms)
}

/// The record of a key whose secret is already known, as when a set-up keeps the key in a file.
pub fn api_key_from(
    secret: String,
    tenant: TenantId,
    name: &str,
    admin: bool,
    now_ms: u64,
) -> NewApiKey {
    let sha256 = sha256(secret.as_bytes());
    let id = format!("key_{}", hex::encode(&sha256[..6]));
    NewApiKey {
        secret,
        sha256,
        key: ApiKey {
            id,
            tenant,
            name: name.to_owned(),
            admin,
            created_ms: now_ms,
        },
    }
}

impl ControlState {
    /// What `key` stands for, if it is valid. Looks at every stored hash in constant time each, so that the time taken
    /// tells nothing about how much of a guess was right.
    pub fn authenticate(&self, key: &str) -> Option<&ApiKey> {
        if !key.starts_with(API_KEY_PREFIX) || key.len() > MAX_API_KEY_BYTES {
            return None;
        }
        let sha = sha256(key.as_bytes());
        let mut found = None;
        for (stored, key) in &self.api_keys {
            if bool::from(stored.ct_eq(&sha)) {
                found = Some(key);
            }
        }
        found
    }
}
