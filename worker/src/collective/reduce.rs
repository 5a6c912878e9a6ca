//! How a sum goes over a mesh. Belongs here: what is sent to whom, in which pieces, and in which order it is added. Does not belong
//! here: connections (`mesh`), formats (`wire`).
//!
//! Small sums take one hop: everybody sends everything to everybody, each adds in rank order. Large ones go in shares: each rank
//! adds up its share of every piece and sends the sums round, which takes a second hop and moves less. Both go in pieces, so that
//! encoding and adding of one overlaps with the travelling of others.

use std::ops::{Range, RangeInclusive};
use std::time::{Duration, Instant};

use super::Error;
use super::mesh::{Mesh, STEP_TIMEOUT};
use super::wire::{BLOCK, Wire};

/// Bytes of a piece, about: a quarter of the sum within these, so that the first is added while the last is encoded or travels, and a
/// frame's own cost does not show.
const PIECE_BYTES: RangeInclusive<usize> = 16 << 10..=64 << 10;
/// Sealed bytes that may wait for the kernel before the next piece is encoded.
const BACKLOG_BYTES: usize = 256 << 10;
/// Up to this many bytes a sum takes one hop, until [`Reducer::calibrate`] has measured.
const ONE_HOP_BYTES: usize = 64 << 10;
/// Sums that are tried out to find the switch point.
const TRIALS: Range<u32> = 13..21;
/// Each is tried this often; the fastest counts.
const TRIES: usize = 3;
/// A size that takes longer ends the trial: joining must stay short on a slow line.
const TRIAL_LIMIT: Duration = Duration::from_millis(40);

/// Messages of contributions, and of the sums of a share.
const CONTRIBUTIONS: usize = 0;
const SUMS: usize = 1;

/// Sums over a mesh, with the memory that they need.
pub struct Reducer {
    /// Largest sum, in bytes on the wire, that takes one hop where there are more than two ranks. The same on all of them.
    pub one_hop_bytes: usize,
    own: Vec<f64>,
    bytes: Vec<u8>,
}

impl Default for Reducer {
    fn default() -> Self {
        Reducer {
            one_hop_bytes: ONE_HOP_BYTES,
            own: Vec::new(),
            bytes: Vec::new(),
        }
    }
}

impl Reducer {
    /// Replaces `data` by the sum over all ranks in the sense of `wire`. Its length is the same everywhere.
    pub fn all_reduce(
        &mut self,
        mesh: &mut Mesh,
        wire: Wire,
        data: &mut [f64],
    ) -> Result<(), Error> {
        match mesh.size() {
            1 => Ok(()),
            // Two ranks move the same in shares, in one hop more.
            2 => self.one_hop(mesh, wire, data),
            _ if data.len() * wire.usual_bits() / 8 <= self.one_hop_bytes => {
                self.one_hop(mesh, wire, data)
            }
            _ => self.in_shares(mesh, wire, data),
        }
    }

    fn one_hop(&mut self, mesh: &mut Mesh, wire: Wire, data: &mut [f64]) -> Result<(), Error> {
        let (len, piece_len) = (data.len(), piece_len(wire, data.len()));
        let pieces = len.div_ceil(piece_len);
        let piece = |i: usize| i * piece_len..len.min((i + 1) * piece_len);
        let others: Vec<usize> = mesh.others().collect();
        others
            .iter()
            .for_each(|&rank| mesh.want(rank, CONTRIBUTIONS, pieces));
        let (mut sent, mut added) = (0, 0);
        mesh.run(Some(STEP_TIMEOUT), |mesh| {
            while sent < pieces && mesh.backlog() < BACKLOG_BYTES {
                self.bytes.clear();
                wire.encode(&data[piece(sent)], &mut self.bytes);
                for &rank in &others {
                    mesh.send(rank, CONTRIBUTIONS, &self.bytes)?;
                }
                sent += 1;
            }
            while added < sent && mesh.all_have(CONTRIBUTIONS) {
                self.add_up(mesh, wire, &mut data[piece(added)])?;
                added += 1;
            }
            Ok(added == pieces)
        })
    }

    fn in_shares(&mut self, mesh: &mut Mesh, wire: Wire, data: &mut [f64]) -> Result<(), Error> {
        let (rank, size, len) = (mesh.rank, mesh.size(), data.len());
        let piece_len = piece_len(wire, len / size) * size;
        let pieces = len.div_ceil(piece_len);
        let share = |piece: usize, rank: usize| {
            let start = piece * piece_len;
            let own = share(len.min(start + piece_len) - start, rank, size);
            start + own.start..start + own.end
        };
        let others: Vec<usize> = mesh.others().collect();
        for &other in &others {
            mesh.want(other, CONTRIBUTIONS, pieces);
            mesh.want(other, SUMS, pieces);
        }
        let (mut sent, mut added) = (0, 0);
        let mut received = vec![0; size];
        mesh.run(Some(STEP_TIMEOUT), |mesh| {
            while sent < pieces && mesh.backlog() < BACKLOG_BYTES {
                for &other in &others {
                    self.bytes.clear();
                    wire.encode(&data[share(sent, other)], &mut self.bytes);
                    mesh.send(other, CONTRIBUTIONS, &self.bytes)?;
                }
                sent += 1;
            }
            while added < sent && mesh.all_have(CONTRIBUTIONS) {
                let mine = &mut data[share(added, rank)];
                self.add_up(mesh, wire, mine)?;
                self.bytes.clear();
                wire.encode(mine, &mut self.bytes);
                for &other in &others {
                    mesh.send(other, SUMS, &self.bytes)?;
                }
                added += 1;
            }
            for &other in &others {
                // Not before this rank's own contribution to it is out.
                while received[other] < sent
                    && let Some(message) = mesh.message(other, SUMS)
                {
                    let part = &mut data[share(received[other], other)];
                    let bytes = message.len();
                    wire.set(message, part)
                        .map_err(|_| malformed(other, wire, part.len(), bytes))?;
                    mesh.done_with(other, SUMS);
                    received[other] += 1;
                }
            }
            Ok(added == pieces && others.iter().all(|&other| received[other] == pieces))
        })
    }

