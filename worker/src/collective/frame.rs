//! Frames between two ranks: a header in the clear, authenticated, and a payload under AES-256-GCM.
//!
//! Version 2. Header, little-endian: magic `VBC2`, kind u8, lane u8, two zero bytes, payload length u32, epoch u64, sequence number
//! u64. Then the payload, encrypted, and its 16-byte tag. The nonce is the sequence number; each direction of each connection has a
//! key of its own, so no nonce comes twice under a key, and a frame that is repeated, dropped, reordered or reflected does not open.

use hkdf::Hkdf;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use sha2::Sha256;

use super::Error;

/// Longest payload of one frame; longer messages are several frames, the first on its way while the next is encrypted.
pub const MAX_PAYLOAD_BYTES: usize = 256 << 10;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 28;
/// Bytes after the payload.
pub const TAG_BYTES: usize = 16;
/// Messages of different lanes of a connection may overtake each other.
pub const LANES: usize = 2;

const MAGIC: [u8; 4] = *b"VBC2";

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Part of a message; more follows.
    Part,
    /// The message's end.
    Last,
    /// Proof at the start that the sender holds the group's key.
    Proof,
}

/// Whether payloads are encrypted. A group's ranks must agree, or none gets past the proof.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sealing {
    #[default]
    Encrypted,
    /// Readable and forgeable by anybody on the way: only to measure what encryption costs. No configuration leads here.
    ClearForMeasuring,
}

/// Who talks to whom about what; bound into the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conversation {
    pub group: u64,
    pub epoch: u64,
    /// The rank that dialled.
    pub dialler: u32,
    pub acceptor: u32,
}

/// Encrypts one direction.
pub struct Sealer {
    cipher: Option<LessSafeKey>,
    epoch: u64,
    next: u64,
}

/// Decrypts the other.
pub struct Opener {
    cipher: Option<LessSafeKey>,
    epoch: u64,
    next: u64,
    /// Whose frames these are, for errors.
    rank: usize,
}

/// An opened frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub kind: Kind,
    pub lane: usize,
    pub payload: &'a [u8],
}

/// Keys of both directions from the group's key and both sides' nonces: (from dialler, from acceptor).
pub fn keys(
    group_key: &[u8; 32],
    about: Conversation,
    nonces: (&[u8; 32], &[u8; 32]),
) -> ([u8; 32], [u8; 32]) {
    let salt = [nonces.0.as_slice(), nonces.1].concat();
    let hkdf = Hkdf::<Sha256>::new(Some(&salt), group_key);
    let key = |direction: u8| {
        let info = [
            b"verbund collective 2".as_slice(),
            &about.group.to_le_bytes(),
            &about.epoch.to_le_bytes(),
            &about.dialler.to_le_bytes(),
            &about.acceptor.to_le_bytes(),
            &[direction],
        ];
        let mut out = [0; 32];
        // The only failure of expand is an output of more than 255 hashes; this is one.
        let expanded = hkdf.expand(&info.concat(), &mut out);
        debug_assert!(expanded.is_ok());
        out
    };
    (key(0), key(1))
}

/// The cipher of a direction; `None` where nothing is encrypted.
fn cipher(key: &[u8; 32], sealing: Sealing) -> Result<Option<LessSafeKey>, Error> {
    if sealing == Sealing::ClearForMeasuring {
        return Ok(None);
    }
    let key = UnboundKey::new(&AES_256_GCM, key).map_err(|_| Error::Io {
        what: "encryption",
        why: "the library refuses the key".into(),
    })?;
    Ok(Some(LessSafeKey::new(key)))
}

impl Sealer {
    pub fn new(key: &[u8; 32], epoch: u64, sealing: Sealing) -> Result<Self, Error> {
        Ok(Sealer {
            cipher: cipher(key, sealing)?,
            epoch,
            next: 0,
        })
    }

