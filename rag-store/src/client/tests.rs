//! What the client makes of its members' answers: three services that always answer the same.

use std::sync::atomic::{AtomicUsize, Ordering};

use coordinator::identity::Ca;
use coordinator::transport::{Handler, Reply};
use futures::future::BoxFuture;

use super::*;

const GROUP: RaftGroupId = RaftGroupId(1);

type Say = dyn Fn(&Op) -> Outcome + Send + Sync;

struct Fake {
    say: Box<Say>,
    asked: AtomicUsize,
    ops: Mutex<Vec<Op>>,
}

struct Service(Arc<Fake>);

impl Handler for Service {
    fn handle(&self, _from: NodeId, request: Bytes, mut reply: Reply) -> BoxFuture<'static, ()> {
        let request: Request = postcard::from_bytes(&request).unwrap();
        self.0.asked.fetch_add(1, Ordering::SeqCst);
        let outcome = (self.0.say)(&request.op);
        self.0.ops.lock().unwrap().push(request.op);
        Box::pin(async move {
            let frame = postcard::to_stdvec(&outcome).unwrap();
            let _ = reply.send(frame.into()).await;
            reply.finish().await;
        })
    }
}

struct Members(Vec<(NodeId, SocketAddr)>);

impl Directory for Members {
    fn group_of(&self, _tenant: &TenantId) -> Option<(RaftGroupId, Vec<(NodeId, SocketAddr)>)> {
        Some((GROUP, self.0.clone()))
    }
}

struct Three {
    client: StoreClient,
    nodes: Vec<Arc<Fake>>,
    _transports: Vec<Transport>,
}

impl Three {
    /// Nodes 1 to 3 with what each says.
    fn saying(says: [Box<Say>; 3]) -> Self {
        let ca = Ca::create("test").unwrap();
        let bind = |id: u64| {
            let identity = ca.issue(NodeId(id), "node").unwrap();
            Transport::bind(&identity, "127.0.0.1:0".parse().unwrap()).unwrap()
        };
        let (mut nodes, mut members, mut transports) = (Vec::new(), Vec::new(), Vec::new());
        for (id, say) in (1..).zip(says) {
            let fake = Arc::new(Fake {
                say,
                asked: AtomicUsize::new(0),
                ops: Mutex::default(),
            });
            let transport = bind(id);
            transport.register(SERVICE_CALL, Arc::new(Service(fake.clone())));
            members.push((NodeId(id), transport.local_addr()));
            nodes.push(fake);
            transports.push(transport);
        }
        Self {
            client: StoreClient::with_directory(bind(100), Arc::new(Members(members))),
            nodes,
            _transports: transports,
        }
    }

    fn asked(&self) -> Vec<usize> {
        let count = |fake: &Arc<Fake>| fake.asked.load(Ordering::SeqCst);
        self.nodes.iter().map(count).collect()
    }
}

fn always(outcome: Outcome) -> Box<Say> {
    Box::new(move |_| outcome.clone())
}

fn full() -> Outcome {
    Outcome::Elsewhere {
        why: "No space left on device".into(),
        disk_full: true,
    }
}

fn broken() -> Outcome {
    Outcome::Elsewhere {
        why: "the state machine broke off".into(),
        disk_full: false,
    }
}

fn none() -> Outcome {
    Outcome::Ok(Answer::Collections(Vec::new()))
}

fn tenant() -> TenantId {
    "a".parse().unwrap()
}

/// Lists the collections `times` times, which must succeed, and returns how often each node was asked. On an overloaded machine
/// a connection may fail and another node be asked: then all is done again, a few times.
async fn asked_for(
    wanted: [usize; 3],
    times: usize,
    say: impl Fn() -> [Box<Say>; 3],
) -> Vec<usize> {
    let mut asked = Vec::new();
    for _ in 0..5 {
        let three = Three::saying(say());
        for _ in 0..times {
            assert_eq!(three.client.collections(&tenant()).await, Ok(Vec::new()));
        }
        asked = three.asked();
        if asked == wanted {
            break;
        }
    }
    asked
}

#[tokio::test]
async fn a_member_that_cannot_is_passed_over_and_the_one_that_answered_is_asked_first_from_then_on()
{
    let say = || [always(full()), always(broken()), always(none())];
    assert_eq!(asked_for([1, 1, 2], 2, say).await, [1, 1, 2]);
}

#[tokio::test]
async fn the_disk_is_full_only_when_every_member_says_so() {
    let three = Three::saying([always(full()), always(full()), always(full())]);
    let refused = three.client.collections(&tenant()).await;
    assert!(
        matches!(refused, Err(Error::DiskFull { .. })),
        "{refused:?}"
    );
    assert!(three.asked().iter().all(|asked| *asked >= 1));

    let three = Three::saying([always(full()), always(broken()), always(full())]);
    let refused = three.client.collections(&tenant()).await;
    assert!(
        matches!(refused, Err(Error::Unavailable { .. })),
        "{refused:?}"
    );
    assert_eq!(three.client.leader(GROUP), None);
}

#[tokio::test]
async fn a_redirection_is_followed_to_the_leader_and_a_refusal_is_not_remembered_as_leadership() {
    let leads = |node| {
        always(Outcome::NotLeader {
            leader: Some(NodeId(node)),
        })
    };
    let say = || [leads(3), always(broken()), always(none())];
    assert_eq!(asked_for([1, 0, 1], 1, say).await, [1, 0, 1]);

    let three = Three::saying([
        always(Outcome::Err(Error::NotFound)),
        always(none()),
        always(none()),
    ]);
    assert_eq!(
        three.client.collections(&tenant()).await,
        Err(Error::NotFound)
    );
    assert_eq!(three.client.leader(GROUP), None);
}

#[tokio::test]
async fn members_that_point_at_each_other_are_not_asked_in_a_tight_loop() {
    let leads = |node| {
        always(Outcome::NotLeader {
            leader: Some(NodeId(node)),
        })
    };
    let three = Three::saying([leads(2), leads(1), leads(1)]);
    let refused = three.client.collections(&tenant()).await;
    assert!(matches!(refused, Err(Error::Unavailable { .. })));
    let asked: usize = three.asked().iter().sum();
    let rounds = RETRY_FOR.as_millis() / ROUND_PAUSE.as_millis() + 1;
    assert!(
        asked as u128 <= rounds * 6,
        "{asked} calls in {RETRY_FOR:?}"
    );
}

#[tokio::test]
async fn an_upload_that_is_refused_on_the_way_is_deleted_again() {
    let say = || -> Box<Say> {
        Box::new(|op| match op {
            Op::Part { .. } => Outcome::Err(Error::DiskFull { why: "x".into() }),
            _ => Outcome::Ok(Answer::Done),
        })
    };
    let three = Three::saying([say(), say(), say()]);
    let owner = tenant();
    let sent = three.client.upload(
        &owner,
        CollectionId::generate(),
        "a.txt",
        "",
        Bytes::from_static(b"x"),
    );
    assert!(matches!(sent.await, Err(Error::DiskFull { .. })));
    let ops = || three.nodes[0].ops.lock().unwrap().clone();
    let deleted = async {
        while !matches!(ops().last(), Some(Op::DeleteDocument { .. })) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(30), deleted).await;
    let (begun, gone) = (ops().remove(0), ops().pop());
    let Op::Begin { id, .. } = begun else {
        panic!("{begun:?}")
    };
    assert_eq!(gone, Some(Op::DeleteDocument { id }));
    waited.expect("deleted in time");
}
