//! The transport's promises, between endpoints in one process over loopback.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::identity::{Ca, SERVER_NAME, stranger_config};

const LONG: Duration = Duration::from_secs(60);

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

struct Cluster {
    ca: Ca,
}

impl Cluster {
    fn new() -> Self {
        Self {
            ca: Ca::create("test").expect("a CA"),
        }
    }

    fn node(&self, id: u64) -> Transport {
        self.node_at(id, loopback())
    }

    fn node_at(&self, id: u64, listen: SocketAddr) -> Transport {
        let identity = self.ca.issue(NodeId(id), "node").expect("an identity");
        Transport::bind(&identity, listen).expect("a transport")
    }
}

fn handler<F, R>(handle: F) -> Arc<dyn Handler>
where
    F: Fn(NodeId, Bytes, Reply) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    Arc::new(
        move |from: NodeId, request: Bytes, reply: Reply| -> BoxFuture<'static, ()> {
            Box::pin(handle(from, request, reply))
        },
    )
}

/// A call as its users make it: a loaded machine may take longer over a handshake than a dial waits, so one more dial.
async fn call(
    from: &Transport,
    to: SocketAddr,
    service: &str,
    request: impl Into<Bytes>,
) -> Result<Bytes, Error> {
    let request = request.into();
    match from.call(to, service, request.clone(), LONG).await {
        Err(Error::Unreachable { .. }) => {
            tokio::time::sleep(limits::REDIAL_AFTER).await;
            from.call(to, service, request, LONG).await
        }
        answer => answer,
    }
}

/// As [`call`], for many frames.
async fn open(from: &Transport, to: SocketAddr, service: &str) -> Result<FrameStream, Error> {
    match from.open(to, service, Bytes::new()).await {
        Err(Error::Unreachable { .. }) => {
            tokio::time::sleep(limits::REDIAL_AFTER).await;
            from.open(to, service, Bytes::new()).await
        }
        stream => stream,
    }
}

/// Whatever should come, comes within [`LONG`].
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, what)
        .await
        .expect("it comes in time")
}

fn echo() -> Arc<dyn Handler> {
    handler(|_, request, reply| reply.answer(request))
}

#[tokio::test]
async fn a_request_is_answered_and_the_handler_knows_who_asked() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1), cluster.node(2));
    two.register(
        "who",
        handler(|from, _, reply| reply.answer(Bytes::from(from.to_string()))),
    );
    let answer = call(&one, two.local_addr(), "who", Bytes::new())
        .await
        .expect("an answer");
    assert_eq!(answer, "1");
    let error = call(&one, two.local_addr(), "what", Bytes::new())
        .await
        .expect_err("no such service");
    assert_eq!(error.code(), Some(ErrorCode::UnknownService));
    two.register(
        "no",
        handler(|_, _, reply| reply.fail(RemoteError::new(ErrorCode::Conflict, "stale"))),
    );
    let error = call(&one, two.local_addr(), "no", Bytes::new())
        .await
        .expect_err("refused");
    assert!(
        matches!(error, Error::Refused(e) if e == RemoteError::new(ErrorCode::Conflict, "stale"))
    );
}

#[tokio::test]
async fn frames_up_to_the_limit_pass_and_larger_ones_are_refused_on_either_side() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1), cluster.node(2));
    two.register("echo", echo());
    for size in [0, 1, 70_000, 5 << 20, MAX_FRAME_BYTES] {
        let request = Bytes::from((0..size).map(|i| i as u8).collect::<Vec<_>>());
        let answer = call(&one, two.local_addr(), "echo", request.clone())
            .await
            .expect("an answer");
        assert!(answer == request, "{size}");
    }
    let large = Bytes::from(vec![0; MAX_FRAME_BYTES + 1]);
    let error = one
        .call(two.local_addr(), "echo", large.clone(), LONG)
        .await
        .expect_err("too large");
    assert!(matches!(error, Error::FrameTooLarge { bytes } if bytes == large.len()));
    two.register(
        "large",
        handler(move |_, _, reply| reply.answer(large.clone())),
    );
    let error = call(&one, two.local_addr(), "large", Bytes::new())
        .await
        .expect_err("too large");
    assert!(matches!(error, Error::Closed), "{error:?}");
}