    /// Appends the frame of `payload` (at most [`MAX_PAYLOAD_BYTES`]) to `out`.
    pub fn seal(
        &mut self,
        kind: Kind,
        lane: usize,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let too_large = || Error::TooLarge {
            got: payload.len(),
            max: MAX_PAYLOAD_BYTES,
        };
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(too_large());
        }
        debug_assert!(lane < LANES);
        let start = out.len();
        out.reserve(HEADER_BYTES + payload.len() + TAG_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[kind as u8, lane as u8, 0, 0]);
        out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.epoch.to_le_bytes());
        out.extend_from_slice(&self.next.to_le_bytes());
        out.extend_from_slice(payload);
        let (header, body) = out[start..].split_at_mut(HEADER_BYTES);
        let mut bytes = [0; TAG_BYTES];
        if let Some(cipher) = &self.cipher {
            let header = Aad::from(header);
            let tag = cipher
                .seal_in_place_separate_tag(nonce(self.next), header, body)
                .map_err(|_| too_large())?;
            bytes.copy_from_slice(tag.as_ref());
        }
        out.extend_from_slice(&bytes);
        self.next += 1;
        Ok(())
    }
}

impl Opener {
    pub fn new(key: &[u8; 32], epoch: u64, rank: usize, sealing: Sealing) -> Result<Self, Error> {
        Ok(Opener {
            cipher: cipher(key, sealing)?,
            epoch,
            next: 0,
            rank,
        })
    }

    /// Checks a header; returns how many bytes follow it. Errors for another epoch, another order, or more than is allowed.
    pub fn expect(&self, header: &[u8; HEADER_BYTES]) -> Result<usize, Error> {
        let wrong = |expected: String, got: String| {
            Err(Error::Protocol {
                rank: self.rank,
                expected,
                got,
            })
        };
        let [m0, m1, m2, m3, kind, lane, ..] = *header;
        if [m0, m1, m2, m3] != MAGIC || kind > Kind::Proof as u8 || usize::from(lane) >= LANES {
            return wrong(
                "a frame of version 2".into(),
                format!("{:02x?}", &header[..6]),
            );
        }
        let len = u32_at(header, 8) as usize;
        let (epoch, sequence) = (u64_at(header, 12), u64_at(header, 20));
        if epoch != self.epoch {
            return Err(Error::StaleEpoch {
                rank: self.rank,
                expected: self.epoch,
                got: epoch,
            });
        }
        if sequence != self.next {
            return wrong(format!("frame {}", self.next), format!("frame {sequence}"));
        }
        if len > MAX_PAYLOAD_BYTES {
            return wrong(
                format!("at most {MAX_PAYLOAD_BYTES} bytes"),
                format!("{len} bytes"),
            );
        }
        Ok(len + TAG_BYTES)
    }

    /// Opens a whole frame in place; its header was [expected](Opener::expect).
    pub fn open<'a>(&mut self, frame: &'a mut [u8]) -> Result<Frame<'a>, Error> {
        let rank = self.rank;
        let wrong_key = move || Error::WrongKey { rank };
        if frame.len() < HEADER_BYTES + TAG_BYTES {
            return Err(wrong_key());
        }
        let (header, sealed) = frame.split_at_mut(HEADER_BYTES);
        let (kind, lane) = (header[4], usize::from(header[5]));
        let payload = match &self.cipher {
            Some(cipher) => cipher
                .open_in_place(nonce(self.next), Aad::from(header), sealed)
                .map_err(|_| wrong_key())?,
            None => {
                let (body, tag) = sealed.split_at_mut(sealed.len() - TAG_BYTES);
                if tag.iter().any(|&b| b != 0) {
                    return Err(wrong_key());
                }
                body
            }
        };
        self.next += 1;
        let kind = match kind {
            0 => Kind::Part,
            1 => Kind::Last,
            _ => Kind::Proof,
        };
        Ok(Frame {
            kind,
            lane,
            payload,
        })
    }
}

