//! Sums in every format, on every path, in the foreground and in the background.

use super::*;

/// One hop always, or shares always.
const PATHS: [usize; 2] = [usize::MAX, 0];

fn joined(hubs: &[Hub], rank: usize, wire: Wire) -> Tcp {
    let group = GroupConfig {
        wire,
        ..config(hubs, rank, 1)
    };
    Tcp::join(&hubs[rank], group, JOIN).unwrap()
}

/// Runs `work` on each rank of a group over TCP whose leader wants `wire`.
fn in_format<T: Send>(size: usize, wire: Wire, work: impl Fn(Tcp) -> T + Sync) -> Vec<T> {
    let hubs: Vec<Hub> = (0..size).map(|_| Hub::bind(loopback()).unwrap()).collect();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|rank| {
                let (hubs, work) = (&hubs, &work);
                // The others want something else: the leader's word counts.
                let own = if rank == 0 { wire } else { Wire::F32 };
                scope.spawn(move || work(joined(hubs, rank, own)))
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

/// The definition of a sum: what travelled of each contribution, added in rank order, and travelled again.
fn defined(wire: Wire, size: usize, len: usize) -> Vec<u64> {
    let mut sums = vec![0.0; len];
    for rank in 0..size {
        let mut contribution = numbers(rank, len);
        wire.round(&mut contribution);
        sums.iter_mut().zip(contribution).for_each(|(s, v)| *s += v);
    }
    wire.round(&mut sums);
    bits(&sums)
}

fn bits(values: &[f64]) -> Vec<u64> {
    values.iter().map(|v| (v + 0.0).to_bits()).collect()
}

#[test]
fn a_sum_is_its_formats_definition_on_every_path_and_on_every_rank() {
    // Less than a block, whole blocks, uneven, and several pieces of every format.
    let lengths = [1, 63, 64, 1000, 40_013, 150_001];
    for wire in Wire::ALL {
        for size in [2, 3, 4] {
            let expected = lengths.map(|len| defined(wire, size, len));
            let results = in_format(size, wire, |mut ranks| {
                PATHS.map(|one_hop_bytes| {
                    ranks.set_one_hop_bytes(one_hop_bytes).unwrap();
                    lengths.map(|len| {
                        let mut data = numbers(ranks.rank(), len);
                        ranks.all_reduce_f64(&mut data).unwrap();
                        bits(&data)
                    })
                })
            });
            for (rank, paths) in results.iter().enumerate() {
                for (path, sums) in paths.iter().enumerate() {
                    for (sum, expected) in sums.iter().zip(&expected) {
                        let len = expected.len();
                        assert!(
                            sum == expected,
                            "{wire}, {size} ranks, {len} values: rank {rank}, path {path}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_lossy_group_can_still_sum_exactly() {
    for sums in in_format(3, Wire::Int8, |mut ranks| {
        let mut data = numbers(ranks.rank(), 1000);
        ranks.all_reduce_exact(&mut data).unwrap();
        bits(&data)
    }) {
        assert_eq!(sums, defined(Wire::Exact, 3, 1000));
    }
}

#[test]
fn sums_in_the_background_come_back_in_order() {
    for wire in [Wire::Exact, Wire::Bf16] {
        let lengths = [100_000, 64, 5000, 1];
        for sums in in_format(3, wire, |mut ranks| {
            let rank = ranks.rank();
            let background = ranks.background().unwrap();
            for len in lengths {
                background.begin(numbers(rank, len)).unwrap();
            }
            let sums = lengths.map(|_| bits(&background.finish().unwrap()));
            // Nothing more is under way, and the foreground goes on.
            assert!(background.finish().is_err());
            let mut data = numbers(rank, 64);
            ranks.all_reduce_f64(&mut data).unwrap();
            assert_eq!(bits(&data), defined(wire, 3, 64));
            sums
        }) {
            assert_eq!(sums, lengths.map(|len| defined(wire, 3, len)));
        }
    }
}

#[test]
fn what_was_begun_and_not_finished_does_not_mix_with_later_calls() {
    let results = in_format(2, Wire::Exact, |mut ranks| {
        let rank = ranks.rank();
        ranks
            .background()
            .unwrap()
            .begin(numbers(rank, 5000))
            .unwrap();
        let mut message = vec![rank as u8];
        ranks.broadcast(&mut message).unwrap();
        message
    });
    assert_eq!(results, [[0], [0]]);
}

#[test]
fn the_switch_point_that_was_measured_is_the_same_on_all_ranks() {
    let points = in_format(3, Wire::Exact, |mut ranks| {
        ranks.calibrate().unwrap();
        let mut data = numbers(ranks.rank(), 1000);
        ranks.all_reduce_f64(&mut data).unwrap();
        assert_eq!(bits(&data), defined(Wire::Exact, 3, 1000));
        ranks.one_hop_bytes().unwrap()
    });
    assert!(points.iter().all(|&p| p == points[0]), "{points:?}");
    assert!((1 << 13..=1 << 20).contains(&points[0]), "{points:?}");
}
