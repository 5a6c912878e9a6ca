//! What a coordinator answers to other nodes: proposals, reads, watches and heartbeats.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::command::{Command, Rejection};
use super::health::{Attention, Heartbeat, Liveness};
use super::machine::ControlMachine;
use super::state::ControlState;
use super::wire::{
    self, ControlStatus, HeartbeatReply, Proposal, ProposeReply, ReadReply, WatchFrame,
    WatchRequest,
};
use super::{
    OPERATOR, SERVICE_HEARTBEAT, SERVICE_PROPOSE, SERVICE_READ, SERVICE_STATUS, SERVICE_WATCH,
};
use crate::clock;
use crate::ids::{NodeId, Role};
use crate::replication::{self, AddressBook, Replica};
use crate::transport::{ErrorCode, Handler, RemoteError, Reply, Transport};

/// A watcher hears something this often, or takes the coordinator for dead.
const ALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// How often the leader looks at the heartbeats while it waits for something else.
const LOOK_INTERVAL: Duration = Duration::from_millis(60);

/// A reply frame, or why the request makes no sense.
type Answer = BoxFuture<'static, Result<Vec<u8>, String>>;

/// What the services share.
#[derive(Clone)]
pub struct Services {
    pub replica: Replica,
    pub states: watch::Receiver<Arc<ControlState>>,
    pub addresses: Arc<dyn AddressBook>,
    pub beats: Arc<Beats>,
}

/// The leader's memory of heartbeats, and a bell for those that cannot wait.
pub struct Beats {
    start: clock::Instant,
    attention: Mutex<Attention>,
    liveness: Mutex<Liveness>,
    pub urgent: Notify,
}

impl Beats {
    pub fn new() -> Beats {
        Beats {
            start: clock::monotonic(),
            attention: Mutex::default(),
            liveness: Mutex::new(Liveness::new(0)),
            urgent: Notify::new(),
        }
    }

    /// Monotone milliseconds in which this coordinator was attentive.
    pub fn now_ms(&self) -> u64 {
        self.attention().now_ms(self.clock_ms())
    }

    /// The leader looks.
    pub fn look(&self) {
        self.attention().look(self.clock_ms());
    }

    /// Does `work`, and looks meanwhile.
    pub async fn looking(&self, work: impl Future<Output = ()>) {
        let mut work = std::pin::pin!(work);
        while timeout(LOOK_INTERVAL, &mut work).await.is_err() {
            self.look();
        }
        self.look();
    }

    fn attention(&self) -> MutexGuard<'_, Attention> {
        self.attention
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn clock_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Forgets everything, as a new leader must: what it heard as a follower of another term is no evidence.
    pub fn reset(&self) {
        self.with(|liveness| *liveness = Liveness::new(self.now_ms()));
    }

    pub fn with<T>(&self, look: impl FnOnce(&mut Liveness) -> T) -> T {
        look(&mut self.liveness.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn heard(&self, heartbeat: Heartbeat) {
        let broken = heartbeat.groups.iter().any(|g| g.broken.is_some());
        let now_ms = self.now_ms();
        self.with(|liveness| liveness.heard(now_ms, heartbeat));
        if broken {
            self.urgent.notify_one();
        }
    }
}

impl Services {
    /// Offers all control services on `transport`.
    pub fn register(self, transport: &Transport) {
        transport.register(
            SERVICE_PROPOSE,
            self.handler(|s, from, request| Box::pin(s.propose(from, request))),
        );
        transport.register(
            SERVICE_READ,
            self.handler(|s, from, _| Box::pin(s.read(from))),
        );
        transport.register(
            SERVICE_HEARTBEAT,
            self.handler(|s, from, request| Box::pin(s.heartbeat(from, request))),
        );
        transport.register(SERVICE_STATUS, self.handler(|s, _, _| Box::pin(s.status())));
        let services = self.clone();
        let watch = move |from: NodeId, request: Bytes, reply: Reply| -> BoxFuture<'static, ()> {
            Box::pin(services.clone().watch(from, request, reply))
        };
        transport.register(SERVICE_WATCH, Arc::new(watch));
    }

    /// A service with one reply frame a request.
    fn handler(&self, answer: fn(Services, NodeId, Bytes) -> Answer) -> Arc<dyn Handler> {
        let services = self.clone();
        Arc::new(
            move |from: NodeId, request: Bytes, mut reply: Reply| -> BoxFuture<'static, ()> {
                let answer = answer(services.clone(), from, request);
                Box::pin(async move {
                    match answer.await {
                        Ok(bytes) => {
                            if reply.send(bytes.into()).await.is_ok() {
                                reply.finish().await;
                            }
                        }
                        Err(why) => {
                            reply
                                .fail(RemoteError::new(ErrorCode::BadRequest, why))
                                .await
                        }
                    }
                })
            },
        )
    }