    /// Adds the other ranks' next contributions to `part`, in rank order, so that all ranks that do so hold the same bits.
    fn add_up(&mut self, mesh: &mut Mesh, wire: Wire, part: &mut [f64]) -> Result<(), Error> {
        wire.round(part);
        // Of two addends the order does not matter.
        let in_order = mesh.size() > 2;
        if in_order {
            self.own.clear();
            self.own.extend_from_slice(part);
            part.fill(0.0);
        }
        for rank in 0..mesh.size() {
            if let Some(message) = mesh.message(rank, CONTRIBUTIONS) {
                let bytes = message.len();
                wire.add(message, part)
                    .map_err(|_| malformed(rank, wire, part.len(), bytes))?;
                mesh.done_with(rank, CONTRIBUTIONS);
            } else if in_order {
                part.iter_mut()
                    .zip(&self.own)
                    .for_each(|(sum, v)| *sum += v);
            }
        }
        wire.round(part);
        Ok(())
    }

    /// Finds out up to which size one hop is faster on this group's network, and agrees on it. All ranks call it.
    pub fn calibrate(&mut self, mesh: &mut Mesh) -> Result<(), Error> {
        if mesh.size() <= 2 {
            return Ok(());
        }
        let others: Vec<usize> = mesh.others().collect();
        let (mut best, mut losses) = (1 << TRIALS.start, 0);
        for trial in TRIALS {
            let mut data = vec![0.0; (1 << trial) * 8 / Wire::F32.usual_bits()];
            let mut fastest = [Duration::MAX; 2];
            for _ in 0..TRIES {
                for (way, fastest) in fastest.iter_mut().enumerate() {
                    let start = Instant::now();
                    match way {
                        0 => self.one_hop(mesh, Wire::F32, &mut data)?,
                        _ => self.in_shares(mesh, Wire::F32, &mut data)?,
                    }
                    *fastest = start.elapsed().min(*fastest);
                }
            }
            // Each rank measured; the leader's word counts.
            if fastest[0] <= fastest[1] {
                (best, losses) = (1usize << trial, 0);
            } else {
                losses += 1;
            }
            let over = losses == 2 || fastest.iter().any(|&t| t > TRIAL_LIMIT);
            let mut word = (best as u32).to_le_bytes().to_vec();
            word.push(u8::from(over));
            if mesh.rank == 0 {
                let to: Vec<_> = others.iter().map(|&rank| (rank, &*word)).collect();
                mesh.exchange(&to, &[], Some(STEP_TIMEOUT))?;
            } else {
                word = mesh
                    .exchange(&[], &[0], Some(STEP_TIMEOUT))?
                    .pop()
                    .unwrap_or_default();
            }
            let [b0, b1, b2, b3, over] = word[..] else {
                return Err(Error::Protocol {
                    rank: 0,
                    expected: "a switch point of 5 bytes".into(),
                    got: format!("{} bytes", word.len()),
                });
            };
            self.one_hop_bytes = u32::from_le_bytes([b0, b1, b2, b3]) as usize;
            if over != 0 {
                break;
            }
        }
        Ok(())
    }
}

/// Values of a piece of `len`: whole blocks.
fn piece_len(wire: Wire, len: usize) -> usize {
    let bytes = len * wire.usual_bits() / 8 / 4;
    let bytes = bytes.clamp(*PIECE_BYTES.start(), *PIECE_BYTES.end());
    (bytes * 8 / wire.usual_bits()).next_multiple_of(BLOCK)
}

/// The part of `len` values that `rank` adds up: whole blocks, but for the end.
fn share(len: usize, rank: usize, size: usize) -> Range<usize> {
    let blocks = len.div_ceil(BLOCK);
    let at = |rank: usize| (blocks * rank / size * BLOCK).min(len);
    at(rank)..at(rank + 1)
}

fn malformed(rank: usize, wire: Wire, len: usize, bytes: usize) -> Error {
    Error::Protocol {
        rank,
        expected: format!("{len} values in {wire}"),
        got: format!("{bytes} bytes of something else"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_whole_blocks_and_cover_everything() {
        for size in 1..6 {
            for len in [0, 1, 63, 64, 65, 1000, 64 * 7, 20_000] {
                let mut next = 0;
                for rank in 0..size {
                    let part = share(len, rank, size);
                    assert_eq!(part.start, next);
                    assert!(part.start.is_multiple_of(BLOCK) || part.start == len);
                    next = part.end;
                }
                assert_eq!(next, len);
            }
        }
    }
}
