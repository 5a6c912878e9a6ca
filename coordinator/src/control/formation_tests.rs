//! Stories of workers that come and go, played against the pure decision: no runtime, no clock, no network.

use std::collections::BTreeSet;

use super::*;
use crate::control::health::Attention;
use crate::control::{
    GroupHealth, HEARTBEAT_INTERVAL_MS, HEARTBEAT_TTL_MS, Heartbeat, ModelKind, ShardReport,
};
use crate::ids::{DeviceKind, Epoch};

/// A cluster in a glass: processes that beat, and the leader that decides every [`STEP_MS`].
struct World {
    now_ms: u64,
    state: ControlState,
    liveness: Liveness,
    formation: Formation,
    /// Incarnation of each running process.
    running: BTreeMap<u64, u64>,
    /// Silent ones whose port answers.
    there: BTreeSet<u64>,
    health: BTreeMap<u64, GroupHealth>,
    /// Commands that the leader proposed, as they were accepted.
    log: Vec<Command>,
}

const STEP_MS: u64 = 50;

impl World {
    fn new(ranks: u32) -> World {
        let mut world = World {
            now_ms: 0,
            state: ControlState::default(),
            liveness: Liveness::new(0),
            formation: Formation::default(),
            running: BTreeMap::new(),
            there: BTreeSet::new(),
            health: BTreeMap::new(),
            log: Vec::new(),
        };
        let deployment = Deployment {
            model: "m".into(),
            kind: ModelKind::Generate,
            path: "/m.gguf".into(),
            ranks,
            context_tokens: 0,
        };
        world.accept(Command::SetDeployment(deployment));
        world
    }

    fn accept(&mut self, command: Command) {
        let result = self.state.apply(command.clone());
        assert!(result.is_ok(), "{command:?}: {result:?}");
    }

    /// Starts a process, or another one after it died.
    fn start(&mut self, id: u64, role: Role) {
        let incarnation = self
            .state
            .nodes
            .get(&NodeId(id))
            .map_or(1, |n| n.incarnation + 1);
        let device = Device {
            kind: DeviceKind::Cpu,
            name: "cpu".into(),
            memory_bytes: 1,
            read_bytes_per_s: 1,
            threads: 1,
        };
        let node = Node {
            id: NodeId(id),
            name: format!("worker{id}"),
            addr: ([127, 0, 0, 1], 1000 + id as u16).into(),
            data_addr: Some(([127, 0, 0, 1], 2000 + id as u16).into()),
            roles: BTreeSet::from([role]),
            devices: vec![device],
            up: true,
            version: String::new(),
            incarnation,
        };
        self.accept(Command::RegisterNode(node));
        self.running.insert(id, incarnation);
        self.health.remove(&id);
        self.beat(id);
    }

    fn worker(&mut self, id: u64) {
        self.start(id, Role::Worker);
    }

    fn kill(&mut self, id: u64) {
        self.running.remove(&id);
        self.health.remove(&id);
    }

    /// The process gets no processor: it says nothing, and the kernel takes connections for it.
    fn starve(&mut self, id: u64) {
        self.running.remove(&id);
        self.there.insert(id);
    }

    fn feed(&mut self, id: u64) {
        self.there.remove(&id);
        self.running
            .insert(id, self.state.nodes[&NodeId(id)].incarnation);
    }

    fn beat(&mut self, id: u64) {
        let Some(incarnation) = self.running.get(&id).copied() else {
            return;
        };
        let groups = self.health.get(&id).cloned().into_iter().collect();
        self.liveness.heard(
            self.now_ms,
            Heartbeat {
                node: NodeId(id),
                incarnation,
                revision: 0,
                groups,
            },
        );
    }

    fn report(&mut self, id: u64, active_requests: u32, broken: Option<&str>) {
        let group = self.group().clone();
        let rank = group.rank_on(NodeId(id)).expect("hosts a rank").rank;
        let broken = broken.map(str::to_owned);
        self.health.insert(
            id,
            GroupHealth {
                group: group.id,
                epoch: group.epoch,
                rank,
                active_requests,
                broken,
            },
        );
        self.beat(id);
    }

    fn decide(&mut self) {
        self.liveness.retain(&self.state);
        let commands = self
            .formation
            .decide(self.now_ms, &self.state, &self.liveness, &mut || [1; 32]);
        for command in commands {
            self.accept(command.clone());
            self.log.push(command);
        }
    }

    /// Lets time pass, with beats of all that run.
    fn pass(&mut self, ms: u64) {
        let end = self.now_ms + ms;
        while self.now_ms < end {
            self.now_ms += STEP_MS;
            if self.now_ms.is_multiple_of(HEARTBEAT_INTERVAL_MS) {
                for id in self.running.keys().copied().collect::<Vec<_>>() {
                    self.beat(id);
                }
                for &id in &self.there {
                    self.liveness.vouched(self.now_ms, NodeId(id));
                }
            }
            self.decide();
        }
    }