#[tokio::test]
async fn a_reply_of_many_frames_comes_in_order_and_may_be_awaited_in_pieces() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1), cluster.node(2));
    two.register(
        "count",
        handler(|_, _, mut reply: Reply| async move {
            for i in 0..100u32 {
                reply
                    .send(Bytes::from(vec![i as u8; i as usize * 1000]))
                    .await
                    .expect("the caller listens");
                tokio::task::yield_now().await;
            }
            reply.finish().await;
        }),
    );
    let mut stream = open(&one, two.local_addr(), "count")
        .await
        .expect("a stream");
    let count = async {
        let mut seen = 0usize;
        loop {
            // Giving up in the middle of a frame must lose nothing.
            let piece = tokio::time::timeout(Duration::from_micros(50), stream.next());
            let Ok(item) = piece.await else {
                continue;
            };
            let Some(frame) = item else { return seen };
            assert_eq!(frame.expect("a frame"), vec![seen as u8; seen * 1000]);
            seen += 1;
        }
    };
    assert_eq!(soon(count).await, 100);
    assert!(soon(stream.next()).await.is_none());
}

#[tokio::test]
async fn dropping_a_stream_or_running_out_of_time_tells_the_handler() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1), cluster.node(2));
    let (gone, mut handlers) = mpsc::unbounded_channel();
    two.register(
        "wait",
        handler(move |_, _, mut reply: Reply| {
            let gone = gone.clone();
            async move {
                assert!(!reply.is_closed());
                reply
                    .send(Bytes::from_static(b"started"))
                    .await
                    .expect("the caller listens");
                reply.closed().await;
                assert!(reply.is_closed());
                assert_eq!(reply.send(Bytes::from_static(b"late")).await, Err(Closed));
                gone.send(()).expect("the test listens");
            }
        }),
    );
    for to in [two.local_addr(), one.local_addr()] {
        if to == one.local_addr() {
            one.register("wait", two.inner.handler("wait").expect("registered above"));
        }
        let mut stream = open(&one, to, "wait").await.expect("a stream");
        let first = soon(stream.next()).await.expect("a frame");
        assert_eq!(first.expect("a frame"), "started");
        drop(stream);
        tokio::time::timeout(LONG, handlers.recv())
            .await
            .expect("the handler was told");
    }
    two.register(
        "never",
        handler(|_, _, mut reply: Reply| async move { reply.closed().await }),
    );
    let error = one
        .call(
            two.local_addr(),
            "never",
            Bytes::new(),
            Duration::from_millis(50),
        )
        .await;
    assert!(matches!(error, Err(Error::Timeout)), "{error:?}");
}

#[tokio::test]
async fn a_handler_that_panics_or_forgets_its_reply_looks_closed() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1), cluster.node(2));
    two.register("forgets", handler(|_, _, _reply| async {}));
    two.register(
        "half",
        handler(|_, _, mut reply: Reply| async move {
            reply
                .send(Bytes::from_static(b"half"))
                .await
                .expect("the caller listens");
        }),
    );
    let error = one
        .call(two.local_addr(), "forgets", Bytes::new(), LONG)
        .await;
    assert!(matches!(error, Err(Error::Closed)), "{error:?}");
    let mut stream = open(&one, two.local_addr(), "half")
        .await
        .expect("a stream");
    let mut last = None;
    while let Some(item) = soon(stream.next()).await {
        last = Some(item);
    }
    assert!(
        matches!(last, Some(Err(Error::Closed))),
        "an unfinished reply must not look whole: {last:?}"
    );
}

