//! One tenant floods: what the other notices, on simulated time.
//!
//! A step costs a base for reading the weights, something a row, and something for each position that a row looks back at.
//! Base and row are those of docs/benchmarks.md; the positions' cost is counted in operations (4 · layers · heads · head_dim) at the
//! speed of the rows' products, and taken at least twice, because attention is slower than these.

use std::collections::BTreeMap;

use super::random::Random;
use super::*;

/// Cost of steps, in milliseconds.
#[derive(Clone, Copy)]
struct Cost {
    base: f64,
    row: f64,
    /// Of a thousand positions looked back at by one row.
    context: f64,
}

/// SmolLM2 135M Q4_1 on two cores with AVX2: 621 rows a second in prefill, 130 steps of one row a second.
const SMALL: Cost = Cost {
    base: 6.1,
    row: 1.6,
    context: 0.8,
};
/// A 1B of Q4_K there: 103 rows a second, 18.5 steps of one row a second.
const ONE_B: Cost = Cost {
    base: 44.0,
    row: 9.7,
    context: 2.0,
};

impl Cost {
    fn twice(self) -> Self {
        let Self { base, row, context } = self;
        Self {
            base: 2.0 * base,
            row: 2.0 * row,
            context: 2.0 * context,
        }
    }

    fn of(&self, step: &Planned) -> f64 {
        let looked_at: usize = step
            .batch
            .spans
            .iter()
            .map(|s| s.rows * (s.context + s.rows / 2))
            .sum();
        self.base
            + self.row * step.batch.tokens.len() as f64
            + self.context * looked_at as f64 / 1000.0
    }
}

#[derive(Clone, Copy)]
struct Arrival {
    at_ms: f64,
    tenant: u8,
    prompt: usize,
    answer: usize,
}

/// Requests of a tenant that come by chance, one in `mean_ms`: questions with passages and without, in the mix of a portal.
fn arrivals(tenant: u8, mean_ms: f64, until_ms: f64, seed: u64) -> Vec<Arrival> {
    let mut random = Random(seed);
    let mut at_ms = 0.0;
    let mut arrivals = Vec::new();
    loop {
        at_ms += random.exponential(mean_ms);
        if at_ms > until_ms {
            return arrivals;
        }
        let prompt = match random.below(10) {
            0..2 => random.within(60, 300),
            2..8 => random.within(600, 1600),
            _ => random.within(1600, 2600),
        };
        let answer = random.within(20, 300);
        arrivals.push(Arrival {
            at_ms,
            tenant,
            prompt,
            answer,
        });
    }
}

#[derive(Default)]
struct Outcome {
    /// From arrival to first token, of tenant 1.
    first_ms: Vec<f64>,
    refused: usize,
    /// Of all tenants.
    tokens_per_s: f64,
    answers: usize,
}

impl Outcome {
    fn percentile(&self, p: f64) -> f64 {
        let mut sorted = self.first_ms.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[((sorted.len() - 1) as f64 * p).round() as usize]
    }
}

/// Plays the arrivals; `as_one` has everybody be the same tenant, which makes the queue first-come-first-served.
fn play(
    cost: Cost,
    limits: Limits,
    mut arrivals: Vec<Arrival>,
    until_ms: f64,
    as_one: bool,
) -> Outcome {
    arrivals.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
    let mut s = Scheduler::new(limits);
    let mut alive: BTreeMap<SequenceId, (Arrival, bool)> = BTreeMap::new();
    let mut outcome = Outcome::default();
    let (mut now, mut coming, mut tokens) = (0.0, arrivals.iter().peekable(), 0usize);
    let mut id = 0;
    while now < until_ms {
        while let Some(&&arrival) = coming.peek().filter(|a| a.at_ms <= now) {
            coming.next();
            id += 1;
            let request = Request {
                tenant: tenant(if as_one { 0 } else { arrival.tenant }),
                class: Class::Interactive,
                tokens: (0..arrival.prompt as u32)
                    .map(|t| id as u32 * 4096 + t)
                    .collect(),
                deadline_ms: None,
            };
            match s.submit(SequenceId(id), request, now as u64) {
                Ok(()) => drop(alive.insert(SequenceId(id), (arrival, false))),
                Err(_) if arrival.tenant == 1 => outcome.refused += 1,
                Err(_) => {}
            }
        }
        let Some(step) = s.plan(now as u64) else {
            match coming.peek() {
                Some(next) => now = next.at_ms,
                None => break,
            }
            continue;
        };
        now += cost.of(&step);
        tokens += step.prompt_rows;
        s.done();
        for sample in &step.samples {
            let (arrival, started) = alive.get_mut(&sample.id).unwrap();
            if !std::mem::replace(started, true) && arrival.tenant == 1 {
                outcome.first_ms.push(now - arrival.at_ms);
            }
            tokens += 1;
            if s.accept(sample.id, &[9]).unwrap() >= arrival.prompt + arrival.answer {
                s.remove(sample.id);
                alive.remove(&sample.id);
                outcome.answers += 1;
            }
        }
    }
    outcome.tokens_per_s = tokens as f64 / now * 1000.0;
    outcome
}