    fn group(&self) -> &Group {
        self.state.group_of("m").expect("a group")
    }

    fn hosts(&self) -> Vec<u64> {
        self.state
            .group_of("m")
            .map(|g| g.ranks.iter().map(|r| r.node.0).collect())
            .unwrap_or_default()
    }

    fn epoch(&self) -> u64 {
        self.state.group_of("m").map_or(0, |g| g.epoch.0)
    }

    /// All ranks of the present epoch load.
    fn load(&mut self) {
        let group = self.group().clone();
        for rank in &group.ranks {
            let report = ShardReport::default();
            self.accept(Command::RankReady {
                group: group.id,
                epoch: group.epoch,
                rank: rank.rank,
                report,
            });
            self.health.insert(
                rank.node.0,
                GroupHealth {
                    group: group.id,
                    epoch: group.epoch,
                    rank: rank.rank,
                    active_requests: 0,
                    broken: None,
                },
            );
        }
    }

    fn fail(&mut self, reason: &str) {
        let (group, epoch) = (self.group().id, self.group().epoch);
        self.accept(Command::RankFailed {
            group,
            epoch,
            rank: Rank(0),
            reason: reason.into(),
        });
    }

    /// A ready group on workers 1 and 2.
    fn ready_on_two() -> World {
        let mut world = World::new(2);
        world.worker(1);
        world.worker(2);
        world.pass(100);
        assert_eq!(world.hosts(), [1, 2]);
        world.load();
        world.pass(1_000);
        world
    }
}

#[test]
fn a_group_forms_at_once_when_all_wished_workers_are_there() {
    let mut world = World::new(2);
    world.worker(1);
    world.pass(500);
    assert_eq!(
        world.hosts(),
        [] as [u64; 0],
        "the second worker may still come"
    );
    world.worker(2);
    world.pass(STEP_MS);
    assert_eq!((world.hosts(), world.epoch()), (vec![1, 2], 1));
    world.pass(5_000);
    assert_eq!(world.epoch(), 1, "a forming group is left alone");
}

#[test]
fn a_group_forms_with_fewer_when_no_more_come() {
    let mut world = World::new(3);
    world.worker(1);
    world.worker(2);
    world.pass(WORKERS_PATIENCE_MS + HEARTBEAT_INTERVAL_MS);
    assert_eq!(world.hosts(), [1, 2]);
}

#[test]
fn a_silent_rank_is_replaced_by_the_survivors_within_its_time_to_live() {
    let mut world = World::ready_on_two();
    world.kill(1);
    world.pass(1_000);
    assert_eq!(world.epoch(), 1);
    world.pass(600);
    assert_eq!(
        (world.hosts(), world.epoch()),
        (vec![2], 2),
        "the survivor leads now"
    );
    assert!(!world.state.nodes[&NodeId(1)].up);
}

#[test]
fn a_break_reported_by_a_survivor_reforms_long_before_the_time_to_live() {
    let mut world = World::ready_on_two();
    world.kill(2);
    world.report(1, 1, Some("connection reset by rank 1"));
    world.pass(500);
    assert_eq!(world.epoch(), 1, "which rank died is not known yet");
    world.pass(200);
    assert_eq!((world.hosts(), world.epoch()), (vec![1], 2));
}

#[test]
fn a_rank_that_restarts_at_once_is_taken_back_in_the_same_forming() {
    let mut world = World::ready_on_two();
    world.kill(2);
    world.report(1, 1, Some("connection reset by rank 1"));
    world.pass(300);
    world.worker(2);
    world.pass(STEP_MS);
    assert_eq!((world.hosts(), world.epoch()), (vec![1, 2], 2));
    assert_eq!(world.group().ranks[1].incarnation, 2);
}

#[test]
fn a_restart_that_nobody_reported_is_noticed_by_its_registration() {
    let mut world = World::ready_on_two();
    world.worker(1);
    world.pass(STEP_MS);
    assert_eq!((world.hosts(), world.epoch()), (vec![1, 2], 2));
}

#[test]
fn a_group_grows_back_when_it_is_idle_and_not_before() {
    let mut world = World::ready_on_two();
    world.kill(2);
    world.pass(2_000);
    assert_eq!(world.hosts(), [1]);
    world.load();
    world.report(1, 3, None);
    world.worker(2);
    world.pass(5_000);
    assert_eq!(world.hosts(), [1], "requests are running");
    world.report(1, 0, None);
    world.pass(IDLE_BEFORE_GROWING_MS + 2 * STEP_MS);
    assert_eq!((world.hosts(), world.epoch()), (vec![1, 2], 3));
    world.load();
    world.pass(20_000);
    assert_eq!(world.epoch(), 3, "and stays");
}

