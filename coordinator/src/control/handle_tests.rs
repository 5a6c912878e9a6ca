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