#[tokio::test]
async fn one_way_messages_arrive_in_order() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1), cluster.node(2));
    for to in [&two, &one] {
        let (sender, mut messages) = mpsc::unbounded_channel();
        to.register(
            "log",
            handler(move |from, message, _| {
                sender.send((from, message)).expect("the test listens");
                async {}
            }),
        );
        for i in 0..2000u32 {
            one.send(
                to.local_addr(),
                "log",
                Bytes::copy_from_slice(&i.to_le_bytes()),
            );
        }
        for i in 0..2000u32 {
            let message = tokio::time::timeout(LONG, messages.recv())
                .await
                .expect("a message")
                .expect("a message");
            assert_eq!(
                message,
                (NodeId(1), Bytes::copy_from_slice(&i.to_le_bytes()))
            );
        }
    }
}

#[tokio::test]
async fn a_dead_address_is_unreachable_and_a_taken_port_says_so() {
    let cluster = Cluster::new();
    let one = cluster.node(1);
    let socket = UdpSocket::bind(loopback()).expect("a port");
    let silent = socket.local_addr().expect("an address");
    let error = one.call(silent, "echo", Bytes::new(), LONG).await;
    assert!(
        matches!(error, Err(Error::Unreachable { addr, .. }) if addr == silent),
        "{error:?}"
    );
    let error = Transport::bind(
        &cluster.ca.issue(NodeId(2), "two").expect("an identity"),
        silent,
    )
    .err();
    assert!(
        matches!(error, Some(Error::Bind { addr, .. }) if addr == silent),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_restarted_node_is_reached_again_on_its_old_address() {
    let cluster = Cluster::new();
    let one = cluster.node(1);
    let identity = cluster.ca.issue(NodeId(2), "two").expect("an identity");
    let two = Transport::bind(&identity, loopback()).expect("a transport");
    two.register("echo", echo());
    let to = two.local_addr();
    call(&one, to, "echo", Bytes::new())
        .await
        .expect("an answer");
    two.shutdown().await;
    drop(two);
    let bound = async {
        loop {
            // The old endpoint gives its port back only when its driver has ended.
            match Transport::bind(&identity, to) {
                Ok(two) => return two,
                Err(Error::Bind { .. }) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(other) => panic!("{other}"),
            }
        }
    };
    let two = soon(bound).await;
    two.register("echo", echo());
    call(&one, to, "echo", Bytes::new())
        .await
        .expect("an answer");
}

#[tokio::test]
async fn a_revoked_node_is_refused_in_both_directions() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1), cluster.node(2));
    one.register("echo", echo());
    two.register("echo", echo());
    call(&one, two.local_addr(), "echo", Bytes::new())
        .await
        .expect("an answer");
    call(&two, one.local_addr(), "echo", Bytes::new())
        .await
        .expect("an answer");
    one.revoke([NodeId(2)]);
    one.revoke([NodeId(7)]);
    assert!(one.is_revoked(NodeId(2)), "a later list takes nobody back");
    let refused = tokio::time::timeout(LONG, async {
        loop {
            match two.call(one.local_addr(), "echo", Bytes::new(), LONG).await {
                Err(Error::Unreachable { .. }) => break,
                _ => tokio::task::yield_now().await,
            }
        }
    });
    refused.await.expect("refused in the end");
    let refused = async {
        loop {
            // The connection that was there is closed in the background.
            match one.call(two.local_addr(), "echo", Bytes::new(), LONG).await {
                Err(Error::Unreachable { why, .. }) => return why,
                _ => tokio::task::yield_now().await,
            }
        }
    };
    let why = soon(refused).await;
    assert!(why.contains("removed"), "{why}");
    one.set_revoked(HashSet::new());
    tokio::time::sleep(limits::REDIAL_AFTER).await;
    call(&one, two.local_addr(), "echo", Bytes::new())
        .await
        .expect("taken back");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_revocation_is_missed_between_two_streams() {
    let cluster = Cluster::new();
    for _ in 0..20 {
        let (one, two) = (cluster.node(1), cluster.node(2));
        one.register("echo", echo());
        call(&two, one.local_addr(), "echo", Bytes::new())
            .await
            .expect("an answer");
        // Streams keep the far side's loop turning while the revocation comes.
        let busy = tokio::spawn({
            let (two, to) = (two.clone(), one.local_addr());
            async move {
                let refused =
                    async { while two.call(to, "echo", Bytes::new(), LONG).await.is_ok() {} };
                soon(refused).await;
            }
        });
        tokio::task::yield_now().await;
        one.revoke([NodeId(2)]);
        soon(busy).await.expect("refused in the end");
    }
}

