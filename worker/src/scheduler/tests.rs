mod fairness;
mod flood;
mod order;
mod random;
mod stalls;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::model::Span;

fn tenant(number: u8) -> TenantId {
    TenantId::new(format!("t{number}")).unwrap()
}

fn limits() -> Limits {
    Limits {
        max_sequences: 4,
        max_waiting: 8,
        step_rows: 32,
        context_tokens: 256,
        blocks: 12,
        ..Limits::default()
    }
}

fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).collect()
}

fn submit(s: &mut Scheduler, id: u64, tenant: TenantId, tokens: Vec<u32>) -> Result<(), Refused> {
    let request = Request {
        tenant,
        class: Class::Interactive,
        tokens,
        deadline_ms: None,
    };
    s.submit(SequenceId(id), request, 0)
}

fn ids(step: &Planned) -> Vec<SequenceId> {
    step.samples.iter().map(|s| s.id).collect()
}

#[test]
fn a_prompt_goes_in_chunks_and_gives_one_sample_at_its_end() {
    let mut s = Scheduler::new(limits());
    submit(&mut s, 1, tenant(1), prompt(70)).unwrap();
    let rows: Vec<(usize, usize)> = std::iter::from_fn(|| s.plan(0))
        .map(|p| (p.batch.tokens.len(), p.samples.len()))
        .collect();
    assert_eq!(rows, [(32, 0), (32, 0), (6, 1)]);
}

#[test]
fn a_newcomer_joins_while_another_decodes() {
    let mut s = Scheduler::new(limits());
    submit(&mut s, 1, tenant(1), prompt(3)).unwrap();
    s.plan(0).unwrap();
    s.accept(SequenceId(1), &[9]);
    submit(&mut s, 2, tenant(1), prompt(40)).unwrap();
    let step = s.plan(0).unwrap();
    assert_eq!(step.batch.tokens.len(), 32);
    assert_eq!(
        step.batch.spans[0],
        Span {
            first_row: 0,
            rows: 1,
            context: 3,
            blocks: vec![0]
        }
    );
    assert_eq!(ids(&step), [SequenceId(1)]);
    s.accept(SequenceId(1), &[9]);
    let step = s.plan(0).unwrap();
    assert_eq!(ids(&step), [SequenceId(1), SequenceId(2)]);
    assert_eq!(step.batch.spans[1].context, 31);
}

#[test]
fn too_long_empty_and_too_many_are_refused() {
    let mut s = Scheduler::new(Limits {
        max_waiting: 1,
        blocks: 4,
        ..limits()
    });
    assert_eq!(
        submit(&mut s, 1, tenant(1), prompt(64)),
        Err(Refused::TooLong {
            tokens: 64,
            context: 64
        })
    );
    assert_eq!(submit(&mut s, 2, tenant(1), vec![]), Err(Refused::Empty));
    submit(&mut s, 3, tenant(1), prompt(63)).unwrap();
    assert_eq!(
        submit(&mut s, 4, tenant(1), prompt(1)),
        Err(Refused::Full { retry_after_s: 1 })
    );
}

#[test]
fn removing_frees_blocks_at_once() {
    let mut s = Scheduler::new(limits());
    submit(&mut s, 1, tenant(1), prompt(100)).unwrap();
    s.plan(0).unwrap();
    assert!(s.used_blocks() >= 7);
    assert!(s.remove(SequenceId(1)));
    assert_eq!(s.used_blocks(), 0);
    assert!(!s.remove(SequenceId(1)));
    assert_eq!(s.plan(0), None);
}

#[test]
fn a_tenant_with_many_requests_does_not_keep_another_out() {
    let mut s = Scheduler::new(Limits {
        max_sequences: 2,
        max_waiting: 16,
        ..limits()
    });
    for id in 1..=5 {
        submit(&mut s, id, tenant(1), prompt(4)).unwrap();
    }
    submit(&mut s, 6, tenant(2), prompt(4)).unwrap();
    let step = s.plan(0).unwrap();
    assert_eq!(ids(&step), [SequenceId(1), SequenceId(6)]);
}

#[test]
fn the_youngest_gives_way_when_blocks_run_out() {
    let mut s = Scheduler::new(Limits {
        blocks: 4,
        max_sequences: 2,
        ..limits()
    });
    submit(&mut s, 1, tenant(1), prompt(16)).unwrap();
    submit(&mut s, 2, tenant(1), prompt(15)).unwrap();
    let mut order = Vec::new();
    for _ in 0..40 {
        let Some(step) = s.plan(0) else { break };
        for id in ids(&step) {
            order.push(id.0);
            if s.accept(id, &[1]).unwrap() >= 40 {
                s.remove(id);
            }
        }
    }
    assert!(s.preemptions() > 0);
    let last_of_first = order.iter().rposition(|&id| id == 1).unwrap();
    assert!(
        order[last_of_first..].contains(&2),
        "the preempted one goes on afterwards"
    );
    assert_eq!(order.iter().filter(|&&id| id == 1).count(), 24);
}

