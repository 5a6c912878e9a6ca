//! A node's way to the leader, played with coordinators that only say who they think leads.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::BoxFuture;

use super::*;
use crate::identity::Ca;
use crate::transport::Reply;

/// A coordinator that answers heartbeats with `reply` and counts them.
fn coordinator(ca: &Ca, id: u64, reply: fn() -> HeartbeatReply) -> (Transport, Arc<AtomicUsize>) {
    let transport = transport(ca, id);
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let handle = move |_: NodeId, _: Bytes, to: Reply| -> BoxFuture<'static, ()> {
        count.fetch_add(1, Ordering::SeqCst);
        let frame = wire::encode(&reply()).expect("a reply");
        Box::pin(to.answer(frame.into()))
    };
    transport.register(SERVICE_HEARTBEAT, Arc::new(handle));
    (transport, asked)
}

fn transport(ca: &Ca, id: u64) -> Transport {
    let identity = ca.issue(NodeId(id), "node").expect("an identity");
    Transport::bind(&identity, (Ipv4Addr::LOCALHOST, 0).into()).expect("a transport")
}

fn heartbeat() -> Heartbeat {
    Heartbeat {
        node: NodeId(9),
        incarnation: 1,
        revision: 0,
        groups: Vec::new(),
    }
}

#[tokio::test]
async fn a_heartbeat_goes_past_coordinators_that_know_no_leader() {
    let ca = Ca::create("test").expect("a CA");
    let ignorant: fn() -> HeartbeatReply = || HeartbeatReply::NotLeader { leader: None };
    let (first, _) = coordinator(&ca, 1, ignorant);
    let (second, _) = coordinator(&ca, 2, ignorant);
    let (third, _) = coordinator(&ca, 3, ignorant);
    let (leader, heard) = coordinator(&ca, 4, || HeartbeatReply::Heard);
    let seeds = [&first, &second, &third, &leader].map(|t| t.local_addr());
    let control = ControlHandle::connect(transport(&ca, 9), seeds.to_vec());
    for beats in 1..=3 {
        assert!(control.beat(&heartbeat()).await);
        assert_eq!(heard.load(Ordering::SeqCst), beats);
    }
}

#[tokio::test]
async fn a_heartbeat_does_not_wait_for_a_coordinator_that_is_late() {
    let ca = Ca::create("test").expect("a CA");
    let stuck = transport(&ca, 1);
    let handle = |_: NodeId, _: Bytes, mut to: Reply| -> BoxFuture<'static, ()> {
        Box::pin(async move { to.closed().await })
    };
    stuck.register(SERVICE_HEARTBEAT, Arc::new(handle));
    stuck.register(SERVICE_WATCH, Arc::new(handle));
    let (leader, heard) = coordinator(&ca, 2, || HeartbeatReply::Heard);
    let seeds = [&stuck, &leader].map(|t| t.local_addr());
    let control = ControlHandle::connect(transport(&ca, 9), seeds.to_vec());
    assert!(control.beat(&heartbeat()).await);
    assert_eq!(heard.load(Ordering::SeqCst), 1);
    assert!(
        !control.inner.whereabouts().is_silent(stuck.local_addr()),
        "it was not given up, only not waited for"
    );
}

#[tokio::test]
async fn what_a_node_learns_of_removed_nodes_its_transport_knows_too() {
    let ca = Ca::create("test").expect("a CA");
    let control = ControlHandle::connect(transport(&ca, 9), Vec::new());
    let state = |revision, revoked: &[u64]| {
        Arc::new(ControlState {
            revision,
            revoked: revoked.iter().copied().map(NodeId).collect(),
            ..ControlState::default()
        })
    };
    control.inner.publish(state(5, &[3]));
    assert!(control.transport().is_revoked(NodeId(3)));
    assert!(!control.transport().is_revoked(NodeId(4)));
    control.inner.publish(state(4, &[]));
    assert!(
        control.transport().is_revoked(NodeId(3)),
        "an older state takes nobody back"
    );
}

#[tokio::test]
async fn what_was_acknowledged_is_seen_at_once_however_late_the_watch_is() {
    let ca = Ca::create("test").expect("a CA");
    // A coordinator that commits and shows its state to those who ask, and whose watch never says anything.
    let leader = transport(&ca, 1);
    let applied = ControlState {
        revision: 8,
        ..ControlState::default()
    };
    let committed =
        wire::encode(&ProposeReply::Applied(Ok(Outcome::Done { revision: 8 }))).expect("a reply");
    let state = wire::encode(&ReadReply::State(Box::new(applied))).expect("a reply");
    for (service, frame) in [(SERVICE_PROPOSE, committed), (SERVICE_READ, state)] {
        let frame = Bytes::from(frame);
        let handle = move |_: NodeId, _: Bytes, to: Reply| -> BoxFuture<'static, ()> {
            Box::pin(to.answer(frame.clone()))
        };
        leader.register(service, Arc::new(handle));
    }
    let control = ControlHandle::connect(transport(&ca, 9), vec![leader.local_addr()]);
    let command = Command::RemoveNode { node: NodeId(3) };
    control.propose(command).await.expect("committed");
    assert_eq!(control.state().revision, 8);
}

#[tokio::test]
async fn what_was_acknowledged_stays_so_when_no_state_can_be_read_after_it() {
    let ca = Ca::create("test").expect("a CA");
    let leader = transport(&ca, 1);
    let handle = |_: NodeId, _: Bytes, to: Reply| -> BoxFuture<'static, ()> {
        let frame = wire::encode(&ProposeReply::Applied(Ok(Outcome::Done { revision: 8 })))
            .expect("a reply");
        Box::pin(to.answer(frame.into()))
    };
    leader.register(SERVICE_PROPOSE, Arc::new(handle));
    let control = ControlHandle::connect(transport(&ca, 9), vec![leader.local_addr()]);
    let command = Command::RemoveNode { node: NodeId(3) };
    let outcome = control.propose(command).await.expect("committed");
    assert_eq!(outcome, Outcome::Done { revision: 8 });
}
