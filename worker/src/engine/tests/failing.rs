//! What a failure ends, and what it does not.

use super::*;

#[test]
fn a_row_that_is_not_finite_ends_one_answer_only() {
    let (ranks, gate) = gated();
    let engine = start(ranks, limits());
    let bad = engine.submit(prepared(prompt(2))).unwrap();
    gate.step();
    let good = engine.submit(prepared(prompt(3))).unwrap();
    gate.answer(&[A]);
    assert_eq!(gate.step().spans.len(), 2);
    gate.give(Ok(vec![not_finite(), certain(A + 1)]));
    let step = gate.step();
    assert_eq!(step.tokens, [A + 1], "the other goes on");
    gate.answer(&[END]);
    let bad = read(bad);
    assert_eq!(bad.tokens, [A]);
    assert!(matches!(bad.end, Err(InferError::Internal { .. })));
    assert_eq!(read(good).end, Ok((FinishReason::Stop, 3, 1)));
    assert_eq!(engine.broken(), None);
    assert_idle(&engine);
}

#[test]
fn a_refused_step_ends_only_the_answers_in_it() {
    let (ranks, gate) = gated();
    let limits = Limits {
        max_sequences: 2,
        step_rows: 8,
        ..limits()
    };
    let engine = start(ranks, limits);
    let decodes = engine.submit(prepared(prompt(2))).unwrap();
    gate.step();
    let prefills = engine.submit(prepared(prompt(20))).unwrap();
    let waits = engine.submit(prepared(prompt(3))).unwrap();
    gate.answer(&[A]);
    let step = gate.step();
    assert_eq!((step.spans.len(), step.logits_rows.len()), (2, 1));
    gate.give(Err(model::Error::Step {
        what: "token",
        expected: "an id below 320".into(),
        got: "999".into(),
    }));
    // Its blocks and places are free for the one that was not in the step.
    assert_eq!(gate.step().tokens, prompt(3));
    gate.answer(&[END]);
    for stream in [decodes, prefills] {
        let end = read(stream).end;
        assert!(matches!(&end, Err(InferError::Internal { why }) if why.contains("999")));
    }
    assert_eq!(read(waits).end, Ok((FinishReason::Stop, 3, 0)));
    assert_eq!(engine.broken(), None);
    assert_idle(&engine);
}

#[test]
fn a_broken_group_interrupts_every_stream_also_the_waiting_ones() {
    let (ranks, gate) = gated();
    let limits = Limits {
        max_sequences: 1,
        ..limits()
    };
    let engine = start(ranks, limits);
    let runs = engine.submit(prepared(prompt(2))).unwrap();
    gate.step();
    let waits = engine.submit(prepared(prompt(2))).unwrap();
    gate.answer(&[A]);
    gate.step();
    let in_the_inbox = engine.submit(prepared(prompt(2))).unwrap();
    gate.give(Err(lost()));
    for stream in [runs, waits, in_the_inbox] {
        let end = read(stream).end;
        assert!(
            matches!(&end, Err(error @ InferError::Interrupted { why }) if why.contains("rank 1") && error.retryable()),
            "{end:?}"
        );
    }
    assert!(engine.broken().is_some_and(|why| why.contains("rank 1")));
    gate.stopped.recv_timeout(PATIENCE).unwrap();
    assert_idle(&engine);
    eventually(
        "a closed inbox",
        || matches!(engine.submit(prepared(prompt(2))), Err(InferError::Interrupted { why }) if why.contains("rank 1")),
    );
    assert_idle(&engine);
}

#[test]
fn ranks_that_give_another_number_of_rows_break_the_group() {
    let (ranks, gate) = gated();
    let engine = start(ranks, limits());
    let stream = engine.submit(prepared(prompt(2))).unwrap();
    gate.step();
    gate.answer(&[A, A]);
    assert!(matches!(
        read(stream).end,
        Err(InferError::Interrupted { .. })
    ));
    assert!(engine.broken().is_some());
}

/// Ranks of which a follower dies while nobody asks.
struct DiesIdle;

impl Stepper for DiesIdle {
    fn step(&mut self, _: &StepBatch) -> Answer {
        Ok(Vec::new())
    }

    fn idle(&mut self) -> Result<(), model::Error> {
        Err(lost())
    }

    fn stop(&mut self) {}
}

#[test]
fn a_follower_that_dies_while_nobody_asks_breaks_the_group() {
    let engine = start(DiesIdle, limits());
    eventually("a broken group", || engine.broken().is_some());
}

#[test]
fn dropping_the_engine_interrupts_its_streams_and_sends_the_followers_home() {
    let (ranks, gate) = gated();
    let engine = start(ranks, limits());
    let stream = engine.submit(prepared(prompt(2))).unwrap();
    gate.step();
    drop(engine);
    gate.answer(&[A]);
    let outcome = read(stream);
    assert_eq!(outcome.tokens, [A], "the step under way still counts");
    assert!(matches!(outcome.end, Err(InferError::Interrupted { .. })));
    gate.stopped.recv_timeout(PATIENCE).unwrap();
}
