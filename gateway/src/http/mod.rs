//! How requests come in and answers go out, whatever they are about: connections, bodies, keys, ids, headers, log.
//! Not here: what a route does.

pub mod auth;
pub mod body;
pub mod form;
pub mod layers;
pub mod pace;
pub mod patient;
pub mod server;
