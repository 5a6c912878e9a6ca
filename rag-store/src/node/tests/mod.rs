//! The store as a whole, on three nodes: [`cluster`] starts them, [`journeys`] uses them, [`failures`] breaks them.

mod cluster;
mod failures;
mod journeys;

use bytes::Bytes;

use super::*;
