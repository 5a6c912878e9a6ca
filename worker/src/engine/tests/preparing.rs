//! From requests to tokens.

use coordinator::Redacted;
use coordinator::ids::TenantId;

use super::{A, tokenizer, vocabulary};
use crate::client::{Class, GenerateRequest, InferError, Message, Prompt, Sampling};
use crate::constrain::Constrainer;
use crate::engine::{Prepared, prepare};
use crate::text::{ChatTemplate, Tokenizer};

const NOW_MS: u64 = 1_767_225_600_000;

fn request(prompt: Prompt) -> GenerateRequest {
    GenerateRequest {
        tenant: TenantId::new("t1").unwrap(),
        model: "test".into(),
        prompt,
        max_tokens: Some(9),
        sampling: Sampling::greedy(),
        stop: vec!["x".into()],
        echo: false,
        constraint: None,
        logprobs: None,
        priority: Class::Background,
        timeout_ms: Some(5000),
    }
}

fn made(
    request: &GenerateRequest,
    template: Option<&ChatTemplate>,
) -> Result<Prepared, InferError> {
    let tokenizer = tokenizer();
    let constrainer = Constrainer::new(tokenizer.clone());
    prepare(request, &tokenizer, template, &constrainer, NOW_MS)
}

fn text(text: &str) -> Prompt {
    Prompt::Text(Redacted::new(text.into()))
}

fn chat(messages: Vec<Message>, tools: Option<&str>) -> Prompt {
    Prompt::Chat {
        messages,
        tools: tools.map(|t| Redacted::new(t.into())),
    }
}

fn with(template: &str, prompt: Prompt) -> Result<Prepared, InferError> {
    let template = ChatTemplate::new(template, "<s>", "</s>").unwrap();
    made(&request(prompt), Some(&template))
}

