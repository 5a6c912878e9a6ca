//! Answers that keep to a form: a JSON schema, any JSON object, a regular expression, calls of tools.
//!
//! Belongs here: what a request may ask for, its compilation into a grammar over the model's tokens, and the state of one
//! answer within it. Does not belong here: when a token is drawn (`engine`), and how a mask changes the draw (`model`).
//!
//! A constraint is compiled before the engine's thread hears of the request, on a thread of its own with a deadline. A
//! compiled grammar is kept for the tenant that sent it; each answer gets a copy that shares nothing with the others, so
//! that one answer that runs into a limit ends alone.

mod calls;
mod formats;
mod matcher;
mod schema;
mod vocabulary;

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use coordinator::clock::monotonic;
use coordinator::ids::TenantId;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{ParserFactory, regex_to_lark};
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use matcher::{Exceeded, Mask, Matcher};
pub use schema::{MAX_ALTERNATIVES, MAX_DEPTH, MAX_SCHEMA_BYTES, MAX_SCHEMAS};

use matcher::Watch;

use crate::client::{CallChoice, Constraint, Format, InferError};
use crate::text::{CallForm, Tokenizer};

/// Longest regular expression in bytes: some pages of it, and a tenth of a second to compile at most.
pub const MAX_PATTERN_BYTES: usize = 8 << 10;
/// Longest wait for a compilation. The largest schema allowed takes a tenth of it on one slow core.
const COMPILE_WITHIN: Duration = Duration::from_secs(10);
/// Compilations at once: a client with difficult schemas keeps no more cores than this from the ranks.
const MAX_COMPILING: usize = 2;
/// Longest wait for one's turn to compile.
const TURN_WITHIN: Duration = Duration::from_secs(5);
/// What a client that found no turn is told to wait.
const RETRY_AFTER_S: u32 = 2;
/// A chain of references is followed by recursion: [`MAX_SCHEMAS`] levels of it, at 12 KB a level.
const COMPILE_STACK_BYTES: usize = 96 << 20;
/// Grammars kept for the next request: a program asks with the same schema again and again.
const MAX_KEPT: usize = 64;

/// What one answer may cost; the engine's thread waits for each mask. llguidance states its own speeds: about 14 thousand
/// units of lexer fuel and 20 thousand items a millisecond.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        initial_lexer_fuel: 1_000_000,
        // 14 ms, as long as two steps of a small model.
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        // At 1 to 2 KB each: 40 MB for one answer.
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        // Seconds for a large vocabulary, which nobody waits for on a processor.
        precompute_large_lexemes: false,
        // Errors must not carry what the answer said so far.
        verbose_errors: false,
    }
}

/// Compiles constraints for one model's tokenizer.
pub struct Constrainer {
    tokenizer: Arc<Tokenizer>,
    factory: OnceLock<Result<Arc<ParserFactory>, String>>,
    /// Least recently used first.
    kept: Mutex<Vec<(Key, Arc<Mutex<llguidance::Matcher>>)>>,
    compiling: Arc<Turns>,
}

/// A tenant and all that its constraint is made from.
type Key = [u8; 32];

