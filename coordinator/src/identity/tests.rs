//! Identity's promises: a token survives the clipboard or says what is wrong; only this cluster's CA makes nodes.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;

use super::*;
use crate::Redacted;
use crate::clock::Duration;
use crate::ids::{NodeId, Role};
use crate::transport::{self, Reply, Transport};

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn request(pending: &PendingIdentity, name: &str) -> JoinRequest {
    JoinRequest {
        secret: [0; 32],
        csr_pem: pending.csr_pem().to_owned(),
        name: name.to_owned(),
        roles: BTreeSet::from([Role::Worker]),
        addr: loopback(),
        data_addr: None,
        devices: Vec::new(),
        version: "test".to_owned(),
    }
}

/// Admits whoever knows the secret, as node 9.
struct OneSecret {
    ca: Ca,
    secret: [u8; 32],
}

impl JoinAuthority for OneSecret {
    fn admit(&self, request: JoinRequest) -> BoxFuture<'_, Result<JoinReply, String>> {
        Box::pin(async move {
            if request.secret != self.secret {
                return Err("the token is used up".to_owned());
            }
            Ok(JoinReply {
                node_id: NodeId(9),
                cert_pem: self
                    .ca
                    .sign_csr(&request.csr_pem, NodeId(9))
                    .map_err(|e| e.to_string())?,
                ca_pem: self.ca.cert_pem().to_owned(),
                seeds: Vec::new(),
                cluster_key: Some(Redacted::new([7; 32])),
                ca_key_pem: None,
            })
        })
    }
}

#[test]
fn a_saved_identity_comes_back_and_only_its_owner_can_read_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let ca = Ca::create("Musterkreis").expect("a CA");
    let identity = ca.issue(NodeId(3), "server-3").expect("an identity");
    identity.save(dir.path()).expect("saved");
    ca.save_dir(dir.path()).expect("saved");
    for file in ["node.key", "node.crt", "ca.crt", "ca.key"] {
        let mode = std::fs::metadata(dir.path().join(file))
            .expect("a file")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    let back = Identity::load(dir.path()).expect("loaded");
    assert_eq!(
        (back.node_id, &back.cert_pem, &back.key_pem),
        (NodeId(3), &identity.cert_pem, &identity.key_pem)
    );
    assert_eq!(
        Ca::load_dir(dir.path()).expect("loaded").fingerprint(),
        ca.fingerprint()
    );
    assert_eq!(back.ca_fingerprint().expect("a CA"), ca.fingerprint());
    assert!(!format!("{back:?}{ca:?}").contains("PRIVATE"));
}

#[test]
fn a_key_that_does_not_belong_to_the_certificate_is_refused() {
    let (one, two) = (
        Ca::create("one").expect("a CA"),
        Ca::create("two").expect("a CA"),
    );
    assert!(matches!(
        Ca::load(one.cert_pem(), two.key_pem()),
        Err(Error::Invalid { .. })
    ));
    let (mine, other) = (
        PendingIdentity::new("a").expect("a key"),
        PendingIdentity::new("b").expect("a key"),
    );
    let cert = one
        .sign_csr(other.csr_pem(), NodeId(4))
        .expect("a certificate");
    assert!(matches!(
        mine.complete(NodeId(4), &cert, one.cert_pem()),
        Err(Error::Invalid { .. })
    ));
    assert!(
        matches!(
            other.complete(NodeId(5), &cert, one.cert_pem()),
            Err(Error::Invalid { .. })
        ),
        "other node"
    );
    assert!(one.sign_csr("-----BEGIN NONSENSE-----", NodeId(4)).is_err());
    assert!(one.issue(NodeId(0), "zero").is_err());
    assert!(one.issue(NodeId(1), "").is_err());
}

#[test]
fn a_token_survives_the_clipboard_and_a_damaged_one_says_so() {
    let token = JoinToken {
        secret: [5; 32],
        ca_fingerprint: [6; 32],
        addrs: vec![
            "10.0.0.1:7400".parse().expect("an address"),
            "[fd00::1]:7400".parse().expect("an address"),
        ],
    };
    let text = token.to_string();
    assert!(text.starts_with("vbj1-") && text.is_ascii());
    assert_eq!(
        format!("  {text}\n").parse::<JoinToken>().expect("a token"),
        token
    );
    assert!(!format!("{token:?}").contains("05"));
    let mut mistyped = text.clone();
    let last = if mistyped.pop() == Some('0') {
        '1'
    } else {
        '0'
    };
    mistyped.push(last);
    for bad in [
        &text[..text.len() - 2],
        &mistyped,
        "vbj1-",
        "vbj1-00",
        "vbj1-zz",
        "hello",
        "",
    ] {
        assert!(
            matches!(bad.parse::<JoinToken>(), Err(Error::Token { .. })),
            "{bad}"
        );
    }
}