/// Makes a flooding tenant's request of an ordinary one.
type Flood = fn(Arrival) -> Arrival;

/// What a flood does.
struct Compared {
    /// The p99 of the quiet tenant's first tokens as a multiple of that alone.
    alone: f64,
    /// The same as a multiple of that alone on a machine half as fast: its share.
    half: f64,
    /// Throughput as a part of that in order of arrival.
    throughput: f64,
}

/// The quiet tenant asks `samples` times, once in `quiet_every` of the times that a request takes; the other floods.
fn compare(name: &str, cost: Cost, quiet_every: f64, samples: f64, flood: Flood) -> Compared {
    let limits = Limits {
        max_sequences: 32,
        max_waiting: 512,
        context_tokens: 4096,
        blocks: 32 * 1500 / BLOCK_TOKENS,
        ..Limits::default()
    };
    // A request takes about 1200 rows. A tenant's share is half of the machine; one asks for fifty times that.
    let service_ms = 1200.0 * cost.row;
    let until_ms = samples * quiet_every * service_ms;
    let quiet = arrivals(1, quiet_every * service_ms, until_ms, 1);
    let flooding = arrivals(2, 2.0 * service_ms / 50.0, until_ms, 2);
    let both: Vec<Arrival> = quiet
        .iter()
        .copied()
        .chain(flooding.into_iter().map(flood))
        .collect();
    let half = play(cost.twice(), limits, quiet.clone(), until_ms, false);
    let alone = play(cost, limits, quiet, until_ms, false);
    let beside = play(cost, limits, both.clone(), until_ms, false);
    let in_order = play(cost, limits, both, until_ms, true);
    let p99 = |outcome: &Outcome| outcome.percentile(0.99);
    let compared = Compared {
        alone: p99(&beside) / p99(&alone),
        half: p99(&beside) / p99(&half),
        throughput: beside.tokens_per_s / in_order.tokens_per_s,
    };
    println!(
        "{name}, one in {quiet_every}: first token p50 {:.0} → {:.0} ms, p99 {:.0} → {:.0} ms ({:.3}; of half a machine's {:.3}) of {}; throughput {:.1} of {:.1} tokens/s ({:.3})",
        alone.percentile(0.5),
        beside.percentile(0.5),
        p99(&alone),
        p99(&beside),
        compared.alone,
        compared.half,
        beside.first_ms.len(),
        beside.tokens_per_s,
        in_order.tokens_per_s,
        compared.throughput,
    );
    assert_eq!(
        beside.refused, 0,
        "there is always a place for the quiet one"
    );
    compared
}

fn alike(arrival: Arrival) -> Arrival {
    arrival
}

fn longest(arrival: Arrival) -> Arrival {
    Arrival {
        prompt: 4000,
        ..arrival
    }
}

fn prompts_only(arrival: Arrival) -> Arrival {
    Arrival {
        answer: 1,
        ..arrival
    }
}

fn long_answers(arrival: Arrival) -> Arrival {
    Arrival {
        prompt: 100,
        answer: 1500,
        ..arrival
    }
}

#[test]
fn a_flood_is_hardly_noticed_by_the_other_and_costs_little_throughput() {
    let seen = compare("small", SMALL, 10.0, 150.0, alike);
    assert!(
        seen.alone <= 1.2,
        "p99 of the first token is {} times that of being alone",
        seen.alone
    );
    assert!(
        seen.throughput >= 0.95,
        "{} of first-come-first-served",
        seen.throughput
    );
}

/// Who asks once in six requests' time exceeds his share for seconds, by his own bursts; beside a flood these last longer, and no
/// longer than on a machine that is his share. With longer pauses nothing is noticed.
#[test]
#[ignore = "hours of simulated time take minutes"]
fn floods_of_every_kind_beside_every_load() {
    let kinds: [(&str, Flood); 4] = [
        ("alike", alike),
        ("longest", longest),
        ("prompts", prompts_only),
        ("answers", long_answers),
    ];
    for (name, cost) in [("small", SMALL), ("1B", ONE_B)] {
        for quiet_every in [40.0, 10.0, 6.0] {
            for (kind, flood) in kinds {
                let name = format!("{name}, {kind}");
                let seen = compare(&name, cost, quiet_every, 300.0, flood);
                assert!(quiet_every < 10.0 || seen.alone <= 1.2);
                assert!(seen.half <= 1.0 && seen.throughput >= 0.95);
            }
        }
    }
}
