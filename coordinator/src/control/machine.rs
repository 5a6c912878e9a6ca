//! The control state as a replicated state machine: decodes a committed proposal, applies the pure rules, keeps the
//! result, and shows it to this process.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::error;

use super::command::{Outcome, Rejection};
use super::state::ControlState;
use super::wire::{self, Proposal};
use crate::replication::{StateMachine, Txn, View};

const STATE_KEY: &[u8] = b"state";
const RECENT_KEY: &[u8] = b"recent";
/// Replies kept so that a retried proposal is applied once: far more than are under way at any moment.
const RECENT_REPLIES: usize = 256;

/// Group 0's state machine.
pub struct ControlMachine {
    published: watch::Sender<Arc<ControlState>>,
}

/// Proposals that were applied lately, with their replies, oldest first.
#[derive(Default, Serialize, Deserialize)]
struct Recent(VecDeque<([u8; 16], Vec<u8>)>);

impl ControlMachine {
    #[allow(clippy::new_without_default)]
    pub fn new() -> ControlMachine {
        ControlMachine {
            published: watch::Sender::new(Arc::new(ControlState::default())),
        }
    }

    /// The state as applied on this replica.
    pub fn states(&self) -> watch::Receiver<Arc<ControlState>> {
        self.published.subscribe()
    }

    /// Reads the state from a view of the replica.
    pub fn read(view: &View) -> Result<ControlState, String> {
        let stored = view.get(STATE_KEY).map_err(|e| e.to_string())?;
        stored.map_or(Ok(ControlState::default()), |bytes| wire::decode(&bytes))
    }

    fn publish(&self, view: &View) {
        match ControlMachine::read(view) {
            Ok(state) => {
                self.published.send_if_modified(|current| {
                    let changed = state.revision != current.revision;
                    if changed {
                        *current = Arc::new(state);
                    }
                    changed
                });
            }
            Err(why) => {
                error!(%why, "the stored control state is unreadable; was it written by a newer version?")
            }
        }
    }
}

impl StateMachine for ControlMachine {
    fn apply(&self, index: u64, command: &[u8], txn: &mut Txn<'_>) -> Vec<u8> {
        // Every replica reads the same bytes, so every replica takes the same way out.
        let Ok(proposal) = wire::decode::<Proposal>(command) else {
            error!(
                index,
                "a committed control command is unreadable; was it proposed by a newer version?"
            );
            return reply(&Err(Rejection::Invalid {
                what: "command".to_owned(),
                expected: "a command that all coordinators know".to_owned(),
                got: format!("{} unreadable bytes", command.len()),
            }));
        };
        let mut recent: Recent = stored(txn, RECENT_KEY);
        if let Some((_, reply)) = recent.0.iter().find(|(id, _)| *id == proposal.id) {
            return reply.clone();
        }
        let mut state: ControlState = stored(txn, STATE_KEY);
        let result = state.apply(proposal.command);
        let reply = reply(&result);
        if result.is_ok() {
            store(txn, STATE_KEY, &state);
        }
        recent.0.push_back((proposal.id, reply.clone()));
        while recent.0.len() > RECENT_REPLIES {
            recent.0.pop_front();
        }
        store(txn, RECENT_KEY, &recent);
        reply
    }

    fn applied(&self, _index: u64, _command: &[u8], view: &View) {
        self.publish(view);
    }

    fn reloaded(&self, view: &View) {
        self.publish(view);
    }
}

fn reply(result: &Result<Outcome, Rejection>) -> Vec<u8> {
    wire::encode(result).unwrap_or_default()
}

fn stored<T: Default + serde::de::DeserializeOwned>(txn: &mut Txn<'_>, key: &[u8]) -> T {
    let Some(bytes) = txn.get(key) else {
        return T::default();
    };
    wire::decode(&bytes).unwrap_or_else(|why| {
        // Going on from an empty state would forget the cluster; the process stops before it acknowledges anything.
        error!(%why, "the stored control state is unreadable; start the version that wrote it");
        std::process::abort()
    })
}

fn store<T: Serialize>(txn: &mut Txn<'_>, key: &[u8], value: &T) {
    if let Ok(bytes) = wire::encode(value) {
        txn.put(key, &bytes);
    }
}