#[tokio::test]
async fn a_new_node_joins_with_its_token_and_then_talks() {
    let ca = Ca::create("Musterkreis").expect("a CA");
    let one = Transport::bind(
        &ca.issue(NodeId(1), "one").expect("an identity"),
        loopback(),
    )
    .expect("a transport");
    let echo = |_: NodeId, request: Bytes, reply: Reply| -> BoxFuture<'static, ()> {
        Box::pin(reply.answer(request))
    };
    one.register("echo", Arc::new(echo));
    let token = JoinToken {
        secret: [1; 32],
        ca_fingerprint: ca.fingerprint(),
        addrs: vec![one.local_addr()],
    };

    let pending = PendingIdentity::new("new").expect("a key");
    let refused = join(one.local_addr(), &token, request(&pending, "new")).await;
    assert!(
        matches!(&refused, Err(Error::JoinRefused { why }) if why.contains("takes no joins")),
        "{refused:?}"
    );

    one.serve_join(Arc::new(OneSecret {
        ca,
        secret: [1; 32],
    }));
    let reply = join(one.local_addr(), &token, request(&pending, "new"))
        .await
        .expect("admitted");
    assert_eq!(reply.cluster_key, Some(Redacted::new([7; 32])));
    let identity = pending
        .complete(reply.node_id, &reply.cert_pem, &reply.ca_pem)
        .expect("an identity");
    assert_eq!(identity.node_id, NodeId(9));
    let nine = Transport::bind(&identity, loopback()).expect("a transport");
    let answer = nine
        .call(
            one.local_addr(),
            "echo",
            Bytes::from_static(b"hi"),
            Duration::from_secs(5),
        )
        .await;
    assert_eq!(answer.expect("an answer"), Bytes::from_static(b"hi"));

    let mut wrong = token.clone();
    wrong.secret = [2; 32];
    let pending = PendingIdentity::new("second").expect("a key");
    let refused = join(one.local_addr(), &wrong, request(&pending, "second")).await;
    assert!(
        matches!(&refused, Err(Error::JoinRefused { why }) if why == "the token is used up"),
        "{refused:?}"
    );

    let mut foreign = token.clone();
    foreign.ca_fingerprint = [3; 32];
    let refused = join(one.local_addr(), &foreign, request(&pending, "second")).await;
    assert!(
        matches!(&refused, Err(Error::JoinUnreachable { why, .. }) if why.contains("another cluster")),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_node_of_another_cluster_is_refused() {
    let (ours, theirs) = (
        Ca::create("ours").expect("a CA"),
        Ca::create("theirs").expect("a CA"),
    );
    let one = Transport::bind(
        &ours.issue(NodeId(1), "one").expect("an identity"),
        loopback(),
    )
    .expect("a transport");
    one.register(
        "echo",
        Arc::new(
            |_: NodeId, request: Bytes, reply: Reply| -> BoxFuture<'static, ()> {
                Box::pin(reply.answer(request))
            },
        ),
    );
    let intruder = theirs.issue(NodeId(2), "two").expect("an identity");
    let call = |identity: Identity, to: SocketAddr| async move {
        let transport = Transport::bind(&identity, loopback()).expect("a transport");
        transport
            .call(
                to,
                "echo",
                Bytes::from_static(b"hi"),
                Duration::from_secs(5),
            )
            .await
    };
    // Foreign certificate, foreign trust: our certificate is refused at once.
    let refused = call(intruder.clone(), one.local_addr()).await;
    assert!(
        matches!(refused, Err(transport::Error::Unreachable { .. })),
        "{refused:?}"
    );
    // Foreign certificate, but it trusts our CA: we refuse its certificate.
    let disguised = Identity {
        ca_pem: ours.cert_pem().to_owned(),
        ..intruder
    };
    let refused = call(disguised, one.local_addr()).await;
    assert!(
        matches!(refused, Err(transport::Error::Unreachable { .. })),
        "{refused:?}"
    );
    // The same call with a certificate of ours works, so it was the certificate.
    let friend = ours.issue(NodeId(2), "two").expect("an identity");
    assert!(call(friend, one.local_addr()).await.is_ok());
}
