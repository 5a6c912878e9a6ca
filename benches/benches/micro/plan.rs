//! The scheduler's plan of one step, which every step waits for.

use coordinator::ids::TenantId;
use divan::Bencher;
use worker::client::Class;
use worker::scheduler::{Limits, Request, Scheduler, SequenceId};

const TENANTS: usize = 8;
const PROMPT: usize = 300;
/// Steps before the one that is measured: answers go on then beside prompts.
const STEPS_BEFORE: usize = 24;

/// A scheduler in the middle of its work, with so many requests of several tenants taken at once.
fn busy(requests: usize) -> Scheduler {
    let mut scheduler = Scheduler::new(Limits {
        // One tenant may take half of what is left: enough for all.
        max_waiting: 4 * requests,
        ..Limits::default()
    });
    for i in 0..requests {
        let tenant = TenantId::new(format!("town-{}", i % TENANTS)).expect("a tenant's id");
        // No two prompts begin alike, so that the cache holds none of another.
        let tokens = (0..PROMPT).map(|t| (i * PROMPT + t) as u32).collect();
        let request = Request {
            tenant,
            class: Class::Interactive,
            tokens,
            deadline_ms: None,
        };
        let queued = scheduler.submit(SequenceId(i as u64), request, 0);
        queued.expect("room in the queue");
    }
    for step in 0..STEPS_BEFORE {
        let planned = scheduler.plan(step as u64).expect("work to do");
        scheduler.done();
        for sample in planned.samples {
            scheduler.accept(sample.id, &[7]);
        }
    }
    scheduler
}

#[divan::bench(args = [8, 64, 512], sample_count = 50, sample_size = 1)]
fn plan_step(bencher: Bencher, requests: usize) {
    bencher
        .with_inputs(|| busy(requests))
        .bench_local_refs(|scheduler| scheduler.plan(STEPS_BEFORE as u64));
}