fn nonce(sequence: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&sequence.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: [u8; 32] = [7; 32];

    fn sealer(epoch: u64, sealing: Sealing) -> Sealer {
        Sealer::new(&KEY, epoch, sealing).unwrap()
    }

    fn opener() -> Opener {
        Opener::new(&KEY, 3, 1, Sealing::Encrypted).unwrap()
    }

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        sealer(3, Sealing::Encrypted)
            .seal(Kind::Last, 1, payload, &mut out)
            .unwrap();
        out
    }

    fn open(frame: &mut [u8]) -> Result<Vec<u8>, Error> {
        let mut opener = opener();
        let header = frame.first_chunk().ok_or(Error::WrongKey { rank: 1 })?;
        let rest = opener.expect(header)?;
        assert_eq!(rest + HEADER_BYTES, frame.len());
        opener.open(frame).map(|frame| {
            assert_eq!((frame.kind, frame.lane), (Kind::Last, 1));
            frame.payload.to_vec()
        })
    }

    proptest! {
        #[test]
        fn what_was_sealed_opens(payload in proptest::collection::vec(any::<u8>(), 0..500)) {
            prop_assert_eq!(open(&mut frame(&payload)).unwrap(), payload);
        }

        #[test]
        fn any_changed_bit_is_noticed(payload in proptest::collection::vec(any::<u8>(), 0..100), bit in any::<usize>()) {
            let mut frame = frame(&payload);
            let bit = bit % (frame.len() * 8);
            // A changed length would make the reader wait for other bytes; that is refused when those are opened.
            prop_assume!(!(64..96).contains(&bit));
            frame[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(open(&mut frame).is_err());
        }
    }

    #[test]
    fn a_frame_of_another_epoch_is_refused_as_stale() {
        let mut old = Vec::new();
        sealer(2, Sealing::Encrypted)
            .seal(Kind::Last, 0, b"x", &mut old)
            .unwrap();
        assert_eq!(
            open(&mut old),
            Err(Error::StaleEpoch {
                rank: 1,
                expected: 3,
                got: 2
            })
        );
    }

    #[test]
    fn a_repeated_frame_is_refused() {
        let mut opener = opener();
        let mut first = frame(b"x");
        let again = first.clone();
        opener.open(&mut first).unwrap();
        assert!(matches!(
            opener.expect(again.first_chunk().unwrap()),
            Err(Error::Protocol { .. })
        ));
    }

    #[test]
    fn an_announced_length_beyond_the_limit_is_refused_before_anything_is_allocated() {
        let mut frame = frame(b"x");
        frame[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            opener().expect(frame.first_chunk().unwrap()),
            Err(Error::Protocol { .. })
        ));
    }

    #[test]
    fn a_frame_in_the_clear_does_not_open_where_it_should_be_encrypted_nor_the_other_way_round() {
        let mut clear = Vec::new();
        let payload = b"in the clear";
        sealer(3, Sealing::ClearForMeasuring)
            .seal(Kind::Proof, 0, payload, &mut clear)
            .unwrap();
        assert!(clear.windows(payload.len()).any(|part| part == payload));
        assert_eq!(open(&mut clear.clone()), Err(Error::WrongKey { rank: 1 }));
        let mut opener = Opener::new(&KEY, 3, 1, Sealing::ClearForMeasuring).unwrap();
        assert_eq!(
            opener.open(&mut frame(b"x")),
            Err(Error::WrongKey { rank: 1 })
        );
        assert_eq!(opener.open(&mut clear).unwrap().payload, payload);
    }

    #[test]
    fn keys_differ_by_direction_epoch_and_nonce() {
        let about = Conversation {
            group: 1,
            epoch: 2,
            dialler: 1,
            acceptor: 0,
        };
        let (a, b) = keys(&KEY, about, (&[1; 32], &[2; 32]));
        let (c, _) = keys(
            &KEY,
            Conversation { epoch: 3, ..about },
            (&[1; 32], &[2; 32]),
        );
        let (d, _) = keys(&KEY, about, (&[1; 32], &[3; 32]));
        let all = std::collections::BTreeSet::from([a, b, c, d]);
        assert_eq!(all.len(), 4);
    }
}
