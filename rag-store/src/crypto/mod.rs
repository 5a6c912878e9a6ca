//! Sealing at rest: AES-256-GCM under a data key per document, wrapped by the tenant's key, wrapped by the cluster's.
//! Only keys, places and sealed bytes here; what is stored where is the store's business.
//!
//! Nonces are random, 96 bits: a data key seals at most some thousand values (the bound of NIST SP 800-38D is 2³²). They
//! are drawn by whoever proposes a command, never while one is applied, so that replicas stay identical.

pub(crate) mod bytes_run;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit, Nonce};
use hkdf::Hkdf;
use rand::RngCore;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::{Zeroize, ZeroizeOnDrop};

const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;

/// Sealed bytes could not be opened: another key, another place, or damage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a sealed value does not open: expected one sealed with this cluster's key for this place; was the cluster key replaced or the disk damaged?"
)]
pub struct OpenError;

/// A 256-bit key; wiped from memory when dropped, printed never.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Key([u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[key]")
    }
}

/// Nonce, ciphertext and tag. Serialised as one run of bytes, since parts of originals are a MiB each.
#[derive(Clone, PartialEq, Eq)]
pub struct Sealed(Vec<u8>);

impl std::fmt::Debug for Sealed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{} sealed bytes]", self.0.len())
    }
}

impl Sealed {
    /// Takes stored bytes as they are; whether they open shows in [`Key::open`].
    pub fn from_stored(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes to store.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Serialize for Sealed {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        bytes_run::serialize(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Sealed {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bytes_run::deserialize(deserializer).map(Sealed)
    }
}

impl Key {
    /// A fresh random key.
    pub fn generate() -> Self {
        let mut bytes = [0; 32];
        rand::rng().fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// The store's root key, derived from the cluster key, so that the cluster key itself seals nothing.
    pub fn root(cluster_key: &[u8; 32]) -> Self {
        let mut bytes = [0; 32];
        expand(cluster_key, b"verbund store root 1", &mut bytes);
        Self(bytes)
    }

    /// Seals `plain` for `place`: moved to another place, it does not open.
    pub fn seal(&self, place: &[u8], plain: &[u8]) -> Sealed {
        let mut nonce = [0; NONCE_BYTES];
        rand::rng().fill_bytes(&mut nonce);
        let cipher = Aes256Gcm::new(&self.0.into());
        let sealed = cipher
            .encrypt(
                Nonce::from_slice(&nonce),
                Payload {
                    msg: plain,
                    aad: place,
                },
            )
            .expect("AES-GCM seals up to 64 GiB, and values are at most some MiB");
        let mut bytes = Vec::with_capacity(NONCE_BYTES + sealed.len());
        bytes.extend_from_slice(&nonce);
        bytes.extend_from_slice(&sealed);
        Sealed(bytes)
    }

    /// The plain bytes that were sealed for `place`.
    pub fn open(&self, place: &[u8], sealed: &Sealed) -> Result<Vec<u8>, OpenError> {
        if sealed.0.len() < NONCE_BYTES + TAG_BYTES {
            return Err(OpenError);
        }
        let (nonce, body) = sealed.0.split_at(NONCE_BYTES);
        Aes256Gcm::new(&self.0.into())
            .decrypt(
                Nonce::from_slice(nonce),
                Payload {
                    msg: body,
                    aad: place,
                },
            )
            .map_err(|_| OpenError)
    }

    /// Seals another key for `place`.
    pub fn wrap(&self, place: &[u8], inner: &Key) -> Sealed {
        self.seal(place, &inner.0)
    }

    /// The key that was wrapped for `place`.
    pub fn unwrap_key(&self, place: &[u8], wrapped: &Sealed) -> Result<Key, OpenError> {
        let mut plain = self.open(place, wrapped)?;
        let key = <[u8; 32]>::try_from(plain.as_slice())
            .map(Key)
            .map_err(|_| OpenError);
        plain.zeroize();
        key
    }

    /// A keyed fingerprint of a name: equal names of one tenant meet in it, and it tells nothing without the key.
    pub fn name_tag(&self, name: &str) -> [u8; 16] {
        let mut tag = [0; 16];
        let mut info = b"verbund name tag 1 ".to_vec();
        info.extend_from_slice(name.as_bytes());
        expand(&self.0, &info, &mut tag);
        tag
    }
}

fn expand(key: &[u8; 32], info: &[u8], out: &mut [u8]) {
    Hkdf::<Sha256>::new(None, key)
        .expand(info, out)
        .expect("HKDF gives up to 8160 bytes, and this asks for at most 32");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sealed_opens_only_with_its_key_at_its_place_and_unchanged() {
        let key = Key::generate();
        let sealed = key.seal(b"here", b"Hundesteuer");
        assert_eq!(key.open(b"here", &sealed).unwrap(), b"Hundesteuer");
        assert_eq!(key.open(b"there", &sealed), Err(OpenError));
        assert_eq!(Key::generate().open(b"here", &sealed), Err(OpenError));
        for at in 0..sealed.0.len() {
            let mut bent = sealed.clone();
            bent.0[at] ^= 1;
            assert_eq!(
                key.open(b"here", &bent),
                Err(OpenError),
                "byte {at} flipped"
            );
        }
        for len in 0..sealed.0.len() {
            assert_eq!(
                key.open(b"here", &Sealed(sealed.0[..len].to_vec())),
                Err(OpenError),
                "cut to {len}"
            );
        }
    }

    #[test]
    fn sealing_twice_gives_different_bytes_and_never_the_plain_ones() {
        let key = Key::generate();
        let plain = b"a text long enough to be found";
        let (one, two) = (key.seal(b"", plain), key.seal(b"", plain));
        assert_ne!(one, two);
        assert!(!one.0.windows(8).any(|w| plain.windows(8).any(|p| p == w)));
    }

    #[test]
    fn wrapped_keys_come_back_and_survive_serialisation() {
        let (outer, inner) = (Key::generate(), Key::generate());
        let wrapped = outer.wrap(b"k", &inner);
        let bytes = postcard::to_stdvec(&wrapped).unwrap();
        let back: Sealed = postcard::from_bytes(&bytes).unwrap();
        assert!(outer.unwrap_key(b"k", &back).unwrap() == inner);
        assert_eq!(
            outer.unwrap_key(b"k", &outer.seal(b"k", b"short")),
            Err(OpenError)
        );
    }

    #[test]
    fn name_tags_depend_on_key_and_name_only() {
        let (a, b) = (Key::generate(), Key::generate());
        assert_eq!(a.name_tag("Satzungen"), a.name_tag("Satzungen"));
        assert_ne!(a.name_tag("Satzungen"), a.name_tag("Satzung"));
        assert_ne!(a.name_tag("Satzungen"), b.name_tag("Satzungen"));
    }
}
