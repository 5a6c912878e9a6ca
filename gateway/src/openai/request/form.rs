//! What a request wants the answer to keep to: `response_format`, `tools`, `tool_choice`, `logit_bias`. What needs the model's
//! vocabulary or a compilation is judged by the worker.

use coordinator::Redacted;
use serde_json::{Map, Value};
use worker::client::{
    CallChoice, Calls, Format, MAX_LOGIT_BIAS, MAX_LOGIT_BIASES, MAX_TOP_LOGPROBS,
};

use super::MAX_TOOLS;
use crate::error::ApiError;

/// Longest name of a function, as at OpenAI.
const MAX_NAME_BYTES: usize = 64;

/// The tools to offer and how they may be called.
#[derive(Debug, Default)]
pub(super) struct Tools {
    pub offered: Vec<Value>,
    pub names: Vec<String>,
    pub calls: Option<Calls>,
}

/// `response_format`; `None` for plain text.
pub(super) fn response_format(format: Option<&Value>) -> Result<Option<Format>, ApiError> {
    const KINDS: &str = "\"text\", \"json_object\", \"json_schema\" or \"regex\"";
    let Some(format) = format.filter(|format| !format.is_null()) else {
        return Ok(None);
    };
    let kind = format.get("type").and_then(Value::as_str);
    match kind {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Format::JsonObject)),
        Some("json_schema") => {
            let param = "response_format.json_schema.schema";
            let schema = format.pointer("/json_schema/schema");
            let Some(schema) = schema.filter(|s| s.is_object() || s.is_boolean()) else {
                let message = format!(
                    "{param}: expected a JSON schema; send {{\"type\":\"json_schema\",\"json_schema\":{{\"name\":…,\"schema\":…}}}}"
                );
                return Err(ApiError::invalid(param, message));
            };
            Ok(Some(Format::Schema {
                schema: Redacted::new(schema.to_string()),
                param: param.into(),
            }))
        }
        Some("regex") => {
            let param = "response_format.pattern";
            let Some(pattern) = format.get("pattern").and_then(Value::as_str) else {
                let message = format!(
                    "{param}: expected a regular expression; send {{\"type\":\"regex\",\"pattern\":…}}"
                );
                return Err(ApiError::invalid(param, message));
            };
            Ok(Some(Format::Regex {
                pattern: Redacted::new(pattern.to_owned()),
                param: param.into(),
            }))
        }
        Some(other) => {
            let got: String = other.chars().take(40).collect();
            Err(ApiError::unsupported(
                "response_format.type",
                format!("response_format.type: expected {KINDS}, got {got:?}"),
            ))
        }
        None => Err(ApiError::invalid(
            "response_format",
            format!("response_format: expected an object whose type is {KINDS}"),
        )),
    }
}

/// `tools`, `tool_choice` and `parallel_tool_calls`: no tool is offered when the choice is `none`.
pub(super) fn tools(
    tools: Option<Vec<Value>>,
    choice: Option<&Value>,
    parallel: Option<bool>,
) -> Result<Tools, ApiError> {
    let offered = tools.unwrap_or_default();
    if offered.len() > MAX_TOOLS {
        let message = format!("tools: expected at most {MAX_TOOLS}, got {}", offered.len());
        return Err(ApiError::invalid("tools", message));
    }
    let mut names = Vec::with_capacity(offered.len());
    for (i, tool) in offered.iter().enumerate() {
        names.push(tool_name(tool, i)?);
    }
    let choice = match choice {
        None | Some(Value::Null) => CallChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "auto" => CallChoice::Auto,
            "required" => CallChoice::Required,
            "none" => return Ok(Tools::default()),
            _ => return Err(bad_choice()),
        },
        Some(choice) => match choice.pointer("/function/name").and_then(Value::as_str) {
            Some(name) => CallChoice::Named(name.to_owned()),
            None => return Err(bad_choice()),
        },
    };
    match &choice {
        CallChoice::Required if offered.is_empty() => {
            return Err(ApiError::invalid(
                "tool_choice",
                "tool_choice: \"required\" needs `tools`, got none",
            ));
        }
        CallChoice::Named(name) if !names.contains(name) => {
            let got: String = name.chars().take(MAX_NAME_BYTES).collect();
            let message = format!(
                "tool_choice: expected the name of one of `tools`, got {got:?}; they are: {}",
                names.join(", ")
            );
            return Err(ApiError::invalid("tool_choice", message));
        }
        _ => {}
    }
    let calls = (!offered.is_empty()).then(|| Calls {
        choice,
        parallel: parallel.unwrap_or(true),
    });
    Ok(Tools {
        offered,
        names,
        calls,
    })
}

