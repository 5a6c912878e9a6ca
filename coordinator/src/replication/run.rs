//! The runs of a replica: each from opening the store to the end, or to a failure, after which the next begins from
//! what is on disk.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, PoisonError};

use super::Error;
use super::apply::Applier;
use super::core::{Core, Event, Exit};
use super::directory::Directory;
use super::replica::Shared;
use super::store::Store;
use crate::clock::{Duration, monotonic};

/// A full disk is looked at again after this time.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// The Raft thread's main function.
pub(super) fn supervise(
    shared: &Arc<Shared>,
    directory: &Arc<Directory>,
    store: Arc<Store>,
    events: &Receiver<Event>,
) {
    let _runtime = shared.runtime.enter();
    let mut store = store;
    for run in 0.. {
        set_store(shared, Ok(store.clone()));
        let exit = run_once(shared, store, events, run);
        let error = match exit {
            Exit::Stopped => Error::Closed,
            Exit::Failed(error) => error,
        };
        set_store(shared, Err(error.clone()));
        shared.pending.fail_all(&error);
        shared.publish_failure(&error);
        if error == Error::Closed {
            return;
        }
        tracing::error!(group = %shared.config.group, %error, "the replica stands aside");
        match open_again(shared, directory, events, &error) {
            Some(opened) => store = opened,
            None => return set_store(shared, Err(Error::Closed)),
        }
        tracing::info!(group = %shared.config.group, "the replica works again");
    }
}

fn set_store(shared: &Shared, store: Result<Arc<Store>, Error>) {
    *shared.store.write().unwrap_or_else(PoisonError::into_inner) = store;
}

fn run_once(shared: &Arc<Shared>, store: Arc<Store>, events: &Receiver<Event>, run: u64) -> Exit {
    let applier = Arc::new(Applier::new(
        store.clone(),
        shared.machine.clone(),
        shared.pending.clone(),
        shared.applied.clone(),
    ));
    let apply = std::thread::Builder::new()
        .name(format!("apply-{}", shared.config.group))
        .spawn({
            let (shared, applier) = (shared.clone(), applier.clone());
            move || {
                let _runtime = shared.runtime.enter();
                let work = || applier.run(&|index| shared.tell(Event::Applied(index)));
                if let Err(error) = caught("the state machine", work) {
                    shared.tell(Event::Broken(error));
                }
            }
        });
    let exit = match &apply {
        Ok(_) => caught("the consensus core", || {
            Ok(Core::new(shared, store, applier.clone(), run)?.run(events))
        })
        .unwrap_or_else(Exit::Failed),
        Err(error) => Exit::Failed(Error::Storage {
            why: format!("no thread could be started: {error}"),
        }),
    };
    applier.stop();
    if let Ok(apply) = apply {
        // Its panics were caught and told above.
        let _ = apply.join();
    }
    exit
}

/// A panic ends the run like a failed write: the next one begins from what is on disk.
fn caught<T>(who: &str, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Error::Storage {
            why: format!("{who} broke off: {}", text.unwrap_or("unknown panic")),
        })
    })
}

/// Opens the store again, as soon as it can be written; `None` when the replica is to stop. Nobody is left waiting.
fn open_again(
    shared: &Shared,
    directory: &Arc<Directory>,
    events: &Receiver<Event>,
    error: &Error,
) -> Option<Arc<Store>> {
    let mut next = monotonic() + TRY_AGAIN;
    loop {
        match events.recv_timeout(next.saturating_duration_since(monotonic())) {
            Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return None,
            Ok(event) => turn_away(shared, event, error),
            Err(RecvTimeoutError::Timeout) => {
                let opened = Store::open(directory.clone(), shared.config.bootstrap.as_deref())
                    .and_then(|store| store.probe().map(|()| store));
                match opened {
                    Ok(store) => return Some(Arc::new(store)),
                    Err(error) => {
                        tracing::debug!(group = %shared.config.group, %error, "the store cannot be opened yet");
                        shared.publish_failure(&error);
                        set_store(shared, Err(error));
                    }
                }
                next = monotonic() + TRY_AGAIN;
            }
        }
    }
}

fn turn_away(shared: &Shared, event: Event, error: &Error) {
    match event {
        Event::Message { bytes, .. } => {
            shared.inbox_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        Event::Propose { reply, .. } => drop(reply.send(Err(error.clone()))),
        Event::Change { reply, .. } => drop(reply.send(Err(error.clone()))),
        Event::ForgetLog { reply, .. } => drop(reply.send(Err(error.clone()))),
        Event::Progress(reply) => drop(reply.send(Err(error.clone()))),
        // Whoever reads hears it from the store.
        _ => {}
    }
}
