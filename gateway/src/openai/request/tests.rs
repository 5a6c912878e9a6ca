use coordinator::ids::TenantId;
use worker::client::{CallChoice, Calls, Format, Prompt};

use super::chat::GROUNDED_TEMPERATURE;
use super::completion::COMPLETION_TOKENS;
use super::*;
use crate::http::body::parse;

fn chat(body: &str) -> Result<Chat, ApiError> {
    parse::<ChatRequest>(body.as_bytes())?.check()
}

fn completion(body: &str) -> Result<Completion, ApiError> {
    parse::<CompletionRequest>(body.as_bytes())?.check()
}

fn tenant() -> TenantId {
    TenantId::new("musterstadt").unwrap()
}

/// A chat body with `more` fields.
fn with(more: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"Hallo"}}],{more}}}"#)
}

#[test]
fn given_the_least_then_openais_defaults_hold() {
    let chat = chat(r#"{"model":"m","messages":[{"role":"user","content":"Hallo"}]}"#).unwrap();
    let requests = chat.generations(&tenant());
    assert_eq!(requests.len(), 1);
    let request = &requests[0];
    assert_eq!(
        (request.model.as_str(), request.max_tokens, request.echo),
        ("m", None, false)
    );
    assert_eq!(request.sampling, Sampling::default());
    assert_eq!(
        (chat.stream, chat.include_usage, request.stop.len()),
        (false, false, 0)
    );
    let Prompt::Chat { messages, tools } = &request.prompt else {
        panic!("not a chat")
    };
    assert_eq!(
        (
            messages[0].role.as_str(),
            messages[0].content.expose().as_str()
        ),
        ("user", "Hallo")
    );
    assert!(tools.is_none());
}

#[test]
fn all_common_fields_arrive() {
    let chat = chat(&with(
        r#""stream":true,"stream_options":{"include_usage":true},"max_tokens":7,"n":2,"temperature":0.5,"top_p":0.9,
        "top_k":40,"min_p":0.05,"repetition_penalty":1.1,"presence_penalty":-1,"frequency_penalty":1,"seed":-1,
        "stop":["a","b"],"user":"u","metadata":{},"store":false,"logprobs":false,"logit_bias":{},"tool_choice":"auto",
        "response_format":{"type":"text"},"parallel_tool_calls":true,"service_tier":"auto","reasoning_effort":"low",
        "tools":[{"type":"function","function":{"name":"f","parameters":{}}}]"#,
    ))
    .unwrap();
    let requests = chat.generations(&tenant());
    assert_eq!(
        (requests.len(), chat.stream, chat.include_usage),
        (2, true, true)
    );
    let sampling = &requests[0].sampling;
    assert_eq!(
        (
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p
        ),
        (0.5, 0.9, 40, 0.05)
    );
    assert_eq!(
        (
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.repetition_penalty
        ),
        (-1.0, 1.0, 1.1)
    );
    assert_eq!(sampling.seed, Some(u64::MAX));
    assert_eq!(
        requests[1].sampling.seed,
        Some(0),
        "each choice has its own seed"
    );
    assert_eq!(requests[0].stop, ["a", "b"]);
    assert_eq!(requests[0].max_tokens, Some(7));
    let Prompt::Chat {
        tools: Some(tools), ..
    } = &requests[0].prompt
    else {
        panic!("no tools")
    };
    assert!(tools.expose().contains("\"name\":\"f\""));
}

#[test]
fn null_means_absent() {
    chat(&with(
        r#""stream":null,"stream_options":null,"max_tokens":null,"n":null,"temperature":null,"stop":null,"seed":null,
        "tools":null,"tool_choice":null,"response_format":null,"logit_bias":null,"collections":null"#,
    ))
    .expect("null is absent");
}

#[test]
fn content_comes_as_text_or_parts_and_assistants_may_call_tools_without() {
    let chat = chat(
        r#"{"model":"m","messages":[
            {"role":"developer","content":"Kurz."},
            {"role":"user","content":[{"type":"text","text":"eins"},{"type":"text","text":"zwei"}]},
            {"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":"{}"}}]},
            {"role":"tool","tool_call_id":"c1","content":"3"}
        ]}"#,
    )
    .unwrap();
    let messages = &chat.messages;
    assert_eq!(messages[0].role, "system");
    assert_eq!(messages[1].content.expose(), "eins\nzwei");
    assert!(
        messages[2]
            .tool_calls
            .as_ref()
            .is_some_and(|calls| calls.expose().contains("\"c1\""))
    );
    assert_eq!(messages[3].tool_call_id.as_deref(), Some("c1"));
}

