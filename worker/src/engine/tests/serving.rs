//! Many at once, deadlines, and what is told about the cache.

use super::*;

fn of(tenant: &str, tokens: Vec<u32>) -> Prepared {
    Prepared {
        tenant: TenantId::new(tenant).unwrap(),
        max_tokens: Some(1),
        ..prepared(tokens)
    }
}

/// Prompt tokens that were found computed.
fn cached(mut stream: Stream) -> u32 {
    while let Some(event) = stream.blocking_recv() {
        if let Event::Finished { cached_tokens, .. } = event.unwrap() {
            return cached_tokens;
        }
    }
    panic!("no end came");
}

#[test]
fn a_tenant_is_told_what_of_his_prompt_was_found_and_finds_nothing_of_others() {
    let engine = start(Scripted(|_, _| certain(A)), limits());
    let ask = |tenant: &str, len: usize| cached(engine.submit(of(tenant, prompt(len))).unwrap());
    assert_eq!(ask("t1", 3 * BLOCK_TOKENS), 0);
    assert_eq!(ask("t1", 3 * BLOCK_TOKENS), 2 * BLOCK_TOKENS as u32);
    assert_eq!(ask("t2", 3 * BLOCK_TOKENS), 0);
    assert_eq!(ask("t1", 5 * BLOCK_TOKENS), 3 * BLOCK_TOKENS as u32);
    assert_eq!(ask("t2", 2 * BLOCK_TOKENS + 1), 2 * BLOCK_TOKENS as u32);
    assert_idle(&engine);
}

#[test]
fn what_a_tenant_had_computed_is_forgotten_when_the_engine_is_told_so() {
    let engine = start(Scripted(|_, _| certain(A)), limits());
    let ask = |tenant: &str| cached(engine.submit(of(tenant, prompt(3 * BLOCK_TOKENS))).unwrap());
    let found = 2 * BLOCK_TOKENS as u32;
    assert_eq!(
        [ask("t1"), ask("t2"), ask("t1"), ask("t2")],
        [0, 0, found, found]
    );
    engine.forget(&TenantId::new("t1").unwrap());
    assert_eq!([ask("t1"), ask("t2"), ask("t1")], [0, found, found]);
}

#[test]
fn a_request_ends_with_an_error_when_its_time_is_over_running_or_waiting() {
    let slow = |_, _| {
        std::thread::sleep(Duration::from_millis(5));
        certain(A)
    };
    let limits = Limits {
        max_sequences: 1,
        blocks: 128 / BLOCK_TOKENS,
        ..limits()
    };
    let engine = start(Scripted(slow), limits);
    let ask = |timeout_ms, max_tokens| {
        let request = Prepared {
            timeout_ms,
            max_tokens,
            ..prepared(prompt(2))
        };
        engine.submit(request).unwrap()
    };
    // Each of the 126 tokens that the context has room for would take its 5 ms.
    let runs = ask(Some(50), None);
    let timed_out = |timeout_ms| Err(InferError::TimedOut { timeout_ms });
    assert_eq!(read(runs).end, timed_out(50));
    // Its blocks are free: one that needs all of them is answered.
    let all = engine.submit(of("t1", prompt(limits.context_tokens - 1)));
    assert_eq!(read(all.unwrap()).end, Ok((FinishReason::Length, 127, 1)));
    let first = ask(None, Some(20));
    let waits = ask(Some(1), None);
    assert_eq!(read(waits).end, timed_out(1));
    assert_eq!(read(first).end, Ok((FinishReason::Length, 2, 20)));
    assert_idle(&engine);
}

#[test]
fn a_tenant_with_three_shares_is_answered_three_times_as_often() {
    let (ranks, gate) = gated();
    let limits = Limits {
        max_sequences: 1,
        ..limits()
    };
    let config = EngineConfig {
        model: "test".into(),
        limits,
    };
    let (engine, runner) = Engine::new(ranks, tokenizer(), None, config);
    let weights = [(TenantId::new("large").unwrap(), 3)].into();
    let thread = std::thread::spawn(|| runner.with_weights(weights).run());
    let ask = |tenant: &str, token: u32| engine.submit(of(tenant, vec![token; 5])).unwrap();
    let mut streams = vec![ask("small", A)];
    gate.step();
    // All wait when the first is answered.
    streams.extend((0..20).flat_map(|_| [ask("small", A), ask("large", A + 1)]));
    let mut large = 0;
    for _ in 0..16 {
        gate.answer(&[END]);
        large += usize::from(gate.step().tokens[0] == A + 1);
    }
    assert!((11..=13).contains(&large), "{large} of 16");
    drop(engine);
    gate.give(Err(lost()));
    thread.join().unwrap();
}

#[test]
fn a_thousand_at_once_all_get_an_answer_or_are_told_when_to_come_back() {
    let engine = start(Scripted(|_, _| certain(A)), limits());
    let ends: Vec<Result<(), InferError>> = std::thread::scope(|scope| {
        let asks = |client: usize| {
            let engine = &engine;
            move || {
                let name = format!("t{client}");
                let streams: Vec<_> = (0..125)
                    .map(|i| engine.submit(of(&name, prompt(1 + (client * 31 + i) % 100))))
                    .collect();
                let end =
                    |stream: Result<Stream, InferError>| stream.and_then(|s| read(s).end.map(drop));
                streams.into_iter().map(end).collect::<Vec<_>>()
            }
        };
        let clients: Vec<_> = (0..8).map(|client| scope.spawn(asks(client))).collect();
        clients
            .into_iter()
            .flat_map(|c| c.join().unwrap())
            .collect()
    });
    assert_eq!(ends.len(), 1000);
    let answered = ends.iter().filter(|e| e.is_ok()).count();
    let refused = |e: &Result<(), InferError>| {
        matches!(e, Err(InferError::Overloaded { retry_after_s: 1.. }))
    };
    assert_eq!(answered + ends.iter().filter(|e| refused(e)).count(), 1000);
    assert!(answered >= 250, "{answered} answered");
    assert_idle(&engine);
}
