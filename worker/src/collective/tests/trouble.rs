//! Peers that die, lie or are slow.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use super::super::frame::{Kind, Opener, Sealer};
use super::super::mesh::{Link, Mesh};
use super::*;

#[test]
fn a_rank_that_dies_in_the_middle_of_a_sum_is_named_on_both_paths() {
    // Far more than socket buffers hold.
    const LEN: usize = 4 << 20;
    for one_hop_bytes in [usize::MAX, 0] {
        let hubs: Vec<Hub> = (0..3).map(|_| Hub::bind(loopback()).unwrap()).collect();
        let died = std::sync::Barrier::new(3);
        std::thread::scope(|scope| {
            for rank in 0..3 {
                let (hubs, died) = (&hubs, &died);
                scope.spawn(move || {
                    let mut ranks = Tcp::join(&hubs[rank], config(hubs, rank, 1), JOIN).unwrap();
                    ranks.set_one_hop_bytes(one_hop_bytes).unwrap();
                    let mut data = vec![1.0; LEN];
                    if rank == 2 {
                        let interrupter = ranks.interrupter();
                        scope.spawn(move || {
                            std::thread::sleep(Duration::from_millis(150));
                            interrupter.interrupt();
                        });
                        // The others do not take part yet, so some pieces are out and some are not.
                        assert_eq!(ranks.all_reduce_f64(&mut data), Err(Error::Interrupted));
                        drop(ranks);
                        died.wait();
                        return;
                    }
                    died.wait();
                    let error = ranks.all_reduce_f64(&mut data);
                    assert!(
                        matches!(error, Err(Error::PeerLost { rank: 2, .. })),
                        "{error:?}"
                    );
                    // Keep this rank's connections open until the other has seen the same.
                    std::thread::sleep(Duration::from_millis(300));
                });
            }
        });
    }
}

#[test]
fn a_rank_that_dies_while_a_sum_is_in_the_background_is_named() {
    let results = group(2, Over::Tcp, |mut ranks| {
        if ranks.rank() == 1 {
            return None;
        }
        let background = ranks.background().unwrap();
        // The other may be gone before this begins, which is as good.
        let begun = background.begin(vec![1.0; 100_000]);
        Some(begun.and_then(|()| background.finish().map(|_| ())))
    });
    assert!(
        matches!(results[0], Some(Err(Error::PeerLost { rank: 1, .. }))),
        "{results:?}"
    );
}

#[test]
fn ranks_that_sum_different_lengths_are_told() {
    for one_hop_bytes in [usize::MAX, 0] {
        let hubs: Vec<Hub> = (0..3).map(|_| Hub::bind(loopback()).unwrap()).collect();
        let errors: Vec<Option<Error>> = std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..3)
                .map(|rank| {
                    let hubs = &hubs;
                    scope.spawn(move || {
                        let config = config(hubs, rank, 1);
                        let mut ranks = Tcp::join(&hubs[rank], config, JOIN).unwrap();
                        ranks.set_one_hop_bytes(one_hop_bytes).unwrap();
                        let len = if rank == 1 { 1000 } else { 900 };
                        ranks.all_reduce_f64(&mut vec![1.0; len]).err()
                    })
                })
                .collect();
            ranks.into_iter().map(|r| r.join().unwrap()).collect()
        });
        // Whoever sees it first leaves, and the others see that.
        let told =
            |e: &Option<Error>| matches!(e, Some(Error::Protocol { .. } | Error::PeerLost { .. }));
        assert!(errors.iter().all(told), "{errors:?}");
        let seen = |e: &Option<Error>| matches!(e, Some(Error::Protocol { .. }));
        assert!(errors.iter().any(seen), "{errors:?}");
    }
}

/// A mesh of two whose other rank is a bare stream that has proven the key.
fn with_bare_peer() -> (Mesh, TcpStream, Sealer) {
    let listener = TcpListener::bind(loopback()).unwrap();
    let mut bare = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let sealing = Sealing::Encrypted;
    let link = Link::new(
        1,
        stream,
        Sealer::new(&[1; 32], 1, sealing).unwrap(),
        Opener::new(&[2; 32], 1, 1, sealing).unwrap(),
    );
    let mut sealer = Sealer::new(&[2; 32], 1, sealing).unwrap();
    let mut proof = Vec::new();
    sealer.seal(Kind::Proof, 0, b"proof", &mut proof).unwrap();
    bare.write_all(&proof).unwrap();
    let links = vec![None, Some(link.unwrap())];
    let mesh = Mesh::new(0, links, JOIN, Interrupter::default()).unwrap();
    (mesh, bare, sealer)
}

