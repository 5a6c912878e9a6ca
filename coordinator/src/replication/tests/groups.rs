//! What a group promises while members die, are cut off, come back, join and leave.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::Ordering;

use protobuf::Message as _;
use raft::eraftpb::{Message, MessageType};

use super::cluster::{Cluster, LONG, eventually, set};
use crate::clock::Duration;
use crate::ids::NodeId;
use crate::replication::{Error, MAX_COMMAND_BYTES};

fn ids(ids: &[u64]) -> BTreeSet<NodeId> {
    ids.iter().copied().map(NodeId).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_elect_one_leader_and_apply_the_same() {
    let cluster = Cluster::start(3, |_| {});
    assert_eq!(cluster.propose(set("a", b"1")).await, b"");
    assert_eq!(cluster.propose(set("a", b"2")).await, b"1");
    let leader = cluster.leader().await;
    for other in cluster.nodes.keys().filter(|id| **id != leader) {
        let refused = cluster.replica(*other).propose(set("a", b"3")).await;
        assert!(
            matches!(refused, Err(Error::NotLeader { .. })),
            "{refused:?}"
        );
        let view = cluster
            .replica(*other)
            .read_index()
            .await
            .expect("a majority");
        assert_eq!(
            view.get(b"a").expect("readable"),
            Some(b"2".to_vec()),
            "a follower's read is not stale"
        );
    }
    let large = vec![7u8; MAX_COMMAND_BYTES - 8];
    cluster.propose(set("big", &large)).await;
    let refused = cluster
        .replica(leader)
        .propose(vec![0; MAX_COMMAND_BYTES + 1])
        .await;
    assert_eq!(
        refused,
        Err(Error::TooLarge {
            bytes: MAX_COMMAND_BYTES + 1
        })
    );
    let state = cluster.converge().await;
    assert_eq!(state.len(), 2);
    assert!(state[b"big".as_slice()] == large);
    for node in cluster.nodes.values() {
        assert_eq!(
            node.machine.keys.load(Ordering::SeqCst),
            2,
            "derived data is kept up"
        );
        let applied = node.machine.applied.lock().expect("no panic").clone();
        assert!(applied.is_sorted() && applied.len() >= 3, "{applied:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_proposals_at_once_are_each_applied_once() {
    let cluster = Cluster::start(3, |_| {});
    let leader = cluster.replica(cluster.leader().await).clone();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..500 {
        let leader = leader.clone();
        tasks.spawn(async move { leader.propose(b"add n".to_vec()).await.expect("committed") });
    }
    let mut replies: Vec<_> = tasks.join_all().await;
    replies.sort();
    replies.dedup();
    assert_eq!(replies.len(), 500, "no two saw the same count");
    assert_eq!(cluster.converge().await[b"n".as_slice()], b"500");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_the_leader_and_a_restart_of_everything() {
    let mut cluster = Cluster::start(3, |_| {});
    for i in 0..20 {
        cluster.propose(set(&format!("k{i}"), b"v")).await;
        if i % 5 == 4 {
            let leader = cluster.leader().await;
            cluster.stop_node(leader).await;
            cluster.propose(set(&format!("without{i}"), b"v")).await;
            cluster.start_node(leader);
        }
    }
    assert_eq!(cluster.converge().await.len(), 24);
    for id in 1..=3 {
        cluster.stop_node(id).await;
    }
    for id in 1..=3 {
        cluster.start_node(id);
    }
    assert_eq!(cluster.converge().await.len(), 24);
    cluster.propose(set("after", b"v")).await;
    assert_eq!(cluster.converge().await.len(), 25);
    for node in cluster.nodes.values() {
        assert_eq!(
            node.machine.keys.load(Ordering::SeqCst),
            25,
            "derived data was rebuilt"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minority_commits_nothing_and_a_stale_leader_does_not_answer_reads() {
    let cluster = Cluster::start(5, |_| {});
    cluster.propose(set("a", b"old")).await;
    let stale = cluster.leader().await;
    let friend = if stale == 1 { 2 } else { 1 };
    let majority: Vec<u64> = (1..=5).filter(|id| *id != stale && *id != friend).collect();
    cluster.cut_off(&[stale, friend]);
    let proposed = tokio::spawn({
        let replica = cluster.replica(stale).clone();
        async move { replica.propose(set("a", b"lost")).await }
    });
    let read = cluster.replica(stale).read_index().await;
    assert!(
        matches!(read, Err(Error::Timeout | Error::NotLeader { .. })),
        "{:?}",
        read.err()
    );
    let refused = proposed.await.expect("no panic");
    assert!(refused.is_err(), "{refused:?}");
    let leader = cluster.leader_among(&majority).await;
    cluster
        .replica(leader)
        .propose(set("a", b"new"))
        .await
        .expect("a majority commits");
    let view = cluster.replica(friend).local_view();
    assert_eq!(view.get(b"a").expect("readable"), Some(b"old".to_vec()));
    cluster.heal();
    assert_eq!(cluster.converge().await[b"a".as_slice()], b"new");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_far_behind_gets_a_snapshot_and_the_log_stays_short() {
    let mut cluster = Cluster::start(3, |config| config.max_log_entries = 20);
    cluster.propose(set("kept", b"1")).await;
    cluster.propose(set("gone", b"1")).await;
    let leader = cluster.leader().await;
    let behind = if leader == 3 { 2 } else { 3 };
    cluster.converge().await;
    cluster.stop_node(behind).await;
    cluster.propose(b"del gone".to_vec()).await;
    for i in 0..60 {
        cluster
            .propose(set(&format!("k{i}"), &[i as u8; 50_000]))
            .await;
    }
    let leader = cluster.leader().await;
    eventually(|| {
        let status = cluster.replica(leader).status();
        (status.last_log_index - status.first_log_index < 21).then_some(())
    })
    .await;
    cluster.start_node(behind);
    let state = cluster.converge().await;
    assert_eq!(state.len(), 61);
    let back = &cluster.nodes[&behind];
    assert!(
        back.machine.reloads.load(Ordering::SeqCst) >= 2,
        "a snapshot was taken over"
    );
    assert_eq!(back.machine.keys.load(Ordering::SeqCst), 61);
    assert_eq!(
        back.replica.local_view().get(b"gone").expect("readable"),
        None
    );
    // It has what it needs to start again, and to go on.
    cluster.stop_node(behind).await;
    cluster.start_node(behind);
    cluster.propose(set("more", b"1")).await;
    assert_eq!(cluster.converge().await.len(), 62);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lags_behind_a_forgotten_log_gets_a_snapshot() {
    let mut cluster = Cluster::start(3, |_| {});
    cluster.propose(set("before", b"1")).await;
    cluster.converge().await;
    let leader = cluster.leader().await;
    let behind = if leader == 3 { 2 } else { 3 };
    cluster.stop_node(behind).await;
    cluster.propose(set("while", b"1")).await;
    let leader = cluster.leader().await;
    cluster
        .replica(leader)
        .forget_log()
        .await
        .expect("one that is away does not hold it up for ever");
    let status = cluster.replica(leader).status();
    assert!(
        status.first_log_index > status.last_log_index,
        "nothing is left of the log: {status:?}"
    );
    cluster.start_node(behind);
    assert_eq!(cluster.converge().await.len(), 2);
    assert!(
        cluster.nodes[&behind]
            .machine
            .reloads
            .load(Ordering::SeqCst)
            >= 2,
        "a snapshot was taken over"
    );
    cluster.propose(set("after", b"1")).await;
    assert_eq!(cluster.converge().await.len(), 3);
}

/// A Raft message as a peer at `term` would send it.
fn forged(kind: MessageType, from: u64, to: u64, term: u64) -> Message {
    let mut message = Message::default();
    message.set_msg_type(kind);
    message.from = from;
    message.to = to;
    message.term = term;
    // Elections forced by a transfer ask no lease.
    message.context = b"CampaignTransfer".to_vec().into();
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn only_members_are_heard_and_only_what_members_say() {
    let cluster = Cluster::start(3, |_| {});
    cluster.propose(set("a", b"1")).await;
    let leader = cluster.leader().await;
    let term = cluster.replica(leader).status().term;
    let outsider = cluster.outsider(9);
    let hear = |id: u64, message: &Message| {
        let bytes = message.write_to_bytes().expect("a message serialises");
        let from = NodeId(message.from);
        cluster.replica(id).shared().take_message(from, &bytes);
        bytes
    };
    let kinds = [
        MessageType::MsgAppend,
        MessageType::MsgHeartbeat,
        MessageType::MsgSnapshot,
        MessageType::MsgRequestVote,
        MessageType::MsgRequestPreVote,
        MessageType::MsgTimeoutNow,
        MessageType::MsgReadIndex,
    ];
    for id in 1..=3 {
        for kind in kinds {
            let bytes = hear(id, &forged(kind, 9, id, term + 1000));
            // The same by the network, under the certificate that the cluster's CA gave.
            let to = cluster.nodes[&id].transport.local_addr();
            outsider.send(to, "raft/0", bytes.into());
        }
        let member = if leader == 1 { 2 } else { 1 };
        for kind in [
            MessageType::MsgReadIndex,
            MessageType::MsgReadIndexResp,
            MessageType::MsgPropose,
            MessageType::MsgTransferLeader,
        ] {
            hear(id, &forged(kind, member, id, 0));
        }
        // Asked after them, so answered after them.
        let view = cluster.read(id).await;
        assert_eq!(view.get(b"a").expect("readable"), Some(b"1".to_vec()));
        let status = cluster.replica(id).status();
        assert!(status.term < term + 1000, "{status:?}");
        assert_eq!(status.failure, None);
    }
    // A member at such a term is heard, unless it was removed from the cluster.
    let (one, other) = (leader, if leader == 3 { 2 } else { 3 });
    let answer = forged(MessageType::MsgAppendResponse, other, one, term + 1000);
    cluster.nodes[&one].transport.revoke([NodeId(other)]);
    hear(one, &answer);
    cluster.read(one).await;
    assert!(cluster.replica(one).status().term < term + 1000);
    cluster.nodes[&one].transport.set_revoked(HashSet::new());
    hear(one, &answer);
    eventually(|| (cluster.replica(one).status().term >= term + 1000).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_join_and_leave_and_the_leader_may_be_among_them() {
    let mut cluster = Cluster::start(3, |config| config.max_log_entries = 50);
    for i in 0..120 {
        cluster.propose(set(&format!("k{i}"), b"v")).await;
    }
    for id in 4..=5 {
        cluster.start_node(id);
    }
    let leader = cluster.leader_among(&[1, 2, 3]).await;
    cluster
        .replica(leader)
        .change_members(ids(&[1, 2, 3, 4]), ids(&[5]))
        .await
        .expect("changed");
    let status = cluster.replica(leader).status();
    assert_eq!(
        (status.voters, status.learners),
        (ids(&[1, 2, 3, 4]), ids(&[5]))
    );
    assert_eq!(
        cluster.converge().await.len(),
        120,
        "the learner has everything too"
    );
    // The old leader leaves, the learner becomes a voter, all at once.
    let rest: Vec<u64> = (1..=5).filter(|id| *id != leader).collect();
    cluster
        .replica(leader)
        .change_members(ids(&rest), ids(&[]))
        .await
        .expect("changed");
    cluster.stop_node(leader).await;
    let next = cluster.leader().await;
    assert_ne!(next, leader);
    cluster.propose(set("after", b"v")).await;
    assert_eq!(cluster.converge().await.len(), 121);
    assert_eq!(cluster.replica(next).status().voters, ids(&rest));
    // Down to two, and still alive without the third.
    let two = [next, *rest.iter().find(|id| **id != next).expect("another")];
    cluster
        .replica(next)
        .change_members(ids(&two), ids(&[]))
        .await
        .expect("changed");
    for id in rest.iter().filter(|id| !two.contains(id)) {
        cluster.stop_node(*id).await;
    }
    cluster.propose(set("two", b"v")).await;
    let nobody = cluster
        .replica(cluster.leader().await)
        .change_members(ids(&[]), ids(&[]))
        .await;
    assert!(matches!(nobody, Err(Error::Config { .. })), "{nobody:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_shuts_down_hands_over() {
    let mut cluster = Cluster::start(3, |_| {});
    cluster.propose(set("a", b"1")).await;
    let leader = cluster.leader().await;
    let mut leadership = cluster.replica(leader).leadership();
    let other = if leader == 1 { 2 } else { 1 };
    let mut seen = cluster.replica(other).leadership();
    cluster.stop_node(leader).await;
    let wait = seen.wait_for(|now| now.is_some_and(|now| now.0 != leader));
    tokio::time::timeout(LONG, wait)
        .await
        .expect("a new leader")
        .expect("a running replica");
    assert_ne!(*leadership.borrow_and_update(), Some(NodeId(leader)));
    cluster.propose(set("a", b"2")).await;
}

/// Numbers for the report: run with `--ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures, asserts nothing about time"]
async fn latency_and_failover() {
    let mut cluster = Cluster::start(3, |_| {});
    let leader = cluster.replica(cluster.leader().await).clone();
    let measure = async |name: &str, command: Vec<u8>, n: usize| {
        let mut times = Vec::new();
        for _ in 0..n {
            let begin = crate::clock::monotonic();
            leader.propose(command.clone()).await.expect("committed");
            times.push(begin.elapsed());
        }
        times.sort();
        println!(
            "{name}: median {:?}, p99 {:?}",
            times[n / 2],
            times[n * 99 / 100]
        );
    };
    measure("propose 100 B", set("a", &[1; 100]), 500).await;
    measure("propose 1 MiB", set("b", &vec![1; 1 << 20]), 30).await;
    let begin = crate::clock::monotonic();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let leader = leader.clone();
        tasks.spawn(async move {
            for _ in 0..50 {
                leader
                    .propose(set("c", &[1; 100]))
                    .await
                    .expect("committed");
            }
        });
    }
    tasks.join_all().await;
    println!(
        "64 at once: {:.0} proposals/s",
        3200.0 / begin.elapsed().as_secs_f64()
    );
    let mut reads = Vec::new();
    for _ in 0..200 {
        let begin = crate::clock::monotonic();
        leader.read_index().await.expect("a majority");
        reads.push(begin.elapsed());
    }
    reads.sort();
    println!("read_index: median {:?}, p99 {:?}", reads[100], reads[198]);
    drop(leader);
    let mut times = Vec::new();
    for round in 0..10 {
        let leader = cluster.leader().await;
        cluster.cut_off(&[leader]);
        let rest: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
        let begin = crate::clock::monotonic();
        'served: loop {
            for id in &rest {
                if cluster
                    .replica(*id)
                    .propose(set("d", format!("{round}").as_bytes()))
                    .await
                    .is_ok()
                {
                    break 'served;
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        times.push(begin.elapsed());
        cluster.heal();
        cluster.converge().await;
    }
    times.sort();
    println!(
        "failover (leader cut off without a word): median {:?}, worst {:?}",
        times[5], times[9]
    );
    cluster.stop_node(1).await;
}
