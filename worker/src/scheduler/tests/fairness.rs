//! The paper's Theorem 4.4 over random schedules: the service that two tenants with work waiting get, divided by their
//! weights, differs over any time by at most twice max(w_p·L_input, w_q·M).

use std::collections::BTreeMap;

use super::random::Random;
use super::*;
use crate::scheduler::fair::{ANSWER_COST, PROMPT_COST};

/// What the test knows of a sequence.
struct Asked {
    tenant: usize,
    prompt: usize,
    /// Most positions that were ever computed or found.
    seen: usize,
    goal: usize,
}

/// A tenant's habits in one schedule.
struct Habit {
    weight: u32,
    class: Class,
    prompt: (usize, usize),
    answer: (usize, usize),
    /// Always has something waiting; else asks once in a while.
    backlogged: bool,
}

struct Schedule {
    random: Random,
    scheduler: Scheduler,
    habits: Vec<Habit>,
    asked: BTreeMap<SequenceId, Asked>,
    waiting: Vec<usize>,
    /// Cost of what each tenant got.
    service: Vec<u64>,
    next: u64,
}

impl Schedule {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let step_rows = random.within(4, 48);
        let limits = Limits {
            max_sequences: random.within(1, 8),
            max_waiting: 10_000,
            step_rows,
            mixed_rows: random.within(1, step_rows),
            context_tokens: random.within(20, 200),
            blocks: random.within(3, 24),
            ..Limits::default()
        };
        let scheduler = Scheduler::new(limits);
        let most = scheduler.capacity_tokens() - 1;
        let habits = (0..random.within(2, 4))
            .map(|number| {
                let (prompt, answer) = (random.within(1, most), random.within(1, most));
                Habit {
                    weight: random.within(1, 3) as u32,
                    class: if random.once_in(6) {
                        Class::Background
                    } else {
                        Class::Interactive
                    },
                    prompt: (random.within(1, prompt), prompt),
                    answer: (random.within(1, answer), answer),
                    backlogged: number < 2,
                }
            })
            .collect::<Vec<_>>();
        let tenants = habits.len();
        let mut schedule = Self {
            random,
            scheduler,
            habits,
            asked: BTreeMap::new(),
            waiting: vec![0; tenants],
            service: vec![0; tenants],
            next: 0,
        };
        for (number, habit) in schedule.habits.iter().enumerate() {
            schedule
                .scheduler
                .set_weight(&tenant(number as u8), habit.weight);
        }
        schedule
    }

    fn ask(&mut self, number: usize) {
        let habit = &self.habits[number];
        let prompt = self.random.within(habit.prompt.0, habit.prompt.1);
        let answer = self.random.within(habit.answer.0, habit.answer.1);
        self.next += 1;
        let id = SequenceId(self.next);
        // One beginning in four is that of earlier prompts of the tenant.
        let name = if self.random.once_in(4) {
            0
        } else {
            id.0 as u32
        };
        let request = Request {
            tenant: tenant(number as u8),
            class: habit.class,
            tokens: (0..prompt as u32).map(|t| name * 1000 + t).collect(),
            deadline_ms: None,
        };
        self.scheduler.submit(id, request, 0).unwrap();
        let goal = (prompt + answer).min(self.scheduler.capacity_tokens());
        let asked = Asked {
            tenant: number,
            prompt,
            seen: 0,
            goal,
        };
        self.asked.insert(id, asked);
    }

    fn ask_all(&mut self) {
        self.waiting.fill(0);
        for (id, asked) in &self.asked {
            if !self.scheduler.running.contains(id) {
                self.waiting[asked.tenant] += 1;
            }
        }
        for number in 0..self.habits.len() {
            if self.habits[number].backlogged {
                // More than can be admitted in one step, so that some always wait.
                while self.waiting[number] <= self.scheduler.limits.max_sequences {
                    self.ask(number);
                    self.waiting[number] += 1;
                }
            } else if self.waiting[number] < 10 && self.random.once_in(8) {
                (0..self.random.within(1, 4)).for_each(|_| self.ask(number));
            }
        }
        if self.random.once_in(20) {
            let which = self.random.below(self.asked.len());
            if let Some(&id) = self.asked.keys().nth(which) {
                self.scheduler.remove(id);
                self.asked.remove(&id);
            }
        }
    }

    fn step(&mut self) {
        self.ask_all();
        let offers: Vec<SequenceId> = self.scheduler.decoding().collect();
        for id in offers {
            let drafts = vec![5; self.random.below(4)];
            self.scheduler.draft(id, &drafts);
        }
        let step = self
            .scheduler
            .plan(0)
            .expect("there is always something to do");
        self.scheduler.done();
        for (span, id) in step.batch.spans.iter().zip(&step.owners) {
            let asked = self.asked.get_mut(id).unwrap();
            // What was found is no service, and what is computed again was served before.
            let from = span.context.max(asked.seen);
            let to = (span.context + span.rows).min(asked.prompt);
            self.service[asked.tenant] += PROMPT_COST * to.saturating_sub(from) as u64;
            asked.seen = asked.seen.max(to);
        }
        for sample in &step.samples {
            let (asked, len) = (
                &self.asked[&sample.id],
                self.scheduler.length(sample.id).unwrap(),
            );
            let right = self.random.within(0, sample.drafts.len());
            let tokens: Vec<u32> = sample.drafts[..right].iter().copied().chain([5]).collect();
            self.service[asked.tenant] += ANSWER_COST * tokens.len() as u64;
            self.scheduler.accept(sample.id, &tokens).unwrap();
            if len + tokens.len() >= asked.goal {
                self.scheduler.remove(sample.id);
                self.asked.remove(&sample.id);
            }
        }
    }

    /// Runs the schedule; the largest gap between the first two tenants over any time in it, as a part of the bound.
    fn gap(mut self, steps: usize) -> f64 {
        let limits = self.scheduler.limits;
        let bound = crate::scheduler::bound(
            self.scheduler.capacity_tokens(),
            limits.blocks * BLOCK_TOKENS,
        ) as f64;
        let weight = |habit: &Habit| {
            let class = if habit.class == Class::Interactive {
                16.0
            } else {
                1.0
            };
            class * f64::from(habit.weight)
        };
        let weights = [weight(&self.habits[0]), weight(&self.habits[1])];
        let bound = 2.0 * bound / weights[0].min(weights[1]);
        let (mut least, mut most) = (0.0f64, 0.0f64);
        for _ in 0..steps {
            self.step();
            let ahead = self.service[0] as f64 / weights[0] - self.service[1] as f64 / weights[1];
            (least, most) = (least.min(ahead), most.max(ahead));
        }
        (most - least) / bound
    }
}

/// Runs schedules of these seeds; the largest gap, as a part of the bound, and its seed.
fn worst(seeds: std::ops::Range<u64>) -> (f64, u64) {
    let mut worst = (0.0, 0);
    for seed in seeds {
        // Most gaps open early; a few long ones to see whether they go on to open.
        let steps = if seed.is_multiple_of(64) { 2000 } else { 60 };
        let gap = Schedule::new(seed).gap(steps);
        if gap > worst.0 {
            worst = (gap, seed);
        }
        // Counters round to parts of a token.
        assert!(gap <= 1.0 + 1e-6, "seed {seed}: {gap} of the bound");
    }
    worst
}

#[test]
fn the_service_of_two_backlogged_tenants_stays_within_the_proven_bound() {
    let (gap, seed) = worst(0..3000);
    println!("at most {gap:.3} of the bound, in schedule {seed}");
}

#[test]
#[ignore = "a million schedules take minutes"]
fn the_bound_holds_over_a_million_schedules() {
    let (gap, seed) = worst(0..1_000_000);
    println!("at most {gap:.3} of the bound, in schedule {seed}");
}
