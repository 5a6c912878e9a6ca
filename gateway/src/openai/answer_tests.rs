use serde_json::Value;

use super::*;

fn text(text: &str, tokens: usize) -> Event {
    Event::Text {
        text: Redacted::new(text.into()),
        tokens: vec![7; tokens],
        logprobs: Vec::new(),
    }
}

fn finished(reason: FinishReason, prompt_tokens: u32, completion_tokens: u32) -> Event {
    Event::Finished {
        reason,
        prompt_tokens,
        cached_tokens: 0,
        completion_tokens,
    }
}

fn answer(form: Form, choices: usize) -> Answer {
    Answer::new(form, "id-1".into(), 1_700_000_000, "m", choices)
}

fn citation(number: usize) -> Citation {
    Citation {
        number,
        document_id: "doc_1".into(),
        document: "Satzung.pdf".into(),
        page: Some(2),
        heading: "§ 3".into(),
        passage: Redacted::new("96 Euro".into()),
        score: 0.5,
        chunk: 4,
        cited: None,
    }
}

/// All chunks of a stream in which `events` come.
fn stream(answer: &mut Answer, events: Vec<(usize, Event)>) -> Vec<Value> {
    let mut chunks = answer.opening();
    for (index, event) in events {
        chunks.extend(answer.take(index, event).unwrap());
    }
    chunks.extend(answer.closing());
    chunks
        .iter()
        .map(|chunk| serde_json::from_str(chunk).unwrap())
        .collect()
}

fn hello() -> Vec<(usize, Event)> {
    vec![
        (0, Event::Started { prompt_tokens: 5 }),
        (0, text("Gu", 1)),
        (0, text("", 1)),
        (0, text("ten Tag", 2)),
        (0, finished(FinishReason::Stop, 5, 4)),
    ]
}

#[test]
fn a_chat_stream_says_the_role_the_text_and_the_reason() {
    let chunks = stream(&mut answer(Form::Chat, 1), hello());
    assert_eq!(chunks.len(), 4);
    for chunk in &chunks {
        assert_eq!(
            (&chunk["id"], &chunk["object"]),
            (&"id-1".into(), &"chat.completion.chunk".into())
        );
        assert!(chunk.get("usage").is_none() && chunk.get("citations").is_none());
    }
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        serde_json::json!({"role": "assistant", "content": ""})
    );
    assert_eq!(chunks[0]["choices"][0]["finish_reason"], Value::Null);
    assert_eq!(
        chunks[1]["choices"][0]["delta"],
        serde_json::json!({"content": "Gu"})
    );
    assert_eq!(
        chunks[2]["choices"][0]["delta"],
        serde_json::json!({"content": "ten Tag"})
    );
    assert_eq!(chunks[3]["choices"][0]["delta"], serde_json::json!({}));
    assert_eq!(chunks[3]["choices"][0]["finish_reason"], "stop");
}

#[test]
fn with_usage_it_comes_last_and_is_null_before() {
    let mut answer = answer(Form::Chat, 1)
        .include_usage(true)
        .with_citations(Some(vec![citation(1)]));
    let chunks = stream(&mut answer, hello());
    let (last, before) = chunks.split_last().unwrap();
    assert!(
        before
            .iter()
            .all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some())
    );
    assert_eq!(
        last["usage"],
        serde_json::json!({
            "prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0}
        })
    );
    assert_eq!(last["choices"], serde_json::json!([]));
    assert_eq!(
        last["citations"][0]["passage"], "96 Euro",
        "the citations are in the last chunk"
    );
    assert!(before.last().unwrap().get("citations").is_none());
}

#[test]
fn citations_come_first_and_last_and_say_at_the_end_what_was_cited() {
    let mut answer = answer(Form::Chat, 1).with_citations(Some(vec![citation(1), citation(2)]));
    let events = vec![
        (0, text("96 Euro [2].", 3)),
        (0, finished(FinishReason::Stop, 50, 3)),
    ];
    let chunks = stream(&mut answer, events);
    let carrying: Vec<usize> = (0..chunks.len())
        .filter(|&i| chunks[i].get("citations").is_some())
        .collect();
    assert_eq!(carrying, [0, chunks.len() - 1]);
    assert!(chunks[0]["citations"][0].get("cited").is_none());
    let cited: Vec<_> = chunks.last().unwrap()["citations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["cited"].clone())
        .collect();
    assert_eq!(cited, [Value::Bool(false), Value::Bool(true)]);
    assert_eq!(
        chunks[0]["citations"][0],
        serde_json::json!({
            "number": 1, "document_id": "doc_1", "document": "Satzung.pdf", "page": 2, "heading": "§ 3",
            "passage": "96 Euro", "score": 0.5, "chunk": 4
        })
    );
}

#[test]
fn a_whole_chat_answer_has_the_text_the_usage_and_the_citations() {
    let mut answer = answer(Form::Chat, 1).with_citations(Some(Vec::new()));
    stream(&mut answer, hello());
    assert!(answer.is_complete());
    let whole: Value = serde_json::from_str(&answer.whole()).unwrap();
    assert_eq!(
        whole,
        serde_json::json!({
            "id": "id-1", "object": "chat.completion", "created": 1_700_000_000, "model": "m",
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": "Guten Tag", "refusal": null},
                "logprobs": null, "finish_reason": "stop"
            }],
            "usage": {
                "prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9,
                "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0}
            },
            "citations": []
        })
    );
}