#[test]
fn a_failure_is_repeated_ever_more_slowly_and_at_once_with_other_workers() {
    let mut world = World::new(2);
    world.worker(1);
    world.pass(WORKERS_PATIENCE_MS + HEARTBEAT_INTERVAL_MS);
    for _ in 0..60 {
        world.fail("the model needs 3 GiB more");
        world.pass(1_000);
    }
    let tries = world.epoch();
    assert!((4..=8).contains(&tries), "{tries} formings in a minute");
    world.fail("the model needs 3 GiB more");
    world.worker(2);
    world.pass(STEP_MS);
    assert_eq!((world.hosts(), world.epoch()), (vec![1, 2], tries + 1));
}

#[test]
fn a_broken_group_whose_ranks_all_live_is_formed_anew_but_not_in_a_frenzy() {
    let mut world = World::ready_on_two();
    world.pass(10_000);
    let mut formed = Vec::new();
    for _ in 0..200 {
        if formed.last() != Some(&world.epoch()) {
            formed.push(world.epoch());
            world.load();
            world.report(1, 1, Some("a frame of another epoch"));
            world.report(2, 0, None);
        }
        world.pass(STEP_MS);
    }
    assert_eq!(world.hosts(), [1, 2]);
    assert!((3..=6).contains(&formed.len()), "{formed:?} in ten seconds");
}

#[test]
fn a_group_with_nobody_left_says_so_and_waits() {
    let mut world = World::ready_on_two();
    world.kill(1);
    world.kill(2);
    world.pass(3_000);
    let GroupState::Failed { reason } = &world.group().state else {
        panic!("{:?}", world.group())
    };
    assert!(reason.contains("no worker"), "{reason}");
    world.worker(2);
    world.worker(1);
    world.pass(STEP_MS);
    assert_eq!(world.hosts(), [1, 2]);
}

#[test]
fn a_new_leader_judges_nobody_before_their_time() {
    let mut world = World::ready_on_two();
    world.liveness = Liveness::new(world.now_ms);
    world.formation = Formation::default();
    let commands = world
        .formation
        .decide(world.now_ms, &world.state, &world.liveness, &mut || [1; 32]);
    assert_eq!(commands, []);
    world.pass(5_000);
    assert_eq!(world.epoch(), 1);
}

#[test]
fn a_restarted_cluster_forms_once_for_both_workers() {
    let mut world = World::ready_on_two();
    world.kill(1);
    world.kill(2);
    world.now_ms += 60_000;
    world.liveness = Liveness::new(world.now_ms);
    world.formation = Formation::default();
    world.pass(100);
    world.worker(2);
    world.pass(400);
    assert_eq!(world.epoch(), 1, "worker 1 may be on its way");
    world.worker(1);
    world.pass(STEP_MS);
    assert_eq!((world.hosts(), world.epoch()), (vec![1, 2], 2));
}

#[test]
fn a_changed_deployment_forms_again() {
    let mut world = World::ready_on_two();
    let mut deployment = world.state.deployments["m"].clone();
    deployment.ranks = 1;
    world.accept(Command::SetDeployment(deployment.clone()));
    world.pass(STEP_MS);
    assert_eq!((world.hosts(), world.epoch()), (vec![1], 2));
    deployment.path = "/other.gguf".into();
    world.accept(Command::SetDeployment(deployment));
    world.pass(STEP_MS);
    assert_eq!(
        (world.group().path.as_str(), world.epoch()),
        ("/other.gguf", 3)
    );
}

#[test]
fn a_second_model_goes_where_fewer_ranks_are() {
    let mut world = World::new(1);
    world.worker(1);
    world.worker(2);
    world.pass(STEP_MS);
    assert_eq!(world.hosts(), [1]);
    let second = Deployment {
        model: "e".into(),
        kind: ModelKind::Embed,
        ..world.state.deployments["m"].clone()
    };
    world.accept(Command::SetDeployment(second));
    world.pass(STEP_MS);
    assert_eq!(
        world.state.group_of("e").map(|g| g.ranks[0].node),
        Some(NodeId(2))
    );
}

