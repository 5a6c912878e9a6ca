//! From a request to tokens: everything that is done before the engine's thread hears of it.

use coordinator::Redacted;
use coordinator::ids::TenantId;
use rand::Rng;
use serde_json::{Map, Value};

use crate::client::{GenerateRequest, InferError, Message, Prompt, Sampling};
use crate::text::{self, ChatInput, ChatTemplate, Tokenizer};

/// A request with its prompt in tokens.
#[derive(Debug)]
pub struct Prepared {
    pub tenant: TenantId,
    pub tokens: Vec<u32>,
    pub sampling: Sampling,
    /// Used when the request names none.
    pub seed: u64,
    pub stop: Vec<String>,
    pub max_tokens: Option<u32>,
    /// The prompt's text, if it is to be sent first.
    pub echo: Option<Redacted<String>>,
}

/// Checks a request, renders and tokenises its prompt. Takes about a second for the longest prompt allowed.
///
/// # Errors
/// [`InferError::Invalid`] names the parameter; [`InferError::Internal`] when the model's own tokenizer or template fails.
pub fn prepare(
    request: &GenerateRequest,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    now_ms: u64,
) -> Result<Prepared, InferError> {
    request.validate()?;
    let tokens = match &request.prompt {
        Prompt::Text(text) => tokenizer.encode_prompt(text.expose()).map_err(internal)?,
        Prompt::Chat { messages, tools } => {
            let template = template.ok_or_else(|| {
                InferError::invalid("messages", text::Error::NoTemplate.to_string())
            })?;
            let input = chat_input(messages, tools.as_ref(), now_ms)?;
            let rendered = template
                .render(tokenizer, &input)
                .map_err(|e| InferError::invalid("messages", e.to_string()))?;
            tokenizer.encode_rendered(&rendered).map_err(internal)?
        }
    };
    let echo = match &request.prompt {
        Prompt::Text(text) if request.echo => Some(text.clone()),
        _ => None,
    };
    Ok(Prepared {
        tenant: request.tenant.clone(),
        tokens,
        sampling: request.sampling.clone(),
        seed: rand::rng().random(),
        stop: request.stop.clone(),
        max_tokens: request.max_tokens,
        echo,
    })
}

fn chat_input(
    messages: &[Message],
    tools: Option<&Redacted<String>>,
    now_ms: u64,
) -> Result<ChatInput, InferError> {
    let tools = tools
        .map(|text| json_list("tools", text))
        .transpose()?
        .filter(|list| !list.is_empty());
    let mut input = ChatInput {
        tools: tools.map(Value::Array),
        add_generation_prompt: true,
        now_ms,
        messages: Vec::new(),
    };
    for message in messages {
        let mut object = Map::new();
        object.insert("role".into(), message.role.as_str().into());
        object.insert("content".into(), message.content.expose().as_str().into());
        if let Some(name) = &message.name {
            object.insert("name".into(), name.as_str().into());
        }
        if let Some(id) = &message.tool_call_id {
            object.insert("tool_call_id".into(), id.as_str().into());
        }
        if let Some(calls) = &message.tool_calls {
            let calls = json_list("messages.tool_calls", calls)?;
            // Templates ask whether the key is there, so an empty list must not be.
            if !calls.is_empty() {
                object.insert("tool_calls".into(), Value::Array(calls));
            }
        }
        input.messages.push(Value::Object(object));
    }
    Ok(input)
}

fn json_list(param: &str, text: &Redacted<String>) -> Result<Vec<Value>, InferError> {
    match serde_json::from_str(text.expose()) {
        Ok(Value::Array(list)) => Ok(list),
        Ok(_) => Err(InferError::invalid(param, "must be a JSON array".into())),
        Err(e) => Err(InferError::invalid(
            param,
            format!("must be a JSON array; line {} is not JSON", e.line()),
        )),
    }
}

fn internal(error: text::Error) -> InferError {
    InferError::Internal {
        why: error.to_string(),
    }
}