    fn leader_addr(&self) -> Option<SocketAddr> {
        self.addresses.addr(self.replica.status().leader?)
    }

    async fn propose(self, from: NodeId, request: Bytes) -> Result<Vec<u8>, String> {
        let proposal: Proposal = wire::decode(&request)?;
        // A denial is final for the caller, so only the leader may speak it: others may not know the caller yet.
        if !self.replica.status().is_leader {
            return wire::encode(&ProposeReply::NotLeader {
                leader: self.leader_addr(),
            });
        }
        let permission = permitted(from, &proposal.command, &self.states.borrow());
        let permission = match permission {
            Ok(()) => Ok(Ok(())),
            Err(_) => self.permitted_now(from, &proposal.command).await,
        };
        let reply = match permission {
            Ok(Ok(())) => self.commit(request).await?,
            Ok(Err(why)) => ProposeReply::Denied { why },
            Err(error) => self.not_proposed(&error),
        };
        wire::encode(&reply)
    }

    /// As [`permitted`], by a state that shows everything that was acknowledged: a new leader's own may lag behind.
    async fn permitted_now(
        &self,
        from: NodeId,
        command: &Command,
    ) -> Result<Result<(), String>, replication::Error> {
        let view = self.replica.read_index().await?;
        let state =
            ControlMachine::read(&view).map_err(|why| replication::Error::Storage { why })?;
        Ok(permitted(from, command, &state))
    }

    async fn commit(&self, proposal: Bytes) -> Result<ProposeReply, String> {
        Ok(match self.replica.propose(proposal.into()).await {
            Ok(bytes) => ProposeReply::Applied(wire::decode(&bytes)?),
            Err(error) => self.not_proposed(&error),
        })
    }

    fn not_proposed(&self, error: &replication::Error) -> ProposeReply {
        match error {
            replication::Error::NotLeader { leader } => ProposeReply::NotLeader {
                leader: leader.and_then(|id| self.addresses.addr(id)),
            },
            error => ProposeReply::Unavailable {
                why: error.to_string(),
            },
        }
    }

    async fn read(self, from: NodeId) -> Result<Vec<u8>, String> {
        let reply = match self.replica.read_index().await {
            Ok(view) => {
                let state = ControlMachine::read(&view)?;
                match known(from, &state) {
                    Ok(()) => ReadReply::State(Box::new(state.seen_by(from))),
                    Err(why) => ReadReply::Denied { why },
                }
            }
            Err(error) => ReadReply::Unavailable {
                why: error.to_string(),
            },
        };
        wire::encode(&reply)
    }

    async fn status(self) -> Result<Vec<u8>, String> {
        let status = self.replica.status();
        wire::encode(&ControlStatus {
            leader: status.leader,
            term: status.term,
            commit: status.commit,
            applied: status.applied,
            voters: status.voters.into_iter().collect(),
            learners: status.learners.into_iter().collect(),
        })
    }

    async fn heartbeat(self, from: NodeId, request: Bytes) -> Result<Vec<u8>, String> {
        let mut heartbeat: Heartbeat = wire::decode(&request)?;
        if heartbeat.node != from {
            return Err(format!(
                "node {from} sent a heartbeat of node {}",
                heartbeat.node
            ));
        }
        let registered = {
            let state = self.states.borrow();
            only_own_ranks(&mut heartbeat, &state);
            state.nodes.get(&from).map(|n| n.incarnation)
        };
        let reply = if !self.replica.status().is_leader {
            HeartbeatReply::NotLeader {
                leader: self.leader_addr(),
            }
        } else if registered != Some(heartbeat.incarnation) {
            HeartbeatReply::Unregistered
        } else {
            self.beats.heard(heartbeat);
            HeartbeatReply::Heard
        };
        wire::encode(&reply)
    }

