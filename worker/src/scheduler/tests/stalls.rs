//! Work is left, so a step comes: what once stood still for ever.
//!
//! One place, four blocks, no step larger than a chunk: a tenant may be at most 2 · 64 = 128 in cost ahead of one who waits.

use super::*;

const PLACE: Limits = Limits {
    max_sequences: 1,
    max_waiting: 100,
    step_rows: 32,
    mixed_rows: 32,
    context_tokens: 64,
    blocks: 4,
    tenant_running: usize::MAX,
    tenant_waiting: usize::MAX,
};

/// Takes a step; whoever samples ends once he is as long as `goal` says.
fn step(s: &mut Scheduler, goal: impl Fn(SequenceId) -> usize) -> Planned {
    let step = s.plan(0).expect("work is left and no step comes");
    s.done();
    for id in ids(&step) {
        if s.accept(id, &[7]).unwrap() >= goal(id) {
            s.remove(id);
        }
    }
    step
}

/// A prompt that shares no block with another.
fn own(id: u64, len: usize) -> Vec<u32> {
    (0..len as u32).map(|t| id as u32 * 1000 + t).collect()
}

fn ends(s: &mut Scheduler, goal: impl Fn(SequenceId) -> usize) {
    for _ in 0..1000 {
        if s.running() + s.waiting() == 0 {
            return;
        }
        step(s, &goal);
    }
    panic!("no end");
}

#[test]
fn whoever_is_as_far_ahead_as_may_be_leaves_his_place_to_one_who_waits() {
    let mut s = Scheduler::new(PLACE);
    let goal = |_| 20;
    for id in 1..=20 {
        submit(&mut s, id, tenant(1), own(id, 10)).unwrap();
    }
    // Seven requests of 30 each in cost, and in the middle of the next.
    while s.waiting() > 12 || s.length(SequenceId(8)) != Some(15) {
        step(&mut s, goal);
    }
    // The prompt takes more than his half of the blocks, so being within his share does not help him.
    submit(&mut s, 30, tenant(2), own(30, 40)).unwrap();
    let next = step(&mut s, |id| if id.0 == 30 { 45 } else { 20 });
    assert_eq!(next.owners, [SequenceId(30)]);
    ends(&mut s, |id| if id.0 == 30 { 45 } else { 20 });
}

#[test]
fn whoever_cannot_pay_the_last_row_of_his_prompt_leaves_his_place_too() {
    let mut s = Scheduler::new(PLACE);
    submit(&mut s, 1, tenant(1), own(1, 60)).unwrap();
    submit(&mut s, 2, tenant(1), own(2, 63)).unwrap();
    let goal = |id: SequenceId| [62, 64, 45][id.0 as usize - 1];
    // 60 rows and two tokens, then 32 rows: 96 in cost.
    for _ in 0..4 {
        step(&mut s, goal);
    }
    assert_eq!((s.running(), s.waiting()), (1, 0));
    // He has 32 left to go ahead, and 31 rows to compute, of which the last costs 3 with its token.
    submit(&mut s, 3, tenant(2), own(3, 40)).unwrap();
    let rows = step(&mut s, goal).batch.tokens.len();
    assert_eq!(rows, 30, "all but the last");
    let next = step(&mut s, goal);
    assert_eq!(next.owners, [SequenceId(3)]);
    ends(&mut s, goal);
}

#[test]
fn a_tenants_background_work_gets_the_place_that_his_own_question_held() {
    let mut s = Scheduler::new(Limits {
        max_sequences: 4,
        tenant_running: 1,
        ..PLACE
    });
    let classes = [Class::Interactive, Class::Background];
    for (id, class) in (1..).zip(classes) {
        let request = Request {
            tenant: tenant(1),
            class,
            tokens: own(id, 4),
            deadline_ms: None,
        };
        s.submit(SequenceId(id), request, 0).unwrap();
    }
    let first = step(&mut s, |_| 5);
    assert_eq!(first.owners, [SequenceId(1)]);
    let second = step(&mut s, |_| 5);
    assert_eq!(second.owners, [SequenceId(2)]);
}