fn bad_choice() -> ApiError {
    ApiError::invalid(
        "tool_choice",
        "tool_choice: expected \"auto\", \"none\", \"required\" or {\"type\":\"function\",\"function\":{\"name\":…}}",
    )
}

fn tool_name(tool: &Value, i: usize) -> Result<String, ApiError> {
    let name = tool.pointer("/function/name").and_then(Value::as_str);
    let Some(name) = name else {
        let param = format!("tools[{i}]");
        let message = format!(
            "{param}: expected {{\"type\":\"function\",\"function\":{{\"name\",\"parameters\"}}}}"
        );
        return Err(ApiError::invalid(param, message));
    };
    let letter = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(letter) {
        let param = format!("tools[{i}].function.name");
        let message = format!(
            "{param}: expected 1 to {MAX_NAME_BYTES} of a-z, A-Z, 0-9, underscore, hyphen and dot"
        );
        return Err(ApiError::invalid(param, message));
    }
    let parameters = tool.pointer("/function/parameters");
    if parameters.is_some_and(|p| !p.is_object() && !p.is_null()) {
        let param = format!("tools[{i}].function.parameters");
        let message = format!("{param}: expected a JSON schema of an object");
        return Err(ApiError::invalid(param, message));
    }
    Ok(name.to_owned())
}

/// `logit_bias`: token ids as strings, biases from -100 to 100.
pub(super) fn logit_bias(bias: Option<&Value>) -> Result<Vec<(u32, f32)>, ApiError> {
    let wrong = |what: String| {
        Err(ApiError::invalid(
            "logit_bias",
            format!("logit_bias: {what}"),
        ))
    };
    let none = Map::new();
    let bias = match bias {
        None | Some(Value::Null) => &none,
        Some(Value::Object(bias)) => bias,
        Some(_) => return wrong("expected an object of token ids and biases".into()),
    };
    if bias.len() > MAX_LOGIT_BIASES {
        return wrong(format!(
            "expected at most {MAX_LOGIT_BIASES} tokens, got {}",
            bias.len()
        ));
    }
    let mut biases: Vec<(u32, f32)> = Vec::with_capacity(bias.len());
    for (token, value) in bias {
        let Ok(id) = token.parse() else {
            let got: String = token.chars().take(40).collect();
            return wrong(format!(
                "expected token ids (whole numbers as strings), got {got:?}"
            ));
        };
        let value = value.as_f64().map(|value| value as f32);
        match value {
            Some(value) if (-MAX_LOGIT_BIAS..=MAX_LOGIT_BIAS).contains(&value) => {
                biases.push((id, value));
            }
            Some(value) => {
                return wrong(format!(
                    "expected biases from -{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}, got {value} for token {id}"
                ));
            }
            None => return wrong(format!("expected a number for token {id}")),
        }
    }
    // "7" and "07" are the same token.
    biases.sort_by_key(|&(id, _)| id);
    if biases.windows(2).any(|two| two[0].0 == two[1].0) {
        return wrong("expected each token once".into());
    }
    Ok(biases)
}

/// A chat's `logprobs` and `top_logprobs`.
pub(super) fn logprobs(wanted: Option<bool>, top: Option<u32>) -> Result<Option<u8>, ApiError> {
    match (wanted.unwrap_or(false), top) {
        (false, None) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid(
            "top_logprobs",
            "top_logprobs: expected only together with logprobs=true",
        )),
        (true, top) => {
            let top = top.unwrap_or(0);
            match u8::try_from(top) {
                Ok(top) if top <= MAX_TOP_LOGPROBS => Ok(Some(top)),
                _ => Err(ApiError::invalid(
                    "top_logprobs",
                    format!("top_logprobs: expected 0 to {MAX_TOP_LOGPROBS}, got {top}"),
                )),
            }
        }
    }
}
