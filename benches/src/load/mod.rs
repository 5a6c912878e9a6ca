//! A load generator for any server with OpenAI's HTTP interface.
//!
//! Belongs here: who asks what and when ([`plan`], [`prompts`]), asking it ([`client`], [`run`]), and what came of it
//! ([`summary`], [`picture`]). Does not belong here: starting servers ([`crate::server`]), and what a scenario proves
//! ([`crate::report`]).
//!
//! An open loop sends each request at a time that was drawn before the run and counts its latency from that time, whether
//! or not the generator or the server was late: a stalled server cannot slow down its own test (coordinated omission).
//! A closed loop keeps a number of clients busy, each asking again as soon as it was answered.

pub mod client;
pub mod picture;
pub mod plan;
pub mod prompts;
pub mod run;
pub mod summary;

pub use client::{Endpoint, Target};
pub use plan::{Arrivals, Bounds, Plan, TenantPlan};
pub use run::{Outcome, Record, run};
pub use summary::{Percentiles, Summary, TenantSummary};