#[test]
fn drafts_take_only_the_rows_and_blocks_that_nobody_needs() {
    let limits = Limits {
        step_rows: 8,
        blocks: 4,
        ..limits()
    };
    let mut s = Scheduler::new(limits);
    submit(&mut s, 1, tenant(1), prompt(4)).unwrap();
    s.plan(0).unwrap();
    s.accept(SequenceId(1), &[20]);
    submit(&mut s, 2, tenant(1), prompt(12)).unwrap();
    s.draft(SequenceId(1), &[21, 22, 23]);
    // Seven rows of the prompt, and none left for a guess.
    let step = s.plan(0).unwrap();
    assert_eq!(
        step.batch.spans.iter().map(|s| s.rows).collect::<Vec<_>>(),
        [1, 7]
    );
    assert!(step.samples[0].drafts.is_empty());
    s.accept(SequenceId(1), &[21]);
    s.draft(SequenceId(1), &[22, 23, 24, 25]);
    let step = s.plan(0).unwrap();
    assert_eq!(step.samples[0].drafts, [22, 23]);
    assert_eq!(step.batch.logits_rows, [0, 1, 2, 7]);
    assert_eq!(step.batch.tokens[..3], [21, 22, 23]);
    // The first draft was right, the second not.
    assert_eq!(s.accept(SequenceId(1), &[22, 30]), Some(8));
    assert_eq!(s.accept(SequenceId(2), &[40]), Some(13));
    s.remove(SequenceId(2));
    let step = s.plan(0).unwrap();
    assert_eq!(
        (step.batch.tokens, step.batch.positions),
        (vec![30], vec![7])
    );
    assert_eq!(step.batch.spans[0].context, 7);
    // A draft that would need a block beyond the last is not taken, and wrong ones give theirs back.
    s.accept(SequenceId(1), &[31]);
    submit(&mut s, 3, tenant(1), prompt(40)).unwrap();
    for _ in 0..6 {
        let step = s.plan(0).unwrap();
        for id in ids(&step) {
            s.accept(id, &[31]);
        }
    }
    s.remove(SequenceId(3));
    assert_eq!((s.length(SequenceId(1)), s.used_blocks()), (Some(15), 1));
    s.draft(SequenceId(1), &[1, 2, 3]);
    assert_eq!(s.plan(0).unwrap().samples[0].drafts, [1, 2, 3]);
    assert_eq!(s.used_blocks(), 2);
    s.accept(SequenceId(1), &[9]);
    assert_eq!(s.used_blocks(), 1);
}

#[derive(Debug, Clone)]
enum Action {
    Submit { len: usize, tenant: u8 },
    Step,
    Cancel(usize),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        2 => (1usize..150, 0u8..3).prop_map(|(len, tenant)| Action::Submit { len, tenant }),
        5 => Just(Action::Step),
        1 => (0usize..8).prop_map(Action::Cancel),
    ];
    proptest::collection::vec(action, 1..120)
}

/// What the test knows of a sequence without asking the scheduler.
struct Expected {
    tokens: Vec<u32>,
    /// Positions in the cache, by what the steps said.
    computed: usize,
    goal: usize,
}

/// Token of a sequence's answer at a position. Tokens name their sequence, so that a span of the wrong one is seen.
fn token(id: SequenceId, position: usize) -> u32 {
    id.0 as u32 * 1000 + position as u32
}

/// Offers each decoding sequence `right` drafts and then `wrong` ones.
fn offer(s: &mut Scheduler, right: usize, wrong: usize) {
    let decoding: Vec<SequenceId> = s.decoding().collect();
    for id in decoding {
        let len = s.length(id).unwrap();
        let guess = |i: usize| if i < right { token(id, len + i) } else { 7 };
        s.draft(id, &(0..right + wrong).map(guess).collect::<Vec<u32>>());
    }
}