#[test]
fn an_answer_from_collections_is_drawn_coolly_unless_told_otherwise() {
    let sampling = |more: &str| chat(&with(more)).unwrap().sampling;
    assert_eq!(
        sampling(r#""collections":["col_1"]"#).temperature,
        GROUNDED_TEMPERATURE
    );
    assert_eq!(
        sampling(r#""collections":["col_1"],"temperature":1.5"#).temperature,
        1.5
    );
    assert_eq!(sampling(r#""collections":[]"#).temperature, 1.0);
}

#[test]
fn what_is_wrong_with_a_chat_is_named() {
    let many_messages = format!(
        r#"{{"model":"m","messages":[{}]}}"#,
        vec![r#"{"role":"user","content":"x"}"#; MAX_MESSAGES + 1].join(",")
    );
    let many_stops = with(&format!(r#""stop":[{}]"#, vec!["\"x\""; 17].join(",")));
    let many_tools = with(&format!(
        r#""tools":[{}]"#,
        vec![r#"{"function":{"name":"f"}}"#; MAX_TOOLS + 1].join(",")
    ));
    let cases: Vec<(String, Option<&str>, &str)> = vec![
        (r#"{"messages":[]}"#.into(), Some("model"), "missing required parameter: model"),
        (r#"{"model":"m"}"#.into(), Some("messages"), "missing required parameter: messages"),
        (r#"{"model":"m","messages":[]}"#.into(), Some("messages"), "got 0"),
        (r#"{"model":"m","messages":"Hallo"}"#.into(), Some("messages"), "expected an array"),
        (r#"{"model":"m","messages":[{"content":"x"}]}"#.into(), Some("messages[0].role"), "missing required parameter: messages[0].role"),
        (r#"{"model":"m","messages":[{"role":"boss","content":"x"}]}"#.into(), Some("messages[0].role"), "got \"boss\""),
        (r#"{"model":"m","messages":[{"role":"user"}]}"#.into(), Some("messages[0].content"), "got nothing"),
        (r#"{"model":"m","messages":[{"role":"user","content":5}]}"#.into(), Some("messages[0].content"), "got a number"),
        (
            r#"{"model":"m","messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]}"#.into(),
            Some("messages[0].content[0].type"),
            "read text only",
        ),
        (
            r#"{"model":"m","messages":[{"role":"assistant","tool_calls":[{"id":"x"}]}]}"#.into(),
            Some("messages[0].tool_calls[0]"),
            "\"function\"",
        ),
        (many_messages, Some("messages"), "2049"),
        (with(r#""n":100000"#), Some("n"), "1 to 8 answers, got 100000"),
        (with(r#""n":0"#), Some("n"), "got 0"),
        (with(r#""n":1.5"#), Some("n"), "expected a non-negative integer"),
        (with(r#""n":99999999999999999999"#), Some("n"), "expected a non-negative integer"),
        (with(r#""max_tokens":-5"#), Some("max_tokens"), "got integer `-5`"),
        (with(r#""max_tokens":0"#), Some("max_tokens"), "at least 1"),
        (with(r#""max_completion_tokens":0"#), Some("max_completion_tokens"), "at least 1"),
        (with(r#""temperature":2.1"#), Some("temperature"), "between 0 and 2"),
        (with(r#""temperature":-1"#), Some("temperature"), "between 0 and 2"),
        (with(r#""temperature":"warm""#), Some("temperature"), "expected a number"),
        (with(r#""top_p":0"#), Some("top_p"), "above 0"),
        (with(r#""presence_penalty":3"#), Some("presence_penalty"), "between -2 and 2"),
        (with(r#""stop":[""]"#), Some("stop"), "1 to 256 bytes"),
        (many_stops, Some("stop"), "got 17"),
        (with(r#""stream":"yes""#), Some("stream"), "expected a boolean"),
        (with(r#""stream_options":{"include_usage":true}"#), Some("stream_options"), "stream=true"),
        (with(r#""top_logprobs":3"#), Some("top_logprobs"), "logprobs=true"),
        (with(r#""logprobs":true,"top_logprobs":21"#), Some("top_logprobs"), "0 to 20, got 21"),
        (with(r#""logprobs":3"#), Some("logprobs"), "expected a boolean"),
        (with(r#""logit_bias":{"50256":-101}"#), Some("logit_bias"), "from -100 to 100, got -101"),
        (with(r#""logit_bias":{"Haus":1}"#), Some("logit_bias"), "token ids"),
        (with(r#""logit_bias":{"-1":1}"#), Some("logit_bias"), "token ids"),
        (with(r#""logit_bias":{"1":"x"}"#), Some("logit_bias"), "a number for token 1"),
        (with(r#""logit_bias":{"1":1,"01":2}"#), Some("logit_bias"), "each token once"),
        (with(r#""logit_bias":[1]"#), Some("logit_bias"), "an object"),
        (with(&format!(r#""logit_bias":{{{}}}"#, (0..301).map(|i| format!("\"{i}\":1")).collect::<Vec<_>>().join(","))), Some("logit_bias"), "at most 300"),
        (with(r#""functions":[{"name":"f"}]"#), Some("functions"), "`tools`"),
        (with(r#""response_format":{"type":"xml"}"#), Some("response_format.type"), "\"json_schema\""),
        (with(r#""response_format":"json""#), Some("response_format"), "an object"),
        (with(r#""response_format":{"type":"json_schema"}"#), Some("response_format.json_schema.schema"), "a JSON schema"),
        (with(r#""response_format":{"type":"regex"}"#), Some("response_format.pattern"), "a regular expression"),
        (with(r#""modalities":["audio"]"#), Some("modalities"), "text only"),
        (with(r#""tools":[{"type":"function"}]"#), Some("tools[0]"), "\"function\""),
        (many_tools, Some("tools"), "got 129"),
        (with(r#""tool_choice":"required""#), Some("tool_choice"), "needs `tools`"),
        (with(r#""tool_choice":"immer""#), Some("tool_choice"), "\"auto\""),
        (with(r#""tool_choice":{"type":"function"}"#), Some("tool_choice"), "\"auto\""),
        (with(r#""tools":[{"function":{"name":"f"}}],"tool_choice":{"type":"function","function":{"name":"g"}}"#), Some("tool_choice"), "got \"g\"; they are: f"),
        (with(r#""tools":[{"function":{"name":"f g"}}]"#), Some("tools[0].function.name"), "1 to 64"),
        (with(r#""tools":[{"function":{"name":"f","parameters":[]}}]"#), Some("tools[0].function.parameters"), "an object"),
        (with(r#""parallel_tool_calls":"ja""#), Some("parallel_tool_calls"), "expected a boolean"),
        (with(r#""priority":"urgent""#), Some("priority"), "expected \"interactive\", \"background\" or a whole number, got a string"),
        (with(r#""priority":0.5"#), Some("priority"), "got a number"),
        (with(r#""priority":{}"#), Some("priority"), "got an object"),
        (with(r#""timeout_ms":0"#), Some("timeout_ms"), "at least 1, got 0"),
        (with(r#""timeout_ms":-1"#), Some("timeout_ms"), "expected a non-negative integer"),
        (with(r#""timeout_ms":"1s""#), Some("timeout_ms"), "expected a non-negative integer"),
        (with(r#""collections":["a","b","c","d","e","f","g","h","i","j","k","l","m","n","o","p","q","r","s","t","u","v","w","x","y","z","1","2","3","4","5","6","7"]"#), Some("collections"), "got 33"),
    ];
    for (body, param, part) in cases {
        let shown = &body[..body.len().min(160)];
        let error = chat(&body)
            .err()
            .unwrap_or_else(|| panic!("accepted: {shown}"));
        assert_eq!(
            (error.status().as_u16(), error.param()),
            (400, param),
            "{shown}: {}",
            error.message()
        );
        assert!(
            error.message().contains(part),
            "{shown}: {}",
            error.message()
        );
    }
}

#[test]
fn priority_and_deadline_reach_the_model_by_name_or_as_vllm_counts() {
    let asked = |more: &str| {
        let text = format!(r#"{{"model":"m","prompt":"a",{more}}}"#);
        let chat = chat(&with(more)).unwrap().generations(&tenant()).remove(0);
        let text = completion(&text).unwrap().generations(&tenant()).remove(0);
        let of = |r: GenerateRequest| (r.priority, r.timeout_ms);
        assert_eq!(of(chat.clone()), of(text));
        of(chat)
    };
    let cases = [
        (
            r#""priority":null,"timeout_ms":null"#,
            Class::Interactive,
            None,
        ),
        (r#""priority":"interactive""#, Class::Interactive, None),
        (
            r#""priority":"background","timeout_ms":1500"#,
            Class::Background,
            Some(1500),
        ),
        (r#""priority":0"#, Class::Interactive, None),
        (r#""priority":-5"#, Class::Interactive, None),
        (r#""priority":10"#, Class::Background, None),
    ];
    for (more, class, timeout_ms) in cases {
        assert_eq!(asked(more), (class, timeout_ms), "{more}");
    }
}

#[test]
fn no_tools_are_offered_when_the_choice_is_none() {
    let chat = chat(&with(
        r#""tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":"none""#,
    ))
    .unwrap();
    assert!(chat.tools.is_none());
}

#[test]
fn what_the_answer_must_keep_to_reaches_the_model() {
    let asked = |more: &str| chat(&with(more)).unwrap().generations(&tenant()).remove(0);
    let constraint = |more: &str| asked(more).constraint;
    assert_eq!(constraint(r#""response_format":{"type":"text"}"#), None);
    let format = |more: &str| constraint(more).unwrap().format.unwrap();
    assert_eq!(
        format(r#""response_format":{"type":"json_object"}"#),
        Format::JsonObject
    );
    assert_eq!(
        format(
            r#""response_format":{"type":"json_schema","json_schema":{"name":"a","strict":true,"schema":{"type":"null"}}}"#
        ),
        Format::Schema {
            schema: Redacted::new(r#"{"type":"null"}"#.into()),
            param: "response_format.json_schema.schema".into()
        }
    );
    assert_eq!(
        format(r#""response_format":{"type":"regex","pattern":"a+"}"#),
        Format::Regex {
            pattern: Redacted::new("a+".into()),
            param: "response_format.pattern".into()
        }
    );
    let calls = |more: &str| {
        let tools = r#""tools":[{"type":"function","function":{"name":"f"}}]"#;
        constraint(&format!("{tools},{more}"))
            .unwrap()
            .calls
            .unwrap()
    };
    let of = |choice, parallel| Calls { choice, parallel };
    assert_eq!(calls(r#""tool_choice":"auto""#), of(CallChoice::Auto, true));
    assert_eq!(
        calls(r#""tool_choice":"required","parallel_tool_calls":false"#),
        of(CallChoice::Required, false)
    );
    assert_eq!(
        calls(r#""tool_choice":{"type":"function","function":{"name":"f"}}"#),
        of(CallChoice::Named("f".into()), true)
    );
    let asked = asked(r#""logprobs":true,"top_logprobs":2,"logit_bias":{"7":-100,"3":1.5}"#);
    assert_eq!(asked.logprobs, Some(2));
    assert_eq!(asked.sampling.logit_bias, [(3, 1.5), (7, -100.0)]);
}

#[test]
fn a_text_completion_takes_one_prompt_or_several() {
    let one = completion(r#"{"model":"m","prompt":"Es war"}"#).unwrap();
    let requests = one.generations(&tenant());
    assert_eq!(
        (requests.len(), requests[0].max_tokens),
        (1, Some(COMPLETION_TOKENS))
    );
    let several =
        completion(r#"{"model":"m","prompt":["a","b"],"n":2,"echo":true,"max_tokens":3}"#).unwrap();
    let requests = several.generations(&tenant());
    let prompts = requests.iter().map(|r| match &r.prompt {
        Prompt::Text(text) => text.expose().as_str(),
        Prompt::Chat { .. } => "a chat",
    });
    let prompts: Vec<_> = prompts.collect();
    assert_eq!(prompts, ["a", "a", "b", "b"]);
    assert!(requests.iter().all(|r| r.echo && r.max_tokens == Some(3)));
}

#[test]
fn what_is_wrong_with_a_text_completion_is_named() {
    let cases = [
        (r#"{"model":"m"}"#, "prompt"),
        (r#"{"model":"m","prompt":7}"#, "prompt"),
        (r#"{"model":"m","prompt":[1,2,3]}"#, "prompt"),
        (r#"{"model":"m","prompt":[]}"#, "prompt"),
        (r#"{"model":"m","prompt":["a","b","c"],"n":3}"#, "prompt"),
        (r#"{"model":"m","prompt":"a","logprobs":6}"#, "logprobs"),
        (
            r#"{"model":"m","prompt":"a","logprobs":1,"echo":true}"#,
            "logprobs",
        ),
        (r#"{"model":"m","prompt":"a","priority":true}"#, "priority"),
        (r#"{"model":"m","prompt":"a","timeout_ms":0}"#, "timeout_ms"),
        (r#"{"model":"m","prompt":"a","best_of":3}"#, "best_of"),
        (r#"{"model":"m","prompt":"a","suffix":"z"}"#, "suffix"),
        (
            r#"{"model":"m","prompt":"a","logit_bias":{"1":-1e9}}"#,
            "logit_bias",
        ),
        (
            r#"{"model":"m","prompt":"a","frequency_penalty":-3}"#,
            "frequency_penalty",
        ),
    ];
    for (body, param) in cases {
        let error = completion(body).expect_err(body);
        assert_eq!(
            (error.status().as_u16(), error.param()),
            (400, Some(param)),
            "{body}: {}",
            error.message()
        );
    }
}