impl Constrainer {
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            tokenizer,
            factory: OnceLock::new(),
            kept: Mutex::default(),
            compiling: Arc::default(),
        }
    }

    /// Builds the tree of the vocabulary, if that was not done yet: some tenths of a second for 128 thousand tokens.
    pub fn warm(&self) {
        let _ = self.factory();
    }

    fn factory(&self) -> Result<&Arc<ParserFactory>, InferError> {
        let built = self.factory.get_or_init(|| {
            let started = monotonic();
            let factory = vocabulary::factory(&self.tokenizer, limits()).map(Arc::new);
            let tokens = self.tokenizer.vocab_size();
            match &factory {
                Ok(_) => {
                    let ms = started.elapsed().as_millis() as u64;
                    tracing::info!(tokens, ms, "the vocabulary is ready for structured output");
                }
                Err(why) => {
                    tracing::warn!(tokens, %why, "this vocabulary cannot be used for structured output");
                }
            }
            factory
        });
        built.as_ref().map_err(|why| InferError::Internal {
            why: format!("this model's vocabulary cannot be used for structured output: {why}"),
        })
    }

    /// The state of an answer that keeps to `constraint`; `None` if there is nothing to keep to. `tools` are those offered,
    /// as OpenAI's `tools`; `form` is how the model writes calls. Blocks for as long as compiling takes.
    ///
    /// # Errors
    /// [`InferError::Invalid`] names the parameter and what to change; [`InferError::Overloaded`] when too many compile.
    pub fn matcher(
        &self,
        tenant: &TenantId,
        constraint: &Constraint,
        tools: &[Value],
        form: CallForm,
    ) -> Result<Option<Matcher>, InferError> {
        let Some(plan) = Plan::new(constraint, tools, form, Care::All)? else {
            return Ok(None);
        };
        let factory = self.factory()?.clone();
        let key = plan.key(tenant);
        let compiled = match self.find(&key) {
            Some(compiled) => compiled,
            None => {
                let compile =
                    |plan: &Plan| self.compile(factory.clone(), plan.grammar.clone(), &plan.param);
                let compiled = match compile(&plan) {
                    Err(InferError::Invalid { .. }) if constraint.calls.is_some() => {
                        let strict = Plan::new(constraint, tools, form, Care::Strict)?;
                        strict.as_ref().map_or_else(|| compile(&plan), compile)
                    }
                    compiled => compiled,
                }?;
                let compiled = Arc::new(Mutex::new(compiled));
                self.keep(key, compiled.clone());
                compiled
            }
        };
        // A deep copy, because the lexer's states, which are limited, would otherwise be shared.
        let own = lock(&compiled).deep_clone();
        Ok(Some(Matcher::new(
            own,
            plan.watch,
            plan.param,
            self.tokenizer.clone(),
        )))
    }

    fn find(&self, key: &Key) -> Option<Arc<Mutex<llguidance::Matcher>>> {
        let mut kept = lock(&self.kept);
        let at = kept.iter().position(|(k, _)| k == key)?;
        let entry = kept.remove(at);
        let compiled = entry.1.clone();
        kept.push(entry);
        Some(compiled)
    }

    fn keep(&self, key: Key, compiled: Arc<Mutex<llguidance::Matcher>>) {
        let mut kept = lock(&self.kept);
        if kept.len() >= MAX_KEPT {
            kept.remove(0);
        }
        kept.push((key, compiled));
    }

    fn compile(
        &self,
        factory: Arc<ParserFactory>,
        grammar: TopLevelGrammar,
        param: &str,
    ) -> Result<llguidance::Matcher, InferError> {
        let Some(turn) = self.compiling.clone().take() else {
            return Err(InferError::Overloaded {
                retry_after_s: RETRY_AFTER_S,
            });
        };
        let (done, result) = sync_channel(1);
        let work = move || {
            let _turn = turn;
            let mut matcher = llguidance::Matcher::new(factory.create_parser(grammar));
            // What lets no first token through is found now and not by the engine.
            let begins = matcher.compute_mask();
            let _ = done.send(begins.map(|_| matcher).map_err(|e| e.to_string()));
        };
        std::thread::Builder::new()
            .name("constrain".into())
            .stack_size(COMPILE_STACK_BYTES)
            .spawn(work)
            .map_err(|e| InferError::Internal { why: e.to_string() })?;
        match result.recv_timeout(COMPILE_WITHIN) {
            Ok(Ok(matcher)) => Ok(matcher),
            Ok(Err(why)) => Err(InferError::invalid(param, explain(&why))),
            Err(RecvTimeoutError::Timeout) => Err(InferError::invalid(
                param,
                format!(
                    "took longer than {} s to prepare; use fewer alternatives, patterns and bounds",
                    COMPILE_WITHIN.as_secs()
                ),
            )),
            Err(RecvTimeoutError::Disconnected) => Err(InferError::invalid(
                param,
                "could not be prepared; make it simpler".into(),
            )),
        }
    }
}

impl std::fmt::Debug for Constrainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constrainer")
            .field("kept", &lock(&self.kept).len())
            .finish_non_exhaustive()
    }
}

/// Which tools' arguments keep to their schemas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Care {
    All,
    /// Those of `strict` functions; the others' may be any object, because some schema among them does not compile.
    Strict,
}

/// A constraint, checked and put into the grammar's language.
struct Plan {
    grammar: TopLevelGrammar,
    /// What a call to wait for begins with; without it the grammar holds from the first token.
    watch: Option<Watch>,
    /// The parameter that errors name.
    param: String,
}