#[test]
fn choices_mix_in_a_stream_and_a_shared_prompt_counts_once() {
    let events = vec![
        (1, Event::Started { prompt_tokens: 5 }),
        (0, Event::Started { prompt_tokens: 5 }),
        (1, text("b", 1)),
        (0, text("a", 1)),
        (1, finished(FinishReason::Length, 5, 1)),
        (0, finished(FinishReason::Stop, 5, 1)),
    ];
    let mut answer = answer(Form::Chat, 2).with_citations(Some(vec![citation(1)]));
    let chunks = stream(&mut answer, events);
    assert_eq!(
        chunks
            .iter()
            .filter(|c| c.get("citations").is_some())
            .count(),
        2,
        "first and very last"
    );
    assert!(chunks.last().unwrap().get("citations").is_some());
    assert_eq!(
        answer.usage(),
        Usage {
            prompt_tokens: 5,
            completion_tokens: 2,
            total_tokens: 7,
            ..Usage::default()
        }
    );
    let whole: Value = serde_json::from_str(&answer.whole()).unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], "a");
    assert_eq!(whole["choices"][1]["message"]["content"], "b");
    assert_eq!(whole["choices"][1]["finish_reason"], "length");
}

#[test]
fn what_the_cache_had_is_told_but_not_what_one_answer_left_for_the_next() {
    let mut answer = answer(Form::Chat, 2);
    for (index, cached_tokens) in [16, 32].into_iter().enumerate() {
        let event = Event::Finished {
            reason: FinishReason::Stop,
            prompt_tokens: 40,
            cached_tokens,
            completion_tokens: 1,
        };
        answer.take(index, event).unwrap();
    }
    assert_eq!(answer.usage().prompt_tokens_details.cached_tokens, 16);
}

#[test]
fn different_prompts_are_counted_each() {
    let mut answer = answer(Form::Completion, 4).per_prompt(2);
    for (index, prompt) in [3, 3, 8, 8].into_iter().enumerate() {
        answer
            .take(index, finished(FinishReason::Stop, prompt, 1))
            .unwrap();
    }
    assert_eq!(
        answer.usage(),
        Usage {
            prompt_tokens: 11,
            completion_tokens: 4,
            total_tokens: 15,
            ..Usage::default()
        }
    );
}

#[test]
fn a_text_completion_streams_text_and_ends_with_a_reason() {
    let mut answer = answer(Form::Completion, 1).include_usage(true);
    let chunks = stream(&mut answer, hello());
    assert_eq!(chunks.len(), 4);
    assert_eq!(chunks[0]["object"], "text_completion");
    assert_eq!(
        (
            &chunks[0]["choices"][0]["text"],
            &chunks[0]["choices"][0]["finish_reason"]
        ),
        (&"Gu".into(), &Value::Null)
    );
    assert_eq!(chunks[2]["choices"][0]["finish_reason"], "stop");
    for chunk in &chunks[..3] {
        assert_eq!(chunk.get("usage"), Some(&Value::Null), "{chunk}");
    }
    assert_eq!(chunks[3]["usage"]["total_tokens"], 9);
    for chunk in stream(&mut self::answer(Form::Completion, 1), hello()) {
        assert!(chunk.get("usage").is_none(), "nobody asked: {chunk}");
    }
}

#[test]
fn an_answer_that_the_server_ended_is_an_error_to_retry() {
    let mut answer = answer(Form::Chat, 1);
    let error = answer
        .take(0, finished(FinishReason::Cancelled, 5, 1))
        .unwrap_err();
    assert_eq!(
        (error.status().as_u16(), error.code()),
        (503, "interrupted")
    );
    assert!(!answer.is_complete());
}

fn offering_tools() -> Answer {
    answer(Form::Chat, 1).with_tools(&["wetter".into()])
}