#[test]
fn the_store_gets_three_members_or_after_a_while_those_that_there_are() {
    let mut world = World::new(1);
    for id in 1..=2 {
        world.start(id, Role::Store);
    }
    world.pass(5_000);
    assert_eq!(world.state.store_groups, []);
    world.start(3, Role::Store);
    world.pass(STEP_MS);
    assert_eq!(
        world.state.store_groups[0].members,
        [NodeId(1), NodeId(2), NodeId(3)]
    );

    let mut alone = World::new(1);
    alone.start(1, Role::Store);
    alone.pass(STEP_MS);
    assert!(!alone.formation.waits_for_stores(alone.now_ms));
    alone.pass(STORES_PATIENCE_MS / 2);
    assert_eq!(alone.state.store_groups, []);
    assert!(alone.formation.waits_for_stores(alone.now_ms));
    alone.pass(STORES_PATIENCE_MS / 2 + 2 * HEARTBEAT_INTERVAL_MS);
    assert_eq!(alone.state.store_groups[0].members, [NodeId(1)]);
}

#[test]
fn whatever_happens_epochs_grow_and_no_worker_holds_two_ranks() {
    use rand::{Rng, SeedableRng};
    for seed in 0..200 {
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let mut world = World::new(random.random_range(1..=4));
        let mut last = Epoch(0);
        for _ in 0..60 {
            let id = random.random_range(1..=4);
            match random.random_range(0..6) {
                0 => world.kill(id),
                1 | 2 => world.worker(id),
                3 if world.state.group_of("m").is_some() => world.load(),
                4 if world
                    .state
                    .group_of("m")
                    .is_some_and(|g| g.rank_on(NodeId(id)).is_some()) =>
                {
                    world.report(id, 0, Some("broken"));
                }
                _ => {}
            }
            world.pass(random.random_range(1..20) * STEP_MS);
            if let Some(group) = world.state.group_of("m") {
                assert!(group.epoch >= last, "seed {seed}");
                last = group.epoch;
                let hosts: BTreeSet<_> = group.ranks.iter().map(|r| r.node).collect();
                assert_eq!(hosts.len(), group.ranks.len(), "seed {seed}");
                assert!(
                    group.ranks.len() <= world.state.deployments["m"].ranks as usize,
                    "seed {seed}"
                );
            }
        }
        // Once things calm down, every worker that runs and is wished for serves.
        for id in 1..=4 {
            world.health.remove(&id);
        }
        for _ in 0..40 {
            if !world.running.is_empty() && world.state.group_of("m").is_some() {
                world.load();
            }
            world.pass(2_000);
        }
        let wished = (world.state.deployments["m"].ranks as usize).min(world.running.len());
        assert_eq!(
            world.hosts().len().min(wished),
            wished,
            "seed {seed}: {:?}",
            world.state.group_of("m")
        );
        assert!(
            world
                .hosts()
                .iter()
                .all(|h| wished == 0 || world.running.contains_key(h)),
            "seed {seed}"
        );
    }
}

#[test]
fn a_starved_rank_keeps_its_group_as_long_as_it_does_not_hang() {
    let mut world = World::ready_on_two();
    let epoch = world.epoch();
    let up = |world: &World| world.state.nodes[&NodeId(2)].up;
    world.starve(2);
    world.pass(2 * HEARTBEAT_TTL_MS);
    world.feed(2);
    world.pass(1_000);
    assert_eq!((world.epoch(), up(&world)), (epoch, true));
    world.starve(2);
    world.pass(10_000);
    assert!(!up(&world), "it hangs");
    assert_eq!(world.hosts(), [1]);
}

#[test]
fn a_rank_whose_end_a_peer_has_seen_is_not_waited_for_because_its_successor_answers() {
    let mut world = World::ready_on_two();
    world.starve(2);
    world.report(1, 1, Some("rank 1 closed its connection"));
    world.pass(HEARTBEAT_TTL_MS - HEARTBEAT_INTERVAL_MS);
    assert_eq!(world.hosts(), [1]);
}

#[test]
fn a_judge_who_did_not_look_judges_nobody() {
    let mut attention = Attention::default();
    let mut liveness = Liveness::new(0);
    let heartbeat = Heartbeat {
        node: NodeId(1),
        incarnation: 1,
        revision: 0,
        groups: Vec::new(),
    };
    for clock_ms in (0..=600).step_by(60) {
        attention.look(clock_ms);
    }
    assert_eq!(attention.now_ms(610), 610);
    liveness.heard(attention.now_ms(610), heartbeat);
    // He slept for a minute; what was sent meanwhile he reads only now.
    attention.look(60_610);
    let now_ms = attention.now_ms(60_620);
    let presence = liveness.presence(now_ms, NodeId(1), 1);
    assert_eq!(presence, Presence::Live);
    // From then on silence counts.
    for clock_ms in (60_620..=62_200).step_by(60) {
        attention.look(clock_ms);
    }
    let presence = liveness.presence(attention.now_ms(62_200), NodeId(1), 1);
    assert_eq!(presence, Presence::Down);
}
