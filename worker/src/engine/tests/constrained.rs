//! Answers that keep to a form, and what is told of their tokens.

use super::*;
use crate::client::{Constraint, Format};
use crate::constrain::{Constrainer, Matcher};
use crate::text::CallForm;

/// The state of an answer that matches `pattern`, with `tokenizer`'s tokens.
pub(super) fn matching(pattern: &str, tokenizer: Arc<Tokenizer>) -> Matcher {
    let constraint = Constraint {
        format: Some(Format::Regex {
            pattern: Redacted::new(pattern.into()),
            param: "pattern".into(),
        }),
        calls: None,
    };
    Constrainer::new(tokenizer)
        .matcher(
            &TenantId::new("t1").unwrap(),
            &constraint,
            &[],
            CallForm::Bare,
        )
        .unwrap()
        .unwrap()
}

fn constrained(pattern: &str) -> Prepared {
    Prepared {
        matcher: Some(matching(pattern, tokenizer())),
        ..prepared(prompt(2))
    }
}

fn allowed(step: &StepBatch) -> Vec<u32> {
    let [want] = &step.wants[..] else {
        panic!("expected one row with a mask, got {:?}", step.wants);
    };
    let mask = want.mask.as_ref().unwrap();
    let tokens = tokenizer().vocab_size() as u32;
    (0..tokens)
        .filter(|t| mask[*t as usize / 32] >> (t % 32) & 1 == 1)
        .collect()
}

#[test]
fn each_step_asks_for_what_may_follow_and_the_answer_ends_where_nothing_may() {
    let (ranks, gate) = gated();
    let engine = start(ranks, limits());
    let stream = engine.submit(constrained("a[bc](d|STOP)")).unwrap();
    assert_eq!(allowed(&gate.step()), [A]);
    gate.answer(&[A]);
    assert_eq!(allowed(&gate.step()), [A + 1, A + 2]);
    gate.answer(&[A + 2]);
    assert_eq!(allowed(&gate.step()), [A + 3, ST]);
    gate.answer(&[ST]);
    assert_eq!(allowed(&gate.step()), [OP]);
    gate.answer(&[OP]);
    let outcome = read(stream);
    assert_eq!(outcome.text, "acSTOP");
    assert_eq!(outcome.end, Ok((FinishReason::Stop, 2, 4)));
    assert_idle(&engine);
}

#[test]
fn an_end_is_allowed_just_where_the_form_may_end() {
    let (ranks, gate) = gated();
    let engine = start(ranks, limits());
    let stream = engine.submit(constrained("ab?")).unwrap();
    assert_eq!(allowed(&gate.step()), [A]);
    gate.answer(&[A]);
    assert_eq!(allowed(&gate.step()), [END, A + 1]);
    gate.answer(&[END]);
    let outcome = read(stream);
    assert_eq!(
        (outcome.text.as_str(), outcome.end),
        ("a", Ok((FinishReason::Stop, 2, 1)))
    );
}

#[test]
fn an_answer_that_cannot_go_on_fails_alone() {
    let (ranks, gate) = gated();
    let engine = start(ranks, limits());
    // No token of this vocabulary holds a digit.
    let stuck = engine.submit(constrained("a0")).unwrap();
    gate.step();
    let free = engine.submit(prepared(prompt(3))).unwrap();
    gate.answer(&[A]);
    let step = gate.step();
    assert_eq!(step.logits_rows.len(), 2, "its row was planned already");
    gate.answer(&[A, A + 7]);
    let step = gate.step();
    assert_eq!((step.tokens, step.wants), (vec![A + 7], Vec::new()));
    gate.answer(&[END]);
    let outcome = read(stuck);
    assert_eq!(outcome.text, "a");
    let Err(InferError::Invalid { param, why }) = outcome.end else {
        panic!("{:?}", outcome.end);
    };
    assert_eq!(param, "pattern");
    assert!(why.contains("no token of this model"), "{why}");
    assert_eq!(read(free).end, Ok((FinishReason::Stop, 3, 1)));
    assert_idle(&engine);
}

#[test]
fn a_row_that_allows_nothing_is_the_forms_fault_and_not_the_models() {
    let (ranks, gate) = gated();
    let engine = start(ranks, limits());
    let stream = engine.submit(constrained("ab")).unwrap();
    gate.step();
    let nothing = Candidates {
        top: Vec::new(),
        log_sum_exp: 1.0,
        full: None,
    };
    gate.give(Ok(vec![nothing]));
    assert!(matches!(
        read(stream).end,
        Err(InferError::Invalid { param, .. }) if param == "pattern"
    ));
}

#[test]
fn probabilities_are_the_models_and_name_control_tokens() {
    let row = |_, _| Candidates {
        top: vec![(A, 2.0), (END, 1.0), (A + 1, 0.5)],
        log_sum_exp: 3.0,
        full: None,
    };
    let engine = start(Scripted(row), limits());
    let mut stream = engine
        .submit(Prepared {
            logprobs: Some(2),
            max_tokens: Some(2),
            ..prepared(prompt(2))
        })
        .unwrap();
    let mut told = Vec::new();
    while let Some(event) = stream.blocking_recv() {
        if let Event::Text { logprobs, .. } = event.unwrap() {
            told.extend(logprobs);
        }
    }
    assert_eq!(told.len(), 2);
    assert_eq!(
        (told[0].bytes.expose().as_slice(), told[0].logprob),
        (&b"a"[..], -1.0)
    );
    let top: Vec<(&[u8], f32)> = told[0]
        .top
        .iter()
        .map(|(bytes, logprob)| (bytes.expose().as_slice(), *logprob))
        .collect();
    assert_eq!(top, [(&b"a"[..], -1.0), (&b"</s>"[..], -2.0)]);
}