#[test]
fn a_call_of_a_tool_streams_its_name_and_then_its_arguments() {
    let events = vec![
        (0, text("{\"name\": \"wetter\",", 3)),
        (0, text(" \"parameters\": {\"ort\":", 5)),
        (0, text(" \"Ulm\"}}", 5)),
        (0, finished(FinishReason::Stop, 50, 8)),
    ];
    let mut answer = offering_tools();
    let chunks = stream(&mut answer, events);
    let deltas: Vec<&Value> = chunks[1..chunks.len() - 1]
        .iter()
        .map(|chunk| &chunk["choices"][0]["delta"]["tool_calls"][0])
        .collect();
    assert_eq!(
        deltas,
        [
            &serde_json::json!({"index": 0, "id": "call_100", "type": "function", "function": {"name": "wetter", "arguments": ""}}),
            &serde_json::json!({"index": 0, "function": {"arguments": "{\"ort\":"}}),
            &serde_json::json!({"index": 0, "function": {"arguments": " \"Ulm\"}"}}),
        ]
    );
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "tool_calls");
    let whole: Value = serde_json::from_str(&answer.whole()).unwrap();
    let choice = &whole["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&"tool_calls".into(), &Value::Null)
    );
    assert_eq!(
        choice["message"]["tool_calls"],
        serde_json::json!([{
            "id": "call_100", "type": "function",
            "function": {"name": "wetter", "arguments": "{\"ort\": \"Ulm\"}"}
        }])
    );
}

#[test]
fn probabilities_come_with_the_text_of_their_tokens_in_both_shapes() {
    let probable = |token: &str, logprob: f32| TokenLogprob {
        bytes: Redacted::new(token.into()),
        logprob,
        top: vec![
            (Redacted::new("Ja".into()), -0.25),
            (Redacted::new(vec![0xc3]), f32::NEG_INFINITY),
        ],
    };
    let with = |part: &str, logprobs: Vec<TokenLogprob>| Event::Text {
        text: Redacted::new(part.into()),
        tokens: vec![7; logprobs.len()],
        logprobs,
    };
    let events = || {
        vec![
            (0, with("", vec![probable("Ä", -1.5)])),
            (0, with("Ärger", vec![probable("rger", -0.5)])),
            (0, with("", vec![probable(".", -2.0)])),
            (0, finished(FinishReason::Stop, 3, 3)),
        ]
    };
    let mut chat = answer(Form::Chat, 1);
    let chunks = stream(&mut chat, events());
    let told = |chunk: &Value| chunk["choices"][0]["logprobs"]["content"].clone();
    assert_eq!(told(&chunks[1]).as_array().map(Vec::len), Some(2));
    assert_eq!(told(&chunks[2])[0]["token"], ".");
    assert_eq!(chunks[0]["choices"][0]["logprobs"], Value::Null);
    let whole: Value = serde_json::from_str(&chat.whole()).unwrap();
    assert_eq!(
        told(&whole)[0],
        serde_json::json!({
            "token": "Ä", "logprob": -1.5, "bytes": [195, 132], "top_logprobs": [
                {"token": "Ja", "logprob": -0.25, "bytes": [74, 97]},
                {"token": "\u{fffd}", "logprob": -9999.0, "bytes": [195]}
            ]
        })
    );
    let mut text = answer(Form::Completion, 1);
    let chunks = stream(&mut text, events());
    let told = |chunk: &Value| chunk["choices"][0]["logprobs"].clone();
    assert_eq!(told(&chunks[0])["text_offset"], serde_json::json!([0, 1]));
    assert_eq!(told(&chunks[1])["text_offset"], serde_json::json!([5]));
    let whole: Value = serde_json::from_str(&text.whole()).unwrap();
    let logprobs = told(&whole);
    assert_eq!(logprobs["tokens"], serde_json::json!(["Ä", "rger", "."]));
    assert_eq!(
        logprobs["token_logprobs"],
        serde_json::json!([-1.5, -0.5, -2.0])
    );
    assert_eq!(logprobs["top_logprobs"][0]["Ja"], -0.25);
    assert_eq!(logprobs["text_offset"], serde_json::json!([0, 1, 5]));
}

#[test]
fn what_turns_out_to_be_no_call_is_sent_as_text() {
    let cases = [
        (vec!["Guten", " Tag"], vec!["Guten", " Tag"]),
        (vec!["<", "b>fett"], vec!["<b>fett"]),
        (vec!["{\"ort\":", " \"Ulm\"}"], vec!["{\"ort\": \"Ulm\"}"]),
        (vec!["{\"name\": \"wet"], vec!["{\"name\": \"wet"]),
    ];
    for (pieces, expected) in cases {
        let mut events: Vec<_> = pieces.iter().map(|piece| (0, text(piece, 1))).collect();
        events.push((0, finished(FinishReason::Length, 5, 2)));
        let mut answer = offering_tools();
        let chunks = stream(&mut answer, events);
        let sent: Vec<_> = chunks[1..chunks.len() - 1]
            .iter()
            .map(|c| c["choices"][0]["delta"]["content"].as_str().unwrap())
            .collect();
        assert_eq!(sent, expected);
        assert_eq!(
            chunks.last().unwrap()["choices"][0]["finish_reason"],
            "length"
        );
        let whole: Value = serde_json::from_str(&answer.whole()).unwrap();
        assert_eq!(whole["choices"][0]["message"]["content"], pieces.concat());
    }
}

#[test]
fn an_event_of_an_unknown_choice_is_an_error_and_no_panic() {
    assert_eq!(
        answer(Form::Chat, 1)
            .take(1, text("x", 1))
            .unwrap_err()
            .status()
            .as_u16(),
        500
    );
}
