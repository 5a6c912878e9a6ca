//! The API that programs know: models, chat, completions, embeddings in OpenAI's form.
//!
//! [`request`] turns bodies into generations, [`answer`] turns events into choices and chunks ([`body`], [`logprobs`]),
//! [`tools`] finds calls in text; all pure.
//! [`generate`] runs generations and [`sse`] writes streams. Not here: what is ours alone (room `api`), except `collections`
//! and `citations` of a chat, which room `sources` prepares.

pub mod answer;
pub mod body;
pub mod chat;
pub mod completions;
pub mod embeddings;
pub mod generate;
pub mod logprobs;
pub mod models;
pub mod request;
pub mod sse;
pub mod tools;