    /// Streams the state whenever it changes, and a sign of life while this coordinator is part of the cluster.
    async fn watch(mut self, from: NodeId, request: Bytes, mut reply: Reply) {
        let mut revision = match wire::decode::<WatchRequest>(&request) {
            Ok(request) => request.revision,
            Err(why) => {
                return reply
                    .fail(RemoteError::new(ErrorCode::BadRequest, why))
                    .await;
            }
        };
        let mut leadership = self.replica.leadership();
        loop {
            leadership.borrow_and_update();
            let state = self.states.borrow_and_update().clone();
            if let Err(why) = known(from, &state) {
                return reply
                    .fail(RemoteError::new(ErrorCode::Forbidden, why))
                    .await;
            }
            let leader = self.replica.status().leader;
            let frame = if state.revision > revision {
                revision = state.revision;
                Some(WatchFrame::State(Box::new(state.seen_by(from))))
            } else {
                leader.map(|id| WatchFrame::Alive {
                    leader: self.addresses.addr(id),
                })
            };
            if let Some(frame) = frame {
                let Ok(bytes) = wire::encode(&frame) else {
                    return;
                };
                if reply.send(bytes.into()).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                () = reply.closed() => return,
                // Whoever watches wants to send its heartbeats to the new leader at once.
                Ok(()) = leadership.changed() => {}
                changed = timeout(ALIVE_INTERVAL, self.states.changed()) => {
                    if matches!(changed, Ok(Err(_))) {
                        return reply.finish().await;
                    }
                }
            }
        }
    }
}

/// A node speaks only of ranks that it hosts, so that nobody else can have a group formed again.
fn only_own_ranks(heartbeat: &mut Heartbeat, state: &ControlState) {
    let node = heartbeat.node;
    heartbeat.groups.retain(|health| {
        state
            .groups
            .get(&health.group)
            .filter(|group| group.epoch == health.epoch)
            .and_then(|group| group.rank_on(node))
            .is_some_and(|hosted| hosted.rank == health.rank)
    });
}

/// Whether `from` still belongs to the cluster.
fn known(from: NodeId, state: &ControlState) -> Result<(), String> {
    if state.revoked.contains(&from) {
        Err(Rejection::Revoked { node: from }.to_string())
    } else {
        Ok(())
    }
}

/// Whether the certificate of `from` allows `command`. Coordinators and operators may do everything; a gateway may
/// administer tenants, keys and models for those who signed in there; any node may speak for itself.
pub fn permitted(from: NodeId, command: &Command, state: &ControlState) -> Result<(), String> {
    known(from, state)?;
    let has = |role| {
        state
            .nodes
            .get(&from)
            .is_some_and(|n| n.roles.contains(&role))
    };
    if from == OPERATOR || has(Role::Coordinator) {
        return Ok(());
    }
    let own_rank = |group, rank: crate::ids::Rank| {
        let group: Option<&super::Group> = state.groups.get(group);
        // An unknown group or rank is the rules' to reject.
        group
            .and_then(|g| g.ranks.get(rank.0 as usize))
            .is_none_or(|r| r.node == from)
    };
    let allowed = match command {
        Command::RegisterNode(node) => node.id == from && may_register(from, node, state),
        Command::RankReady { group, rank, .. } | Command::RankFailed { group, rank, .. } => {
            own_rank(group, *rank)
        }
        Command::CreateTenant { .. }
        | Command::RemoveTenant { .. }
        | Command::CreateApiKey { .. }
        | Command::RevokeApiKey { .. }
        | Command::SetDeployment(_)
        | Command::RemoveDeployment { .. } => has(Role::Gateway),
        _ => false,
    };
    if allowed {
        Ok(())
    } else {
        Err(format!(
            "node {from} may not change this; use an operator's identity"
        ))
    }
}

/// A node that is known keeps to the roles that it was admitted with. One that is not has a certificate that the
/// cluster's CA made in the first set-up, before any coordinator ran.
fn may_register(from: NodeId, node: &super::Node, state: &ControlState) -> bool {
    state
        .nodes
        .get(&from)
        .is_none_or(|admitted| node.roles.is_subset(&admitted.roles))
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