#[tokio::test]
async fn a_node_reaches_itself_also_when_it_listens_everywhere() {
    let cluster = Cluster::new();
    let one = cluster.node_at(1, (Ipv4Addr::UNSPECIFIED, 0).into());
    one.register("echo", echo());
    for ip in [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
        let to = (ip, one.local_addr().port()).into();
        let answer = one.call(to, "echo", Bytes::from_static(b"me"), LONG).await;
        assert_eq!(answer.expect("an answer"), "me", "{ip}");
    }
}

#[tokio::test]
async fn whoever_has_no_certificate_is_turned_away() {
    let cluster = Cluster::new();
    let one = cluster.node(1);
    let handled = Arc::new(AtomicUsize::new(0));
    let count = handled.clone();
    one.register(
        "echo",
        handler(move |_, request, reply| {
            count.fetch_add(1, Ordering::SeqCst);
            reply.answer(request)
        }),
    );
    let config = stranger_config(cluster.ca.fingerprint(), wire::ALPN).expect("a configuration");
    let endpoint = Endpoint::client(loopback()).expect("an endpoint");
    let connecting = endpoint
        .connect_with(config, one.local_addr(), SERVER_NAME)
        .expect("a dial");
    let refusal = async {
        match connecting.await {
            Ok(connection) => {
                if let Ok((mut send, _)) = connection.open_bi().await {
                    let _ = wire::write_service(&mut send, "echo").await;
                    let _ = wire::write_data(&mut send, Bytes::from_static(b"hi")).await;
                }
                connection.closed().await
            }
            Err(refusal) => refusal,
        }
    };
    let refusal = soon(refusal).await.to_string();
    assert!(refusal.contains("certificate of this cluster"), "{refusal}");
    assert_eq!(handled.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_hostile_peer_harms_nobody_else() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1), cluster.node(2));
    two.register("echo", echo());
    let huge = wire::header(wire::Kind::Data, u32::MAX as usize);
    let name = wire::small_frame(wire::Kind::Service, b"echo");
    let long_name = wire::small_frame(wire::Kind::Service, &[b'x'; 4096]);
    let bad_kind = [1, 0, 0, 0, 77, 0];
    let cases: [Vec<&[u8]>; 7] = [
        vec![b"GET / HTTP/1.1\r\n\r\n"],
        vec![&huge],
        vec![&name, &huge],
        vec![&long_name],
        vec![&bad_kind],
        vec![&name, &[9, 0, 0, 0, 0, 1, 2]],
        vec![],
    ];
    for (number, case) in cases.iter().enumerate() {
        let (_connection, mut send, receive) = one
            .request_stream(two.local_addr())
            .await
            .expect("a stream");
        for bytes in case {
            send.write_all(bytes).await.expect("written");
        }
        let _ = send.finish();
        let mut reply = FrameReader::new(receive, MAX_FRAME_BYTES, None);
        let answer = tokio::time::timeout(LONG, reply.next())
            .await
            .expect("the stream ends");
        assert!(
            !matches!(answer, Ok(Some((wire::Kind::Data, _)))),
            "case {number}: {answer:?}"
        );
        let (connection, mut lane, _) = one
            .request_stream(two.local_addr())
            .await
            .expect("a stream");
        let _ = lane.finish();
        let mut lane = connection.open_uni().await.expect("a lane");
        for bytes in case {
            lane.write_all(bytes).await.expect("written");
        }
        let _ = lane.finish();
    }
    call(&one, two.local_addr(), "echo", Bytes::new())
        .await
        .expect("the honest are served");
}

