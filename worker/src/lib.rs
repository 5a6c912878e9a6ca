//! What a model is: its file, its division over ranks, and the engine that runs it.
//!
//! Tour, from the disk up:
//! - [`file`]: GGUF files and safetensors folders, believed about nothing.
//! - [`plan`]: who holds which part of a model; pure.
//! - [`load`]: a rank packs its part, and touches nothing else.
//! - [`collective`]: how ranks add up and exchange: alone, over TCP, through shared memory.
//! - [`kv`]: which blocks of the KV cache belong to which sequence; pure.
//! - [`model`]: the forward pass of a llama on one rank, and the step that ranks take together.
//! - [`bench`]: the engine alone, measured.
//! - [`text`]: tokenizers, chat templates, text while it streams.
//! - [`scheduler`]: which sequences are in the next step; pure.
//! - [`constrain`]: answers that keep to a schema, a pattern or a tool's arguments.
//! - [`sampling`]: from logits to one token.
//! - [`speculation`]: guesses of the next tokens, as far as they pay; pure.
//! - [`engine`]: the leader's thread, from requests to steps to streams.
//! - [`embed`]: sentence embeddings.
//! - [`service`]: a node's part: it takes up the ranks that the control state assigns to it, and answers requests.
//! - [`client`]: asking the cluster's models, from any node.
//!
//! Invariants:
//! - All ranks take the same steps in the same order; only rank 0, the leader, decides what is in a step.
//! - Results do not depend on the number of ranks, bit for bit: sums across shards are exact (see [`collective`]).
//! - Nothing that a file, a peer or a client sends causes a panic; lengths and counts are checked before use.
//! - No prompt, answer or document text reaches a log.

pub mod bench;
pub mod client;
pub mod collective;
pub mod constrain;
pub mod embed;
pub mod engine;
pub mod file;
pub mod kv;
pub mod load;
pub mod model;
pub mod plan;
pub mod sampling;
pub mod scheduler;
pub mod service;
pub mod speculation;
pub mod text;
