//! Calls of tools as a model writes them, as a grammar.

use coordinator::Redacted;
use llguidance::api::GrammarWithLexer;
use serde_json::{Value, json};

use super::{Care, schema};
use crate::client::{CallChoice, Calls, InferError};
use crate::text::CallForm;

/// Most calls in one answer; a model that repeats itself makes no more.
const MAX_CALLS: usize = 16;
/// What ChatML models write before a call.
pub(super) const OPEN: &str = "<tool_call>";

/// The grammar `calls` and those that it refers to.
pub(super) fn grammars(
    calls: &Calls,
    tools: &[Value],
    form: CallForm,
    care: Care,
) -> Result<Vec<GrammarWithLexer>, InferError> {
    let mut grammars = Vec::new();
    let mut heads = Vec::new();
    let mut alternatives = Vec::new();
    for (i, tool) in tools.iter().enumerate() {
        let Some(name) = tool.pointer("/function/name").and_then(Value::as_str) else {
            continue;
        };
        if let CallChoice::Named(wanted) = &calls.choice
            && wanted != name
        {
            continue;
        }
        let arguments = arguments(tool, i, care)?;
        grammars.push(GrammarWithLexer {
            name: Some(format!("arguments{i}")),
            ..GrammarWithLexer::from_json_schema(arguments)
        });
        heads.push(format!("HEAD{i}: /{}/", head(name, form)));
        alternatives.push(format!("HEAD{i} @arguments{i} TAIL"));
    }
    if alternatives.is_empty() {
        let why = match &calls.choice {
            CallChoice::Named(name) => {
                format!("names the function {name:?}, which `tools` does not hold")
            }
            _ => "needs `tools`".into(),
        };
        return Err(InferError::invalid("tool_choice", why));
    }
    let more = if calls.parallel {
        format!(
            " (BETWEEN call){{0,{}}}\nBETWEEN: {}",
            MAX_CALLS - 1,
            between(form)
        )
    } else {
        String::new()
    };
    let (before, tail) = match form {
        // What stands before: white space, or what shares a token with the opening tag.
        CallForm::Bare => (r"/[ \n]{1,8}/", r"/\s?\}/"),
        CallForm::Tagged => (r"/[^<]{1,255}/", r"/\s?\}\s{0,2}<\/tool_call>/"),
    };
    let lark = format!(
        "start: BEFORE? call{more}\ncall: {}\n{}\nBEFORE: {before}\nTAIL: {tail}\n",
        alternatives.join(" | "),
        heads.join("\n"),
    );
    grammars.insert(
        0,
        GrammarWithLexer {
            name: Some("calls".into()),
            ..GrammarWithLexer::from_lark(lark)
        },
    );
    Ok(grammars)
}

/// What stands between two calls; never nothing, which the grammar would have to guess.
fn between(form: CallForm) -> &'static str {
    match form {
        CallForm::Bare => r"/\s?;\s?/",
        CallForm::Tagged => r"/\s{1,2}/",
    }
}

/// The beginnings of bare calls of these tools, without white space.
pub(super) fn beginnings(tools: &[Value]) -> Vec<String> {
    let names = tools
        .iter()
        .filter_map(|tool| tool.pointer("/function/name")?.as_str());
    names
        .flat_map(|name| {
            [
                format!(r#"{{"name":"{name}""#),
                format!(r#"{{"type":"function","name":"{name}""#),
            ]
        })
        .collect()
}

/// The schema of a tool's arguments. A schema that cannot be kept to is an error for a `strict` function only; of others
/// any object is taken, as other servers do.
fn arguments(tool: &Value, i: usize, care: Care) -> Result<Value, InferError> {
    let any = || schema::prepare_value(json!({"type": "object"}));
    let strict = tool.pointer("/function/strict") == Some(&Value::Bool(true));
    let prepared = match tool.pointer("/function/parameters") {
        None | Some(Value::Null) => any(),
        Some(_) if !strict && care == Care::Strict => any(),
        Some(parameters) => {
            let text = Redacted::new(parameters.to_string());
            match schema::prepare(text.expose()) {
                Ok(Value::Object(mut map)) if !map.contains_key("type") => {
                    map.insert("type".into(), json!("object"));
                    Ok(Value::Object(map))
                }
                Err(_) if !strict => any(),
                prepared => prepared,
            }
        }
    };
    prepared.map_err(|why| InferError::invalid(&format!("tools[{i}].function.parameters"), why))
}

/// A pattern of a call up to its arguments, with the white space that models put there.
fn head(name: &str, form: CallForm) -> String {
    let name = literal(name);
    match form {
        CallForm::Bare => format!(
            r#"\{{\s?("type"\s?:\s?"function"\s?,\s?)?"name"\s?:\s?"{name}"\s?,\s?"(parameters|arguments)"\s?:\s?"#
        ),
        CallForm::Tagged => format!(
            r#"<tool_call>\s{{0,2}}\{{\s?"name"\s?:\s?"{name}"\s?,\s?"(arguments|parameters)"\s?:\s?"#
        ),
    }
}

/// A text as a pattern that matches just it.
fn literal(text: &str) -> String {
    let mut pattern = String::new();
    for c in text.chars() {
        if c.is_ascii_alphanumeric() || c == '_' {
            pattern.push(c);
        } else {
            pattern.push_str(&format!("\\x{{{:x}}}", u32::from(c)));
        }
    }
    pattern
}