#[test]
fn a_peer_that_announces_an_absurd_length_is_refused_at_once() {
    let (mut mesh, mut bare, mut sealer) = with_bare_peer();
    let mut frame = Vec::new();
    sealer.seal(Kind::Last, 0, b"small", &mut frame).unwrap();
    frame[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    bare.write_all(&frame).unwrap();
    let error = mesh.exchange(&[], &[1], Some(JOIN)).unwrap_err();
    assert!(
        matches!(&error, Error::Protocol { rank: 1, expected, .. } if expected.contains("at most")),
        "{error:?}"
    );
}

#[test]
fn a_peer_that_says_what_nobody_asked_for_is_refused() {
    let (mut mesh, mut bare, mut sealer) = with_bare_peer();
    let mut frames = Vec::new();
    sealer
        .seal(Kind::Last, 1, b"on the other lane", &mut frames)
        .unwrap();
    bare.write_all(&frames).unwrap();
    let error = mesh.exchange(&[], &[1], Some(JOIN)).unwrap_err();
    assert!(
        matches!(error, Error::Protocol { rank: 1, .. }),
        "{error:?}"
    );
}

#[test]
fn a_peer_that_garbles_a_frame_is_refused() {
    let (mut mesh, mut bare, mut sealer) = with_bare_peer();
    let mut frame = Vec::new();
    sealer.seal(Kind::Last, 0, b"numbers", &mut frame).unwrap();
    let last = frame.len() - 1;
    frame[last] ^= 1;
    bare.write_all(&frame).unwrap();
    let error = mesh.exchange(&[], &[1], Some(JOIN)).unwrap_err();
    assert_eq!(error, Error::WrongKey { rank: 1 });
}

/// Forwards connections to `to`, a little at a time: 64 KiB every 4 ms each way, and each a little late.
fn slow_line(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind(loopback()).unwrap();
    let address = listener.local_addr().unwrap();
    let forward = |mut from: TcpStream, mut to: TcpStream| {
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                std::thread::sleep(Duration::from_millis(4));
                if to.write_all(&buffer[..read]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(std::net::Shutdown::Both);
        });
    };
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (Ok(near), Ok(far)) = (stream, TcpStream::connect(to)) else {
                return;
            };
            forward(near.try_clone().unwrap(), far.try_clone().unwrap());
            forward(far, near);
        }
    });
    address
}

#[test]
fn a_slow_line_delays_sums_and_does_not_lock_them_up() {
    const LEN: usize = 250_000;
    let hubs: Vec<Hub> = (0..3).map(|_| Hub::bind(loopback()).unwrap()).collect();
    let lines: Vec<SocketAddr> = hubs.iter().map(|h| slow_line(h.local_addr())).collect();
    for (epoch, one_hop_bytes) in [(1, usize::MAX), (2, 0)] {
        std::thread::scope(|scope| {
            for rank in 0..3 {
                let (hubs, lines) = (&hubs, &lines);
                scope.spawn(move || {
                    let mut group = config(hubs, rank, epoch);
                    group.peers = lines.clone();
                    let mut ranks = Tcp::join(&hubs[rank], group, JOIN).unwrap();
                    ranks.set_one_hop_bytes(one_hop_bytes).unwrap();
                    // In the background and at once after it in the foreground: both directions are full.
                    let background = ranks.background().unwrap();
                    background.begin(vec![1.0; LEN]).unwrap();
                    background.begin(vec![2.0; 10]).unwrap();
                    assert!(background.finish().unwrap().iter().all(|&v| v == 3.0));
                    assert!(background.finish().unwrap().iter().all(|&v| v == 6.0));
                    let mut data = vec![rank as f64; LEN];
                    ranks.all_reduce_f64(&mut data).unwrap();
                    assert!(data.iter().all(|&v| v == 3.0));
                });
            }
        });
    }
}