#[tokio::test]
async fn unread_requests_of_one_node_are_bounded_in_memory() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1), cluster.node(2));
    let (arrived, mut arrivals) = mpsc::unbounded_channel();
    two.register(
        "hold",
        handler(move |_, request: Bytes, reply: Reply| {
            let (release, wait) = oneshot::channel::<()>();
            arrived.send(release).expect("the test listens");
            async move {
                let _ = wait.await;
                reply.answer(request.slice(..1)).await;
            }
        }),
    );
    let request = Bytes::from(vec![1u8; MAX_FRAME_BYTES]);
    let fit = limits::MAX_REQUEST_BYTES_PER_NODE / MAX_FRAME_BYTES;
    let calls: Vec<_> = (0..fit + 2)
        .map(|_| {
            let (one, to, request) = (one.clone(), two.local_addr(), request.clone());
            tokio::spawn(async move { call(&one, to, "hold", request).await })
        })
        .collect();
    let mut held = Vec::new();
    for _ in 0..fit {
        held.push(
            tokio::time::timeout(LONG, arrivals.recv())
                .await
                .expect("a request")
                .expect("a request"),
        );
    }
    assert!(
        tokio::time::timeout(Duration::from_millis(300), arrivals.recv())
            .await
            .is_err(),
        "one more than fits was taken in"
    );
    drop(held);
    let mut rest = Vec::new();
    for _ in 0..2 {
        rest.push(
            tokio::time::timeout(LONG, arrivals.recv())
                .await
                .expect("a request")
                .expect("a request"),
        );
    }
    drop(rest);
    for call in calls {
        assert_eq!(
            call.await.expect("the call").expect("an answer"),
            request.slice(..1)
        );
    }
}

#[tokio::test]
async fn a_shutdown_lets_a_running_request_end_and_takes_no_new_one() {
    let cluster = Cluster::new();
    let (one, two) = (cluster.node(1), cluster.node(2));
    let (started, mut starts) = mpsc::unbounded_channel();
    two.register(
        "slow",
        handler(move |_, _, mut reply: Reply| {
            started.send(()).expect("the test listens");
            async move {
                reply.closed().await;
                reply.answer(Bytes::from_static(b"last words")).await;
            }
        }),
    );
    let to = two.local_addr();
    let running = tokio::spawn({
        let one = one.clone();
        async move { call(&one, to, "slow", Bytes::new()).await }
    });
    soon(starts.recv()).await.expect("started");
    soon(two.shutdown()).await;
    let answer = soon(running).await.expect("the call");
    assert_eq!(answer.expect("an answer"), "last words");
    assert!(one.call(to, "slow", Bytes::new(), LONG).await.is_err());
    assert!(matches!(
        two.call(one.local_addr(), "slow", Bytes::new(), LONG).await,
        Err(Error::Closed)
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_unregisters_another_at_its_end_does_not_block_the_shutdown() {
    struct Last(Transport);
    impl Drop for Last {
        fn drop(&mut self) {
            self.0.unregister("other");
        }
    }
    let node = Cluster::new().node(1);
    let last = Last(node.clone());
    node.register(
        "holder",
        handler(move |_, _, reply: Reply| {
            let _ = &last;
            async move { reply.answer(Bytes::new()).await }
        }),
    );
    // On a task of its own: a lock taken twice would block the thread, which no timeout ends.
    soon(tokio::spawn(async move { node.shutdown().await }))
        .await
        .expect("the shutdown");
}
