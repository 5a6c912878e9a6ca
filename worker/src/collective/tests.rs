use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kernels::to_grid;

use super::*;

mod formats;
mod trouble;

const JOIN: Duration = Duration::from_secs(20);

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn config(hubs: &[Hub], rank: usize, epoch: u64) -> GroupConfig {
    GroupConfig {
        group: 1,
        epoch,
        rank,
        peers: hubs.iter().map(Hub::local_addr).collect(),
        key: [9; 32],
        wire: Wire::Exact,
        sealing: Sealing::Encrypted,
        overlap: true,
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Over {
    Tcp,
    Shm,
}

/// Runs `work` on each rank of a group, in threads, over real sockets.
fn group<T: Send>(
    size: usize,
    over: Over,
    work: impl Fn(Box<dyn Collective>) -> T + Sync,
) -> Vec<T> {
    let hubs: Vec<Hub> = (0..size).map(|_| Hub::bind(loopback()).unwrap()).collect();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|rank| {
                let (hubs, work) = (&hubs, &work);
                scope.spawn(move || {
                    let tcp = Tcp::join(&hubs[rank], config(hubs, rank, 1), JOIN).unwrap();
                    work(if over == Over::Shm {
                        Shm::upgrade(tcp).unwrap()
                    } else {
                        Box::new(tcp)
                    })
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

/// Numbers of very different sizes, different on each rank.
fn numbers(rank: usize, len: usize) -> Vec<f64> {
    (0..len)
        .map(|i| to_grid(((i * 31 + rank * 7) as f32).sin() * 10f32.powi((i % 9) as i32 - 5)))
        .collect()
}

#[test]
fn all_ranks_hold_the_same_exact_sums() {
    for over in [Over::Tcp, Over::Shm] {
        for size in [1, 2, 3, 5] {
            for len in [0, 1, 576, 9_000, 300_000] {
                if size == 5 && len > 10_000 {
                    continue;
                }
                let expected: Vec<f64> = (0..len)
                    .map(|i| (0..size).rev().map(|r| numbers(r, len)[..][i]).sum())
                    .take(50)
                    .collect();
                for sums in group(size, over, |mut ranks| {
                    let mut data = numbers(ranks.rank(), len);
                    // Twice, and back: the second sum must not see the first's slots.
                    let mut other = vec![1.0; len];
                    ranks.all_reduce_f64(&mut other).unwrap();
                    ranks.all_reduce_f64(&mut data).unwrap();
                    assert!(other.iter().all(|&v| v == size as f64));
                    data
                }) {
                    assert_eq!(sums.len(), len);
                    // Added up in the opposite order: equal bits, because the sums are exact.
                    assert_eq!(&sums[..expected.len()], expected);
                }
            }
        }
    }
}

#[test]
fn many_sums_in_a_row_stay_in_step() {
    for over in [Over::Tcp, Over::Shm] {
        group(3, over, |mut ranks| {
            for round in 0..500u32 {
                let mut data = vec![f64::from(round) + ranks.rank() as f64; 64];
                ranks.all_reduce_f64(&mut data).unwrap();
                assert!(
                    data.iter().all(|&v| v == f64::from(round) * 3.0 + 3.0),
                    "round {round}: {:?}",
                    data[0]
                );
            }
        });
    }
}

#[test]
fn the_leader_gathers_in_rank_order_and_broadcasts_to_all() {
    for over in [Over::Tcp, Over::Shm] {
        let results = group(3, over, |mut ranks| {
            // Longer than a frame, and empty.
            let mine = vec![ranks.rank() as u8; ranks.rank() * 1_500_000];
            let gathered = ranks.gather_to_leader(&mine).unwrap();
            let mut message = if ranks.rank() == 0 {
                b"step".to_vec()
            } else {
                vec![1, 2, 3]
            };
            ranks.broadcast(&mut message).unwrap();
            assert_eq!(message, b"step");
            gathered
        });
        assert_eq!(
            results[0].iter().map(Vec::len).collect::<Vec<_>>(),
            [0, 1_500_000, 3_000_000]
        );
        assert!(results[0][2].iter().all(|&b| b == 2));
        assert!(results[1].is_empty() && results[2].is_empty());
    }
}

#[test]
fn a_rank_that_goes_away_is_named_at_once() {
    for over in [Over::Tcp, Over::Shm] {
        let lost = group(3, over, |mut ranks| {
            let mut data = vec![1.0; 100];
            ranks.all_reduce_f64(&mut data).unwrap();
            if ranks.rank() == 2 {
                return None;
            }
            let start = Instant::now();
            let error = ranks.all_reduce_f64(&mut data).unwrap_err();
            // Far below the timeout of a step: it was the closed connection that told.
            assert!(start.elapsed() < Duration::from_secs(20));
            // Keep the connections of this rank open until the others have seen the same.
            std::thread::sleep(Duration::from_millis(300));
            Some(error)
        });
        for error in &lost[..2] {
            assert!(
                matches!(error, Some(Error::PeerLost { rank: 2, .. })),
                "{error:?}"
            );
        }
    }
}

#[test]
fn a_follower_that_waits_for_a_dead_leader_is_told() {
    let results = group(2, Over::Shm, |mut ranks| {
        (ranks.rank() == 1).then(|| ranks.broadcast(&mut Vec::new()))
    });
    assert!(
        matches!(results[1], Some(Err(Error::PeerLost { rank: 0, .. }))),
        "{results:?}"
    );
}

#[test]
fn a_waiting_call_can_be_interrupted() {
    let results = group(2, Over::Tcp, |mut ranks| {
        let interrupter = ranks.interrupter();
        if ranks.rank() == 0 {
            // Holds the connection open while the other waits in vain.
            std::thread::sleep(Duration::from_millis(400));
            return Ok(());
        }
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            interrupter.interrupt();
        });
        ranks.broadcast(&mut Vec::new())
    });
    assert_eq!(results[1], Err(Error::Interrupted));
}

#[test]
fn joining_can_be_interrupted_wherever_it_waits() {
    let hubs: Vec<Hub> = (0..3).map(|_| Hub::bind(loopback()).unwrap()).collect();
    // A port that takes connections and says nothing, as of a process that hangs.
    let silent = std::net::TcpListener::bind(loopback()).unwrap();
    let nobody = {
        let closed = std::net::TcpListener::bind(loopback()).unwrap();
        closed.local_addr().unwrap()
    };
    for (what, rank, leader) in [
        ("accepts", 0, hubs[0].local_addr()),
        ("dials a closed port", 1, nobody),
        ("waits for the welcome", 1, silent.local_addr().unwrap()),
    ] {
        let mut group = config(&hubs, rank, 1);
        group.peers[0] = leader;
        let interrupter = Interrupter::default();
        let (own, hub) = (interrupter.clone(), hubs[rank].clone());
        // Far longer than the test may take: only the interruption can end it.
        let hour = Duration::from_secs(3600);
        let (told, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || told.send(Tcp::join_with(&hub, group, hour, own).err()));
        std::thread::sleep(Duration::from_millis(100));
        assert!(ended.try_recv().is_err(), "{what}: ended by itself");
        interrupter.interrupt();
        assert_eq!(
            ended.recv_timeout(JOIN),
            Ok(Some(Error::Interrupted)),
            "{what}"
        );
    }
}

#[test]
fn an_interrupter_made_before_joining_ends_later_calls_too() {
    let hubs: Vec<Hub> = (0..2).map(|_| Hub::bind(loopback()).unwrap()).collect();
    std::thread::scope(|scope| {
        let interrupter = Interrupter::default();
        let (own, hubs) = (interrupter.clone(), &hubs);
        let leader = scope.spawn(move || {
            let leader = Tcp::join(&hubs[0], config(hubs, 0, 1), JOIN).unwrap();
            interrupter.interrupt();
            leader
        });
        let mut follower = Tcp::join_with(&hubs[1], config(hubs, 1, 1), JOIN, own).unwrap();
        // Kept, so that its connection stays open while the other waits.
        let _leader = leader.join().unwrap();
        assert_eq!(follower.broadcast(&mut Vec::new()), Err(Error::Interrupted));
    });
}

#[test]
fn ranks_of_an_older_epoch_are_refused() {
    let hubs = [
        Hub::bind(loopback()).unwrap(),
        Hub::bind(loopback()).unwrap(),
    ];
    std::thread::scope(|scope| {
        let newer =
            scope.spawn(|| Tcp::join(&hubs[0], config(&hubs, 0, 5), Duration::from_millis(1500)));
        std::thread::sleep(Duration::from_millis(200));
        let older = Tcp::join(&hubs[1], config(&hubs, 1, 4), JOIN);
        assert!(
            matches!(
                older,
                Err(Error::StaleEpoch {
                    rank: 0,
                    expected: 4,
                    got: 5
                })
            ),
            "{:?}",
            older.err()
        );
        // The newer one waits for its own and nobody else.
        assert!(matches!(
            newer.join().unwrap().err(),
            Some(Error::NotJoined { rank: 1, .. })
        ));
    });
    // And this process itself cannot go back.
    let back = Tcp::join(&hubs[0], config(&hubs, 0, 4), JOIN).err();
    assert!(
        matches!(
            back,
            Some(Error::StaleEpoch {
                rank: 0,
                expected: 5,
                got: 4
            })
        ),
        "{back:?}"
    );
}

#[test]
fn a_rank_without_the_key_is_refused() {
    let hubs = [
        Hub::bind(loopback()).unwrap(),
        Hub::bind(loopback()).unwrap(),
    ];
    std::thread::scope(|scope| {
        let good = scope.spawn(|| Tcp::join(&hubs[0], config(&hubs, 0, 1), JOIN).err());
        let bad = Tcp::join(
            &hubs[1],
            GroupConfig {
                key: [8; 32],
                ..config(&hubs, 1, 1)
            },
            JOIN,
        )
        .err();
        assert_eq!(good.join().unwrap(), Some(Error::WrongKey { rank: 1 }));
        assert!(
            matches!(
                bad,
                Some(Error::WrongKey { rank: 0 } | Error::PeerLost { rank: 0, .. })
            ),
            "{bad:?}"
        );
    });
}

#[test]
fn noise_on_the_data_port_does_not_disturb_a_group() {
    use std::io::Write;
    let hubs = [
        Hub::bind(loopback()).unwrap(),
        Hub::bind(loopback()).unwrap(),
    ];
    for noise in [
        b"GET / HTTP/1.1\r\n\r\n".as_slice(),
        &[0; 200],
        b"VBHELLO1",
        b"",
    ] {
        let mut stream = std::net::TcpStream::connect(hubs[0].local_addr()).unwrap();
        stream.write_all(noise).unwrap();
    }
    std::thread::scope(|scope| {
        let leader = scope.spawn(|| {
            Tcp::join(&hubs[0], config(&hubs, 0, 1), JOIN).map(|mut t| t.all_reduce_f64(&mut [1.0]))
        });
        let other = Tcp::join(&hubs[1], config(&hubs, 1, 1), JOIN)
            .map(|mut t| t.all_reduce_f64(&mut [1.0]));
        assert_eq!(leader.join().unwrap().unwrap(), Ok(()));
        assert_eq!(other.unwrap(), Ok(()));
    });
}