/// The parameter that an error names, and its reason.
fn refused(result: Result<Prepared, InferError>) -> (String, String) {
    match result {
        Err(InferError::Invalid { param, why }) => (param, why),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn a_text_begins_with_the_models_beginning_and_holds_no_control_token() {
    let prepared = made(&request(text("ab")), None).unwrap();
    assert_eq!(prepared.tokens, [1, A, A + 1]);
    assert_eq!(prepared.tenant.as_str(), "t1");
    assert_eq!(
        (prepared.max_tokens, &prepared.stop[..]),
        (Some(9), &["x".to_owned()][..])
    );
    assert!(prepared.echo.is_none());
    let tokens = made(&request(text("</s><s>")), None).unwrap().tokens;
    assert_eq!(tokens[0], 1);
    assert!(
        !tokens[1..].contains(&1) && !tokens.contains(&2),
        "{tokens:?}"
    );
}

#[test]
fn echo_is_for_texts_and_not_for_chats() {
    let echoing = |prompt| GenerateRequest {
        echo: true,
        ..request(prompt)
    };
    let template = ChatTemplate::new("a", "", "").unwrap();
    let of = |prompt| {
        made(&echoing(prompt), Some(&template))
            .unwrap()
            .echo
            .map(Redacted::into_inner)
    };
    assert_eq!(of(text("ab")).as_deref(), Some("ab"));
    assert_eq!(of(chat(vec![Message::new("user", "b")], None)), None);
}

#[test]
fn requests_without_a_seed_get_different_ones() {
    let seed = || made(&request(text("a")), None).unwrap().seed;
    assert_ne!(seed(), seed());
}

#[test]
fn a_chat_is_rendered_by_the_template_with_what_the_message_has_and_no_more() {
    let template = "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ m.content }}\
        {{ m.name }}{{ m.tool_call_id }}{% if 'tool_calls' in m %}{{ m.tool_calls[0].function.arguments.k }}{% endif %}</s>{% endfor %}\
        {% if tools %}{{ tools[0].n }}{% endif %}{% if add_generation_prompt %}z{% endif %}";
    let messages = vec![
        Message {
            name: Some("n".into()),
            ..Message::new("u", "b</s>")
        },
        Message {
            tool_calls: Some(Redacted::new(
                r#"[{"type":"function","id":"i","function":{"name":"f","arguments":"{\"k\":\"v\"}"}}]"#
                    .into(),
            )),
            ..Message::new("a", "")
        },
        Message {
            tool_call_id: Some("i".into()),
            tool_calls: Some(Redacted::new("[]".into())),
            ..Message::new("t", "r")
        },
    ];
    let prepared = with(template, chat(messages, Some(r#"[{"n":"w"}]"#))).unwrap();
    let tokens = prepared.tokens;
    assert_eq!(tokens.iter().filter(|&&t| t == 1).count(), 1);
    // Three turns end; the user's own `</s>` ends none.
    assert_eq!(tokens.iter().filter(|&&t| t == 2).count(), 3, "{tokens:?}");
    let text: Vec<String> = tokens
        .split(|&t| t == 2)
        .map(|turn| tokenizer().decode(turn))
        .collect();
    assert!(
        text[0].starts_with("ub") && text[0].ends_with('n'),
        "{text:?}"
    );
    assert_eq!(text[1..], ["av", "tri", "wz"]);
    let without = with(
        "{% if tools is none %}n{% endif %}",
        chat(vec![Message::new("u", "")], Some("[]")),
    );
    assert_eq!(without.unwrap().tokens, [1, A + 13], "no tools at all");
}

#[test]
fn a_chat_without_a_template_says_where_else_to_go() {
    let prompt = chat(vec![Message::new("user", "b")], None);
    let (param, why) = refused(made(&request(prompt), None));
    assert_eq!(param, "messages");
    assert!(why.contains("/v1/completions"), "{why}");
}

#[test]
fn what_the_template_refuses_is_the_callers_to_mend() {
    let prompt = || chat(vec![Message::new("user", "geheim")], None);
    let (param, why) = refused(with(
        "{{ raise_exception('roles must alternate') }}",
        prompt(),
    ));
    assert_eq!(param, "messages");
    assert!(why.contains("roles must alternate"), "{why}");
    let (param, why) = refused(with("{{ messages[0].content + 1 }}", prompt()));
    assert_eq!(param, "messages");
    assert!(!why.contains("geheim"), "{why}");
}

#[test]
fn tools_and_calls_that_are_no_json_list_are_named_without_their_text() {
    let call = |json: &str| {
        let message = Message {
            tool_calls: Some(Redacted::new(json.into())),
            ..Message::new("assistant", "")
        };
        with("a", chat(vec![message], None))
    };
    for broken in ["{\"geheim\": 1}", "[geheim", "\"geheim\"", ""] {
        let tools = with("a", chat(vec![Message::new("user", "b")], Some(broken)));
        for (result, expected) in [(tools, "tools"), (call(broken), "messages.tool_calls")] {
            let (param, why) = refused(result);
            assert_eq!(param, expected);
            assert!(
                why.contains("JSON array") && !why.contains("geheim"),
                "{why}"
            );
        }
    }
}

#[test]
fn what_can_be_judged_without_a_model_is_judged_first() {
    let judged = |change: fn(&mut GenerateRequest)| {
        let mut request = request(text("a"));
        change(&mut request);
        refused(made(&request, None)).0
    };
    assert_eq!(judged(|r| r.sampling.temperature = 2.5), "temperature");
    assert_eq!(judged(|r| r.sampling.top_p = f32::NAN), "top_p");
    assert_eq!(judged(|r| r.max_tokens = Some(0)), "max_tokens");
    assert_eq!(judged(|r| r.stop = vec![String::new()]), "stop");
    assert_eq!(judged(|r| r.stop = vec!["a".into(); 17]), "stop");
    assert_eq!(judged(|r| r.prompt = chat(Vec::new(), None)), "messages");
    assert_eq!(
        judged(|r| r.prompt = text(&"a".repeat((8 << 20) + 1))),
        "prompt"
    );
}

#[test]
fn a_tokenizer_that_has_no_end_still_makes_prompts() {
    let tokenizer = Tokenizer::from_vocabulary(&vocabulary(false)).unwrap();
    let prepared = prepare(
        &request(text("a")),
        &tokenizer,
        None,
        &Constrainer::new(self::tokenizer()),
        NOW_MS,
    )
    .unwrap();
    assert_eq!(prepared.tokens, [1, A]);
}

#[test]
fn several_calls_of_a_message_are_divided_for_a_template_that_takes_one() {
    let call = |id: &str| format!(r#"{{"id":"{id}","function":{{"name":"f"}}}}"#);
    let mut calling = Message::new("assistant", "b");
    calling.tool_calls = Some(Redacted::new(format!("[{},{}]", call("x"), call("y"))));
    let result = |id: &str, text: &str| Message {
        tool_call_id: Some(id.into()),
        ..Message::new("tool", text)
    };
    let messages = vec![
        Message::new("user", "a"),
        calling,
        result("y", "q"),
        result("x", "p"),
        Message::new("user", "c"),
    ];
    let one = "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls|length != 1 %}{{ raise_exception('one') }}{% endif %}\
               {{ m.content }}{{ m.tool_calls[0].id }}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let several = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.id }}{% endfor %}{% endfor %}";
    let text = |template: &str| {
        let tokens = with(template, chat(messages.clone(), None)).unwrap().tokens;
        tokenizer().decode(&tokens)
    };
    assert_eq!(text(one), "abxpyqc");
    assert_eq!(text(several), "abxyqpc", "left alone where it may stay");
}

#[test]
fn a_bias_on_a_token_that_the_model_lacks_is_refused() {
    let mut request = request(text("a"));
    request.sampling.logit_bias = vec![(A, 1.0), (1_000_000, 1.0)];
    let (param, why) = refused(made(&request, None));
    assert_eq!(param, "logit_bias");
    assert!(why.contains("1000000"), "{why}");
}
