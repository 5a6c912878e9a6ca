//! Who is served, who waits, who gives way, who is refused.

use super::*;

/// A prompt that shares no block with another.
fn own(id: u64, len: usize) -> Vec<u32> {
    (0..len as u32).map(|t| id as u32 * 1000 + t).collect()
}

fn request(tenant_number: u8, class: Class, tokens: Vec<u32>) -> Request {
    let tenant = tenant(tenant_number);
    let deadline_ms = None;
    Request {
        tenant,
        class,
        tokens,
        deadline_ms,
    }
}

/// Takes a step; each sample gives one token.
fn step(s: &mut Scheduler, now_ms: u64) -> Planned {
    let step = s.plan(now_ms).unwrap();
    s.done();
    for id in ids(&step) {
        s.accept(id, &[7]).unwrap();
    }
    step
}

fn ends(s: &mut Scheduler, step: &Planned, goal: usize) -> usize {
    let over = ids(step)
        .into_iter()
        .filter(|&id| s.length(id).unwrap() >= goal);
    let over: Vec<SequenceId> = over.collect();
    over.iter().filter(|&&id| s.remove(id)).count()
}

#[test]
fn a_newcomer_gets_the_place_of_the_flooders_youngest_at_once() {
    let mut s = Scheduler::new(Limits {
        blocks: 40,
        max_waiting: 100,
        ..limits()
    });
    for id in 1..=20 {
        submit(&mut s, id, tenant(1), own(id, 20)).unwrap();
    }
    for _ in 0..8 {
        step(&mut s, 0);
    }
    assert_eq!((s.running(), s.waiting()), (4, 16));
    submit(&mut s, 30, tenant(2), own(30, 20)).unwrap();
    let first = step(&mut s, 0);
    assert!(
        ids(&first).contains(&SequenceId(30)),
        "its whole prompt is in the next step"
    );
    assert_eq!(s.preemptions(), 1);
    assert!(
        !first.owners.contains(&SequenceId(4)),
        "the youngest gave way"
    );
    // Up to its share, and not beyond: its third waits for the end of another.
    for id in 31..=32 {
        submit(&mut s, id, tenant(2), own(id, 20)).unwrap();
    }
    for _ in 0..4 {
        step(&mut s, 0);
    }
    assert_eq!((s.preemptions(), s.running()), (2, 4));
    let running = |s: &Scheduler, from: u64| s.running.iter().filter(|id| id.0 >= from).count();
    assert_eq!(running(&s, 30), 2);
}

