//! From a request to tokens: everything that is done before the engine's thread hears of it.

use coordinator::Redacted;
use coordinator::ids::TenantId;
use rand::Rng;
use serde_json::{Map, Value};

use crate::client::{Class, GenerateRequest, InferError, Message, Prompt, Sampling};
use crate::constrain::{Constrainer, Matcher};
use crate::text::{self, CallForm, ChatInput, ChatTemplate, Tokenizer};

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
    /// What the answer keeps to.
    pub matcher: Option<Matcher>,
    /// The probabilities of each token with those of so many others.
    pub logprobs: Option<u8>,
    pub class: Class,
    /// Allowed from when the engine takes the request.
    pub timeout_ms: Option<u32>,
}

/// Checks a request, renders and tokenises its prompt, compiles what its answer must keep to. Takes about a second for the
/// longest prompt allowed, and the same for the largest schema.
///
/// # Errors
/// [`InferError::Invalid`] names the parameter; [`InferError::Internal`] when the model's own tokenizer or template fails.
pub fn prepare(
    request: &GenerateRequest,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    constrainer: &Constrainer,
    now_ms: u64,
) -> Result<Prepared, InferError> {
    request.validate()?;
    if let Some((token, _)) = request
        .sampling
        .logit_bias
        .iter()
        .find(|(token, _)| *token as usize >= tokenizer.vocab_size())
    {
        let why = format!(
            "must name tokens of the model, whose ids are below {}, got {token}",
            tokenizer.vocab_size()
        );
        return Err(InferError::invalid("logit_bias", why));
    }
    let mut offered = Vec::new();
    let tokens = match &request.prompt {
        Prompt::Text(text) => tokenizer.encode_prompt(text.expose()).map_err(internal)?,
        Prompt::Chat { messages, tools } => {
            let template = template.ok_or_else(|| {
                InferError::invalid("messages", text::Error::NoTemplate.to_string())
            })?;
            if let Some(tools) = tools {
                offered = json_list("tools", tools)?;
            }
            let input = chat_input(messages, &offered, now_ms)?;
            let rendered = render(template, tokenizer, input)?;
            tokenizer.encode_rendered(&rendered).map_err(internal)?
        }
    };
    let echo = match &request.prompt {
        Prompt::Text(text) if request.echo => Some(text.clone()),
        _ => None,
    };
    let matcher = match &request.constraint {
        None => None,
        Some(constraint) => {
            let form = template.map_or(CallForm::Bare, ChatTemplate::call_form);
            constrainer.matcher(&request.tenant, constraint, &offered, form)?
        }
    };
    Ok(Prepared {
        tenant: request.tenant.clone(),
        tokens,
        sampling: request.sampling.clone(),
        seed: rand::rng().random(),
        stop: request.stop.clone(),
        max_tokens: request.max_tokens,
        echo,
        matcher,
        logprobs: request.logprobs,
        class: request.priority,
        timeout_ms: request.timeout_ms,
    })
}

/// Renders a conversation. Templates that take one call a message, as Llama 3's, get a message for each call.
fn render(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    mut input: ChatInput,
) -> Result<text::Rendered, InferError> {
    let refused = |e: text::Error| InferError::invalid("messages", e.to_string());
    match template.render(tokenizer, &input) {
        Err(text::Error::Refused(_)) if input.messages.iter().any(|m| calls_of(m) > 1) => {
            input.messages = one_call_a_message(input.messages);
            template.render(tokenizer, &input).map_err(refused)
        }
        rendered => rendered.map_err(refused),
    }
}

fn calls_of(message: &Value) -> usize {
    message["tool_calls"].as_array().map_or(0, Vec::len)
}

/// Divides messages of several calls into one for each call, each followed by its result.
fn one_call_a_message(messages: Vec<Value>) -> Vec<Value> {
    let mut divided = Vec::with_capacity(messages.len());
    let mut rest = messages.into_iter().peekable();
    while let Some(mut message) = rest.next() {
        if calls_of(&message) < 2 {
            divided.push(message);
            continue;
        }
        let calls = match message.as_object_mut().and_then(|m| m.remove("tool_calls")) {
            Some(Value::Array(calls)) => calls,
            _ => Vec::new(),
        };
        let mut results = Vec::new();
        while let Some(result) = rest.next_if(|m| m["role"] == "tool") {
            results.push(result);
        }
        let mut content = message["content"].take();
        for call in calls {
            // Without ids the results come in the calls' order.
            let at = results
                .iter()
                .position(|r| r["tool_call_id"] == call["id"])
                .or((!results.is_empty()).then_some(0));
            let mut own = message.clone();
            own["tool_calls"] = Value::Array(vec![call]);
            // What was said stands before the first call.
            own["content"] = std::mem::replace(&mut content, Value::String(String::new()));
            divided.push(own);
            divided.extend(at.map(|at| results.remove(at)));
        }
        divided.extend(results);
    }
    divided
}

fn chat_input(messages: &[Message], tools: &[Value], now_ms: u64) -> Result<ChatInput, InferError> {
    let mut input = ChatInput {
        tools: (!tools.is_empty()).then(|| Value::Array(tools.to_vec())),
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