impl Plan {
    fn new(
        constraint: &Constraint,
        tools: &[Value],
        form: CallForm,
        care: Care,
    ) -> Result<Option<Self>, InferError> {
        let mut grammars = Vec::new();
        let mut watch = None;
        let mut param = String::new();
        let calls = constraint.calls.as_ref().filter(|_| !tools.is_empty());
        let must = calls.is_some_and(|calls| calls.choice != CallChoice::Auto);
        // A form of the whole answer leaves no place for calls that nobody demands.
        if let Some(format) = constraint.format.as_ref().filter(|_| !must) {
            let (grammar, at) = self::format(format)?;
            param = at;
            grammars.push(grammar);
        } else if let Some(calls) = calls {
            watch = (!must).then(|| match form {
                CallForm::Bare => Watch::Beginnings(calls::beginnings(tools)),
                CallForm::Tagged => Watch::Tag,
            });
            param = "tools".into();
            grammars = calls::grammars(calls, tools, form, care)?;
        }
        if grammars.is_empty() {
            return Ok(None);
        }
        let grammar = TopLevelGrammar {
            grammars,
            max_tokens: None,
        };
        Ok(Some(Self {
            grammar,
            watch,
            param,
        }))
    }

    fn key(&self, tenant: &TenantId) -> Key {
        let mut hash = Sha256::new();
        let mut part = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        part(tenant.as_str().as_bytes());
        for grammar in &self.grammar.grammars {
            part(
                grammar
                    .lark_grammar
                    .as_deref()
                    .unwrap_or_default()
                    .as_bytes(),
            );
            let schema = grammar.json_schema.as_ref().map(Value::to_string);
            part(schema.unwrap_or_default().as_bytes());
        }
        hash.finalize().into()
    }
}

/// The grammar of a format and the parameter it came in.
fn format(format: &Format) -> Result<(llguidance::api::GrammarWithLexer, String), InferError> {
    use llguidance::api::GrammarWithLexer;
    match format {
        Format::JsonObject => {
            let object = serde_json::json!({"type": "object"});
            let object =
                schema::prepare_value(object).map_err(|why| InferError::Internal { why })?;
            Ok((
                GrammarWithLexer::from_json_schema(object),
                "response_format".into(),
            ))
        }
        Format::Schema { schema, param } => {
            let schema =
                schema::prepare(schema.expose()).map_err(|why| InferError::invalid(param, why))?;
            Ok((GrammarWithLexer::from_json_schema(schema), param.clone()))
        }
        Format::Regex { pattern, param } => {
            let pattern = pattern.expose();
            if pattern.is_empty() || pattern.len() > MAX_PATTERN_BYTES {
                let why = format!(
                    "must have 1 to {MAX_PATTERN_BYTES} bytes, got {}",
                    pattern.len()
                );
                return Err(InferError::invalid(param, why));
            }
            let lark = format!("start: /{}/", regex_to_lark(unanchored(pattern), ""));
            Ok((GrammarWithLexer::from_lark(lark), param.clone()))
        }
    }
}

/// The answer is the whole match anyway, and the grammar knows no anchors.
fn unanchored(pattern: &str) -> &str {
    let inner = pattern.strip_prefix('^').unwrap_or(pattern);
    match inner.strip_suffix('$') {
        Some(rest) if rest.bytes().rev().take_while(|&b| b == b'\\').count() % 2 == 0 => rest,
        _ => inner,
    }
}

/// What a compilation's error means for who wrote the schema.
fn explain(why: &str) -> String {
    let why = why.lines().next().unwrap_or_default();
    let has = |part: &str| why.contains(part);
    if why.starts_with("panic:") {
        "could not be prepared; make it simpler".into()
    } else if has("NoExtension") {
        "cannot be satisfied by any value".into()
    } else if has("Unsatisfiable") || has("unsatisfiable") {
        format!("cannot be satisfied by any value: {}", short(why))
    } else if has("oneOf constraints are not supported") {
        "has a oneOf whose alternatives may overlap; use anyOf, or give each a property with another const".into()
    } else if has("too large")
        || has("too complex")
        || has("fuel")
        || has("limit")
        || has("too many")
    {
        format!(
            "is too complex ({}); use fewer alternatives, patterns and bounds",
            short(why)
        )
    } else {
        format!("cannot be used: {}", short(why))
    }
}

/// Enough of an error to understand it.
fn short(text: &str) -> String {
    const MOST: usize = 200;
    let mut short: String = text.chars().take(MOST).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Who may compile now.
#[derive(Default)]
struct Turns {
    taken: Mutex<usize>,
    freed: Condvar,
}

struct Turn(Arc<Turns>);

impl Turns {
    fn take(self: Arc<Self>) -> Option<Turn> {
        let taken = lock(&self.taken);
        let (mut taken, waited) = self
            .freed
            .wait_timeout_while(taken, TURN_WITHIN, |taken| *taken >= MAX_COMPILING)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return None;
        }
        *taken += 1;
        drop(taken);
        Some(Turn(self))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *lock(&self.0.taken) -= 1;
        self.0.freed.notify_one();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