/// Checks a step against the model of what every sequence has, and plays the engine: accepts or finishes.
fn take(
    s: &mut Scheduler,
    step: &Planned,
    alive: &mut BTreeMap<SequenceId, Expected>,
    limits: &Limits,
) -> Result<(), TestCaseError> {
    let batch = &step.batch;
    prop_assert!(!batch.tokens.is_empty() && batch.tokens.len() <= limits.step_rows);
    prop_assert!(batch.spans.len() <= limits.max_sequences);
    let rows: usize = batch.spans.iter().map(|s| s.rows).sum();
    prop_assert_eq!(rows, batch.tokens.len());
    let mut blocks = BTreeSet::new();
    let mut slots = BTreeSet::new();
    let mut samples = step.samples.iter();
    for (span, &owner) in batch.spans.iter().zip(&step.owners) {
        for &block in &span.blocks {
            prop_assert!((block as usize) < limits.blocks, "block beyond the cache");
            prop_assert!(blocks.insert(block), "block {block} shared");
        }
        let range = span.first_row..span.first_row + span.rows;
        prop_assert!(span.blocks.len() * BLOCK_TOKENS >= span.context + span.rows);
        for (i, row) in range.clone().enumerate() {
            let position = span.context + i;
            prop_assert_eq!(batch.positions[row] as usize, position);
            let slot = span.blocks[position / BLOCK_TOKENS] * BLOCK_TOKENS as u32
                + (position % BLOCK_TOKENS) as u32;
            prop_assert_eq!(batch.slots[row], slot);
            prop_assert!(slots.insert(slot));
        }
        // The span must continue its owner, from where it was or from its beginning, with drafts at the end only.
        let (id, expected) = (owner, alive.get_mut(&owner).unwrap());
        // After giving way it goes on behind the blocks that it finds again.
        let found_again =
            span.context.is_multiple_of(BLOCK_TOKENS) && span.context < expected.computed;
        prop_assert!(expected.computed == span.context || found_again);
        let known = span.rows.min(expected.tokens.len() - span.context);
        let (tokens, drafts) = batch.tokens[range.clone()].split_at(known);
        prop_assert_eq!(tokens, &expected.tokens[span.context..span.context + known]);
        expected.computed = span.context + known;
        let wanted: Vec<u32> = batch
            .logits_rows
            .iter()
            .copied()
            .filter(|&row| range.contains(&(row as usize)))
            .collect();
        if expected.computed < expected.tokens.len() {
            prop_assert!(wanted.is_empty() && drafts.is_empty());
            continue;
        }
        let sample = samples.next().unwrap();
        prop_assert_eq!((sample.id, sample.drafts.as_slice()), (id, drafts));
        let first = range.start + known - 1;
        prop_assert_eq!(wanted, (first as u32..range.end as u32).collect::<Vec<_>>());
    }
    prop_assert_eq!(samples.next(), None);
    prop_assert!(s.used_blocks() <= limits.blocks);
    prop_assert!(s.running() <= limits.max_sequences);
    s.done();
    s.blocks.check();
    for Sample { id, drafts } in &step.samples {
        let (id, expected) = (*id, alive.get_mut(id).unwrap());
        let mut taken = Vec::new();
        for row in 0..=drafts.len() {
            let next = token(id, expected.tokens.len());
            expected.tokens.push(next);
            taken.push(next);
            if expected.tokens.len() >= expected.goal || drafts.get(row) != Some(&next) {
                break;
            }
        }
        if expected.tokens.len() >= expected.goal {
            prop_assert!(s.remove(id));
            alive.remove(&id);
        } else {
            prop_assert_eq!(s.accept(id, &taken), Some(expected.tokens.len()));
            expected.computed = expected.tokens.len() - 1;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_schedule_keeps_its_limits_and_finishes_everything(
        actions in actions(),
        max_sequences in 1usize..6,
        step_rows in 1usize..48,
        blocks in 2usize..24,
        answer in 1usize..60,
        right in 0usize..6,
        wrong in 0usize..6,
    ) {
        let limits = Limits { max_sequences: max_sequences.min(step_rows), max_waiting: 10, step_rows, context_tokens: 200, blocks, ..Limits::default() };
        let mut s = Scheduler::new(limits);
        let mut alive: BTreeMap<SequenceId, Expected> = BTreeMap::new();
        let mut next = 0;
        for action in actions {
            match action {
                Action::Submit { len, tenant: of } => {
                    next += 1;
                    let id = SequenceId(next);
                    let tokens: Vec<u32> = (0..len).map(|t| token(id, t)).collect();
                    match submit(&mut s, next, tenant(of), tokens.clone()) {
                        Ok(()) => {
                            let goal = (len + answer).min(s.capacity_tokens());
                            alive.insert(id, Expected { tokens, computed: 0, goal });
                        }
                        Err(Refused::TooLong { .. }) => prop_assert!(len >= s.capacity_tokens()),
                        // At the latest when the queue is full; for one tenant when it holds half of what there is.
                        Err(Refused::Full { .. }) => {
                            prop_assert!(s.waiting() >= limits.max_waiting / 4)
                        }
                        Err(Refused::Empty) => prop_assert!(false),
                    }
                }
                Action::Cancel(which) => {
                    if let Some(&id) = alive.keys().nth(which) {
                        prop_assert!(s.remove(id));
                        alive.remove(&id);
                    }
                }
                Action::Step => {
                    offer(&mut s, right, wrong);
                    match s.plan(0) {
                        Some(step) => take(&mut s, &step, &mut alive, &limits)?,
                        None => prop_assert!(alive.is_empty(), "work is left and no step comes"),
                    }
                }
            }
            prop_assert_eq!(s.running() + s.waiting(), alive.len());
            prop_assert!(alive.len() <= limits.max_sequences + limits.max_waiting);
        }
        // Each sequence needs at most its rows once, and again after each preemption by an older one.
        let mut steps = 0;
        while let Some(step) = s.plan(0) {
            take(&mut s, &step, &mut alive, &limits)?;
            steps += 1;
            prop_assert!(steps < 100_000, "no end");
        }
        prop_assert!(alive.is_empty(), "work is left and no step comes {:#?} {:?}", s.tenants, s.sequences.iter().map(|(i,q)|(i,q.flow,q.phase,q.tokens.len(),q.computed,q.paid,q.table.len())).collect::<Vec<_>>());
        prop_assert_eq!(s.used_blocks(), 0);
    }
}
