//! Names of things that cross crate boundaries, and what a node says about itself when it joins.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $int:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = std::num::ParseIntError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map($name)
            }
        }
    };
}

number_id!(
    /// A server process of the cluster; 0 is never given out.
    NodeId, u64
);
number_id!(
    /// An inference group: the ranks that together hold one whole model.
    GroupId, u64
);
number_id!(
    /// One forming of an inference group; each re-forming has a larger one.
    Epoch, u64
);
number_id!(
    /// A Raft group: 0 is control, 1 and above are the store's.
    RaftGroupId, u64
);
number_id!(
    /// A worker process's place in its group; 0 is the leader.
    Rank, u32
);

/// The group of the control state.
pub const CONTROL_GROUP: RaftGroupId = RaftGroupId(0);

/// Longest tenant id; it is part of every key of the store.
pub const MAX_TENANT_ID_BYTES: usize = 40;

/// A municipality: 1 to 40 characters of `a`–`z`, `0`–`9` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TenantId(String);

/// What is wrong with a tenant id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a tenant id has 1 to {} characters of a-z, 0-9 and '-', got {got:?}",
    MAX_TENANT_ID_BYTES
)]
pub struct InvalidTenantId {
    pub got: String,
}

impl TenantId {
    /// # Errors
    /// The text is empty, too long or has other characters than `a`–`z`, `0`–`9`, `-`.
    pub fn new(text: impl Into<String>) -> Result<Self, InvalidTenantId> {
        let text = text.into();
        let fits = (1..=MAX_TENANT_ID_BYTES).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if fits {
            Ok(Self(text))
        } else {
            Err(InvalidTenantId {
                got: text.chars().take(64).collect(),
            })
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for TenantId {
    type Error = InvalidTenantId;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::new(text)
    }
}

impl FromStr for TenantId {
    type Err = InvalidTenantId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::new(text)
    }
}

impl From<TenantId> for String {
    fn from(id: TenantId) -> Self {
        id.0
    }
}

impl AsRef<str> for TenantId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a node does for the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Coordinator,
    Store,
    Worker,
    Gateway,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Coordinator => "coordinator",
            Role::Store => "store",
            Role::Worker => "worker",
            Role::Gateway => "gateway",
        })
    }
}

/// A device that can hold a rank, with what was measured of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Device {
    pub kind: DeviceKind,
    pub name: String,
    pub memory_bytes: u64,
    pub read_bytes_per_s: u64,
    /// CPU threads that a rank on this device uses; 0 on a GPU.
    pub threads: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    Cpu,
    Cuda,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenant_ids_are_checked_wherever_they_enter() {
        for good in ["a", "musterstadt", "kommune-7", &"x".repeat(40)] {
            assert_eq!(TenantId::new(good).map(String::from), Ok(good.to_owned()));
        }
        for bad in ["", "Musterstadt", "a/b", "ä", "a b", "a\0", &"x".repeat(41)] {
            assert!(TenantId::new(bad).is_err(), "{bad:?}");
            let wire = postcard::to_stdvec(bad).expect("a string serialises");
            assert!(
                postcard::from_bytes::<TenantId>(&wire).is_err(),
                "{bad:?} on the wire"
            );
        }
    }
}