#[test]
fn who_gave_way_goes_on_where_he_was() {
    let mut s = Scheduler::new(Limits {
        blocks: 40,
        max_sequences: 2,
        max_waiting: 100,
        ..limits()
    });
    submit(&mut s, 1, tenant(1), own(1, 40)).unwrap();
    submit(&mut s, 2, tenant(1), own(2, 40)).unwrap();
    for _ in 0..12 {
        step(&mut s, 0);
    }
    submit(&mut s, 3, tenant(2), own(3, 20)).unwrap();
    step(&mut s, 0);
    assert_eq!(
        (s.preemptions(), s.running.contains(&SequenceId(2))),
        (1, false)
    );
    let length = s.length(SequenceId(2)).unwrap();
    s.remove(SequenceId(3));
    let back = step(&mut s, 0);
    let at = back
        .owners
        .iter()
        .position(|&id| id == SequenceId(2))
        .unwrap();
    let context = (length - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
    assert_eq!(
        back.batch.spans[at].context, context,
        "all full blocks were found"
    );
}

#[test]
fn what_somebody_got_while_nobody_else_asked_is_not_held_against_him() {
    let mut s = Scheduler::new(Limits {
        blocks: 64,
        max_waiting: 200,
        ..limits()
    });
    // The flooder was here first, and then the quiet one alone, again and again.
    for (of, id) in [2].into_iter().chain([1; 60]).zip(1..) {
        submit(&mut s, id, tenant(of), own(id, 30)).unwrap();
        while s.running() + s.waiting() > 0 {
            let planned = step(&mut s, 0);
            ends(&mut s, &planned, 32);
        }
    }
    for id in 100..180 {
        submit(&mut s, id, tenant(2), own(id, 30)).unwrap();
    }
    step(&mut s, 0);
    step(&mut s, 0);
    submit(&mut s, 200, tenant(1), own(200, 20)).unwrap();
    let first = step(&mut s, 0);
    assert!(first.owners.contains(&SequenceId(200)));
}

#[test]
fn interactive_requests_go_first_and_background_does_not_starve() {
    let mut s = Scheduler::new(Limits {
        blocks: 64,
        max_waiting: 100,
        ..limits()
    });
    let mut id = 0;
    let mut ask = |s: &mut Scheduler, of: u8, class: Class| {
        id += 1;
        s.submit(SequenceId(id), request(of, class, own(id, 20)), 0)
            .unwrap();
        SequenceId(id)
    };
    for _ in 0..10 {
        ask(&mut s, 1, Class::Background);
    }
    for _ in 0..4 {
        step(&mut s, 0);
    }
    let urgent = ask(&mut s, 1, Class::Interactive);
    assert!(
        ids(&step(&mut s, 0)).contains(&urgent),
        "also before the same tenant's background"
    );
    let mut background = 0;
    for _ in 0..1500 {
        while s.tenants.flows[0].waiting.len() < 4 {
            ask(&mut s, 1, Class::Interactive);
        }
        while s.tenants.flows[1].waiting.len() < 4 {
            ask(&mut s, 1, Class::Background);
        }
        let planned = step(&mut s, 0);
        let of_background = |id: &&SequenceId| s.sequences[id].flow == 1;
        background += planned.owners.iter().filter(of_background).count();
        ends(&mut s, &planned, 30);
    }
    let counters = [0, 1].map(|flow| s.tenants.fair.counter(flow));
    assert!(background > 20, "{background} rows in 1500 steps");
    let apart = (counters[0] - counters[1]).unsigned_abs();
    let bound = bound(s.capacity_tokens(), 64 * BLOCK_TOKENS) * 720_720;
    assert!(apart <= bound, "{apart} of {bound}");
}

#[test]
fn background_that_was_idle_for_long_does_not_overtake() {
    let mut s = Scheduler::new(Limits {
        blocks: 64,
        max_waiting: 100,
        ..limits()
    });
    let mut id = 0;
    let mut ask = |s: &mut Scheduler, of: u8, class: Class| {
        id += 1;
        let request = request(of, class, own(id, 20));
        s.submit(SequenceId(id), request, 0).unwrap();
    };
    let mut rows = [0, 0];
    for at in 0..600 {
        while s.tenants.flows.first().is_none_or(|f| f.waiting.len() < 4) {
            ask(&mut s, 1, Class::Interactive);
        }
        if at == 500 {
            (0..8).for_each(|_| ask(&mut s, 2, Class::Background));
        }
        let planned = step(&mut s, 0);
        for (span, id) in planned.batch.spans.iter().zip(&planned.owners) {
            let background = s.sequences[id].flow % 2;
            rows[background] += if at < 500 { 0 } else { span.rows };
        }
        ends(&mut s, &planned, 30);
    }
    assert!(rows[1] > 0 && rows[1] * 10 < rows[0], "{rows:?}");
}

#[test]
fn a_tenant_runs_and_waits_no_more_than_he_may() {
    let mut s = Scheduler::new(Limits {
        tenant_running: 2,
        tenant_waiting: 3,
        max_waiting: 100,
        blocks: 40,
        ..limits()
    });
    for id in 1..=3 {
        submit(&mut s, id, tenant(1), own(id, 4)).unwrap();
    }
    assert!(matches!(
        submit(&mut s, 4, tenant(1), own(4, 4)),
        Err(Refused::Full { .. })
    ));
    submit(&mut s, 5, tenant(2), own(5, 4)).unwrap();
    let planned = step(&mut s, 0);
    assert_eq!(ids(&planned), [1, 5, 2].map(SequenceId));
    step(&mut s, 0);
    assert_eq!((s.running(), s.waiting()), (3, 1));
    s.remove(SequenceId(1));
    assert!(ids(&step(&mut s, 0)).contains(&SequenceId(3)));
}

#[test]
fn one_who_fills_the_queue_leaves_places_to_others_who_are_told_when_to_come_back() {
    let mut s = Scheduler::new(Limits {
        max_sequences: 1,
        max_waiting: 16,
        blocks: 40,
        ..limits()
    });
    let refused = |s: &mut Scheduler, of: u8, from: u64| {
        (from..from + 100).find_map(|id| submit(s, id, tenant(of), own(id, 4)).err())
    };
    let soon = refused(&mut s, 1, 1000);
    assert_eq!(s.waiting(), 8, "half of the places");
    assert!(refused(&mut s, 2, 2000).is_some());
    assert_eq!(s.waiting(), 12, "half of the rest");
    // An end every 3 s: the wait that is told follows.
    let mut now_ms = 0;
    for _ in 0..6 {
        now_ms += 3000;
        let planned = step(&mut s, now_ms);
        s.remove(planned.owners[0]);
    }
    let later = refused(&mut s, 1, 3000);
    let seconds = |refused: Option<Refused>| match refused {
        Some(Refused::Full { retry_after_s }) => retry_after_s,
        other => panic!("{other:?}"),
    };
    assert!(
        seconds(soon) < 10 && (10..=60).contains(&seconds(later)),
        "{soon:?} {later:?}"
    );
}

#[test]
fn deadlines_are_named_from_when_they_are_over_until_the_sequence_is_gone() {
    let mut s = Scheduler::new(limits());
    for (id, deadline_ms) in [(1, Some(500)), (2, None), (3, Some(200))] {
        let request = Request {
            deadline_ms,
            ..request(1, Class::Interactive, own(id, 4))
        };
        s.submit(SequenceId(id), request, 0).unwrap();
    }
    assert!(s.expired(199).is_empty());
    assert_eq!(s.expired(200), [SequenceId(3)]);
    step(&mut s, 200);
    assert_eq!(s.expired(500), [3, 1].map(SequenceId));
    s.remove(SequenceId(3));
    s.remove(SequenceId(1));
    assert!(s.expired(u64::MAX).is_empty());
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one_nor_a_long_one_for_ever() {
    let mut s = Scheduler::new(Limits {
        blocks: 64,
        context_tokens: 1000,
        ..limits()
    });
    submit(&mut s, 1, tenant(1), own(1, 400)).unwrap();
    step(&mut s, 0);
    let mut short = 0;
    for id in 2..40 {
        submit(&mut s, id, tenant(1), own(id, 10)).unwrap();
        let planned = step(&mut s, 0);
        short += ends(&mut s, &planned, 11);
        if s.length(SequenceId(1)) != Some(400) {
            assert!(short > id as usize - 6, "{short} short ones of {id}");
            return;
        }
    }
    panic!("the long one starved");
}

#[test]
fn another_request_of_the_tenant_finds_what_was_computed_and_one_of_another_does_not() {
    let mut s = Scheduler::new(Limits {
        blocks: 40,
        ..limits()
    });
    submit(&mut s, 1, tenant(1), own(1, 30)).unwrap();
    let first = step(&mut s, 100);
    assert_eq!(
        first.admitted,
        [Admitted {
            id: SequenceId(1),
            waited_ms: 100,
            cached_tokens: 0
        }]
    );
    submit(&mut s, 2, tenant(1), own(1, 50)).unwrap();
    submit(&mut s, 3, tenant(2), own(1, 50)).unwrap();
    let second = step(&mut s, 250);
    let cached: Vec<(u64, usize)> = second
        .admitted
        .iter()
        .map(|a| (a.id.0, a.cached_tokens))
        .collect();
    assert_eq!(cached, [(3, 0), (2, 16)]);
    let served = s.take_served();
    assert_eq!((served[0].1.cached, served[1].1.cached), (16, 0));
    assert!(s.take_served().is_empty());
}

#[test]
fn a_tenants_forgotten_prompts_are_computed_again_and_his_running_ones_end_as_they_would() {
    let mut s = Scheduler::new(Limits {
        blocks: 40,
        ..limits()
    });
    submit(&mut s, 1, tenant(1), own(1, 50)).unwrap();
    submit(&mut s, 2, tenant(2), own(1, 20)).unwrap();
    (0..4).for_each(|_| drop(step(&mut s, 0)));
    s.remove(SequenceId(2));
    assert!(s.cached_blocks() > 0);
    s.forget(&tenant(1));
    s.forget(&tenant(3));
    s.blocks.check();
    for (id, of, len) in [(3, 1, 60), (4, 2, 60)] {
        submit(&mut s, id, tenant(of), own(1, len)).unwrap();
    }
    let next = step(&mut s, 0);
    let found = next.admitted.iter().map(|a| (a.id.0, a.cached_tokens));
    assert_eq!(found.collect::<BTreeMap<_, _>>(), [(3, 0), (4, 16)].into());
    assert!(ids(&next).contains(&SequenceId(1)), "it goes on");
    s.remove(SequenceId(1));
    s.blocks.check();
}

#[test]
fn what_a_failed_step_did_not_compute_is_not_found() {
    let mut s = Scheduler::new(Limits {
        blocks: 40,
        ..limits()
    });
    submit(&mut s, 1, tenant(1), own(1, 30)).unwrap();
    s.plan(0).unwrap();
    s.remove(SequenceId(1));
    submit(&mut s, 2, tenant(1), own(1, 30)).unwrap();
    assert_eq!(s.plan(0).unwrap().admitted[0].cached_tokens, 0);
    assert_eq!(s.cached_blocks(), 0);
}

#[test]
fn ten_thousand_longest_prompts_of_one_tenant_keep_nobody_out() {
    let mut s = Scheduler::new(Limits {
        max_waiting: 20_000,
        blocks: 40,
        ..limits()
    });
    for id in 1..=10_000 {
        submit(&mut s, id, tenant(1), own(id % 4000, 255)).unwrap();
    }
    assert!(submit(&mut s, 10_001, tenant(1), own(1, 255)).is_err());
    for _ in 0..50 {
        step(&mut s, 0);
    }
    submit(&mut s, 20_000, tenant(2), own(4001, 20)).unwrap();
    assert!(ids(&step(&mut s, 0)).contains(&SequenceId(20_000)));
    // All cancelled: nothing is left.
    let removed = (1..=20_000).filter(|&id| s.remove(SequenceId(id))).count();
    assert_eq!((removed, s.used_blocks(), s.plan(0)), (10_001, 0, None));
    s.blocks.check();
}

#[test]
#[ignore = "prints times, which say nothing beside other work"]
fn how_long_a_plan_takes_with_few_and_many_waiting() {
    for waiting in [40, 400, 4000, 40_000] {
        let mut s = Scheduler::new(Limits {
            max_waiting: usize::MAX,
            max_sequences: 32,
            blocks: 4096,
            ..Limits::default()
        });
        let mut next = 0..;
        let mut ask = |s: &mut Scheduler| {
            let id: u64 = next.next().unwrap();
            let class = [Class::Interactive, Class::Background][usize::from(id.is_multiple_of(3))];
            let request = request((id % 50) as u8, class, own(id, 100));
            s.submit(SequenceId(id), request, 0).unwrap();
        };
        (0..waiting).for_each(|_| ask(&mut s));
        const STEPS: u32 = 2000;
        let mut spent = std::time::Duration::ZERO;
        for _ in 0..STEPS {
            let start = std::time::Instant::now();
            let planned = step(&mut s, 0);
            spent += start.elapsed();
            (0..ends(&mut s, &planned, 200)).for_each(|_| ask(&mut s));
        }
        println!("{waiting} waiting: {:?} a step", spent / STEPS);
    }
}
