//! Calls of tools in what a model writes: Llama 3's bare JSON (`{"name": …, "parameters": …}`) and the `<tool_call>` form of
//! ChatML models. Pure.

use coordinator::Redacted;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// What ChatML models write around a call.
const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
/// Most calls in one answer; a model that repeats itself makes no more.
const MAX_CALLS: usize = 16;

/// A call that the model wants made.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ToolCall {
    /// Place among the calls; in chunks of a stream only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    #[schema(example = "call_0190c0de0")]
    pub id: String,
    /// `function`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub function: FunctionCall,
}

/// The function and what it is called with.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct FunctionCall {
    pub name: String,
    /// A JSON object as text.
    #[schema(value_type = String)]
    pub arguments: Redacted<String>,
}

/// Whether an answer that begins with `text` may still turn out to be calls and nothing else.
pub fn may_be_calls(text: &str) -> bool {
    let text = text.trim_start();
    text.is_empty() || text.starts_with('{') || OPEN.starts_with(text) || text.starts_with(OPEN)
}

/// The calls that `text` consists of; `None` when it is anything else than calls of `offered` tools. `id` makes ids.
pub fn parse(text: &str, offered: &[String], id: &str) -> Option<Vec<ToolCall>> {
    let mut calls = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let inside = rest.strip_prefix(OPEN).unwrap_or(rest);
        // Reads one JSON value and tells where it ends.
        let mut values =
            serde_json::Deserializer::from_str(inside).into_iter::<Map<String, Value>>();
        let call = values.next()?.ok()?;
        let after = inside.get(values.byte_offset()..)?.trim_start();
        rest = after
            .strip_prefix(CLOSE)
            .unwrap_or(after)
            .trim_start_matches([';', ','])
            .trim_start();
        if calls.len() == MAX_CALLS {
            return None;
        }
        calls.push(read(call, offered, format!("call_{id}{}", calls.len()))?);
    }
    (!calls.is_empty()).then_some(calls)
}

fn read(mut call: Map<String, Value>, offered: &[String], id: String) -> Option<ToolCall> {
    let name = call.get("name")?.as_str()?.to_owned();
    if !offered.contains(&name) {
        return None;
    }
    let arguments = match call
        .remove("parameters")
        .or_else(|| call.remove("arguments"))
    {
        Some(Value::Object(arguments)) => Value::Object(arguments).to_string(),
        None | Some(Value::Null) => "{}".to_owned(),
        Some(_) => return None,
    };
    let function = FunctionCall {
        name,
        arguments: Redacted::new(arguments),
    };
    Some(ToolCall {
        index: None,
        id,
        kind: "function",
        function,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(text: &str) -> Option<Vec<(String, String)>> {
        let offered = ["wetter".to_owned(), "suche".to_owned()];
        let calls = parse(text, &offered, "x")?;
        Some(
            calls
                .into_iter()
                .map(|c| (c.function.name, c.function.arguments.into_inner()))
                .collect(),
        )
    }

    #[test]
    fn calls_are_read_in_the_forms_that_models_write() {
        let one = Some(vec![("wetter".to_owned(), r#"{"ort":"Ulm"}"#.to_owned())]);
        let two = Some(vec![
            ("wetter".to_owned(), r#"{"ort":"Ulm"}"#.to_owned()),
            ("suche".to_owned(), "{}".to_owned()),
        ]);
        let cases = [
            (r#"{"name": "wetter", "parameters": {"ort": "Ulm"}}"#, &one),
            (
                r#" {"type":"function","name":"wetter","arguments":{"ort":"Ulm"}} "#,
                &one,
            ),
            (
                "<tool_call>\n{\"name\": \"wetter\", \"arguments\": {\"ort\": \"Ulm\"}}\n</tool_call>",
                &one,
            ),
            (
                r#"{"name":"wetter","parameters":{"ort":"Ulm"}}; {"name":"suche"}"#,
                &two,
            ),
            (
                "<tool_call>{\"name\":\"wetter\",\"arguments\":{\"ort\":\"Ulm\"}}</tool_call>\n<tool_call>{\"name\":\"suche\",\"arguments\":null}</tool_call>",
                &two,
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(&calls(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_call_of_an_offered_tool_stays_text() {
        for text in [
            "",
            "Guten Tag",
            r#"{"name":"unbekannt","parameters":{}}"#,
            r#"{"ort":"Ulm"}"#,
            r#"{"name":"wetter","parameters":"Ulm"}"#,
            r#"{"name":"wetter","parameters":{"#,
            r#"{"name":"wetter"} Das war der Aufruf."#,
            r#"Ich rufe auf: {"name":"wetter"}"#,
        ] {
            assert_eq!(calls(text), None, "{text}");
        }
        assert_eq!(calls(&r#"{"name":"wetter"}"#.repeat(MAX_CALLS + 1)), None);
    }

    #[test]
    fn text_is_held_back_only_while_it_may_be_a_call() {
        for text in ["", " ", "{", "{\"name\"", "<", "<tool", "<tool_call>{"] {
            assert!(may_be_calls(text), "{text}");
        }
        for text in ["Guten", "<b>", "[{", "1 {"] {
            assert!(!may_be_calls(text), "{text}");
        }
    }
}
