//! What the benchmark programs in `bin/` are made of. Nothing here is part of a running cluster.
//!
//! - [`shapes`]: model files of random weights in the shapes of real models.
//! - [`load`]: a load generator for any server with OpenAI's interface.
//! - [`server`]: starting and ending the servers that are loaded.
//! - [`report`]: what `make bench` measures, and how it is written down.
//! - [`pair`]: two engines side by side, for small differences.
//! - [`plot`]: how figures are drawn.

pub mod load;
pub mod pair;
pub mod plot;
pub mod report;
pub mod server;
pub mod shapes;
