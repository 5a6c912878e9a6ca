//! Whatever happens around a sequence, its tokens are those that it gives alone: random schedules of joining, cancelling,
//! giving way, chunk sizes, drafts and found prefixes, on the small random Llama.

use std::collections::BTreeMap;

use super::*;
use crate::sampling::Sampler;
use crate::scheduler::{Request, Scheduler};

/// Longest answer that is compared.
const ANSWER: usize = 40;

/// A generator of its own, so that a seed names a schedule.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    fn within(&mut self, from: usize, to: usize) -> usize {
        from + self.below(to - from + 1)
    }
}

/// A request, and what it gives alone.
struct Known {
    prompt: Vec<u32>,
    sampling: Sampling,
    seed: u64,
    answer: Vec<u32>,
}

impl Known {
    fn sampler(&self) -> Sampler {
        Sampler::new(&self.sampling, self.seed, &self.prompt)
    }
}

fn scheduler(limits: Limits, ranks: &RankModel<Cpu>) -> Scheduler {
    Scheduler::new(Limits {
        context_tokens: ranks.plan().context_tokens,
        ..limits
    })
}

fn submit(s: &mut Scheduler, id: u64, tenant: &str, tokens: Vec<u32>) {
    let request = Request {
        tenant: TenantId::new(tenant).unwrap(),
        class: if id.is_multiple_of(5) {
            Class::Background
        } else {
            Class::Interactive
        },
        tokens,
        deadline_ms: None,
    };
    s.submit(SequenceId(id), request, 0).unwrap();
}

/// Requests of which many begin alike, and their answers, each computed alone: whole prompt in one step, then token by token.
fn known(ranks: &mut RankModel<Cpu>) -> Vec<Known> {
    let mut random = Random(9);
    let mut known = Vec::new();
    for number in 0..24 {
        let length = random.within(1, 75);
        let base = number % 3;
        let mut prompt: Vec<u32> = (0..length)
            .map(|i| (5 + (i * 37 + base * 101) % 300) as u32)
            .collect();
        if random.below(2) == 0 {
            *prompt.last_mut().unwrap() = 5 + number as u32;
        }
        let sampling = match number % 4 {
            0 | 1 => Sampling::greedy(),
            2 => Sampling {
                temperature: 1.0,
                ..Sampling::default()
            },
            _ => Sampling {
                temperature: 1.3,
                top_p: 0.9,
                frequency_penalty: 0.5,
                ..Sampling::default()
            },
        };
        let mut one = Known {
            prompt,
            sampling,
            seed: number as u64,
            answer: Vec::new(),
        };
        let limits = Limits {
            step_rows: 128,
            blocks: 8,
            ..Limits::default()
        };
        let (mut s, mut sampler) = (scheduler(limits, ranks), one.sampler());
        submit(&mut s, 1, "alone", one.prompt.clone());
        while one.answer.len() < ANSWER {
            let step = s.plan(0).unwrap();
            assert!(step.batch.positions[0] == 0 || step.batch.tokens.len() == 1);
            let candidates = ranks.step(&step.batch).unwrap().unwrap();
            let position = one.prompt.len() + one.answer.len();
            let token = sampler.sample(position as u64, &candidates[0].top).unwrap();
            sampler.accept(token);
            s.accept(SequenceId(1), &[token]);
            one.answer.push(token);
        }
        known.push(one);
    }
    known
}

/// What happened in a schedule, to see that the schedules are worth their name.
#[derive(Default)]
struct Seen {
    preemptions: u64,
    cached: usize,
    drafts_right: usize,
    drafts_wrong: usize,
    cancelled: usize,
    finished: usize,
}

struct Running<'a> {
    known: &'a Known,
    sampler: Sampler,
    answer: Vec<u32>,
    goal: usize,
}

fn play(ranks: &mut RankModel<Cpu>, known: &[Known], seed: u64, seen: &mut Seen) {
    let mut random = Random(seed);
    let step_rows = random.within(4, 64);
    let limits = Limits {
        max_sequences: random.within(1, 6),
        max_waiting: 100,
        step_rows,
        mixed_rows: random.within(1, step_rows),
        // The longest sequence needs eight.
        blocks: random.within(8, 20),
        ..Limits::default()
    };
    let mut s = scheduler(limits, ranks);
    let mut running: BTreeMap<SequenceId, Running> = BTreeMap::new();
    let (mut next, mut left) = (0, random.within(3, 10));
    let drafts = random.below(5);
    while left > 0 || !running.is_empty() {
        while left > 0 && (running.is_empty() || random.below(4) == 0) {
            (next, left) = (next + 1, left - 1);
            let known = &known[random.below(known.len())];
            submit(
                &mut s,
                next,
                ["one", "two"][random.below(2)],
                known.prompt.clone(),
            );
            let (sampler, answer) = (known.sampler(), Vec::new());
            let goal = random.within(1, ANSWER);
            running.insert(
                SequenceId(next),
                Running {
                    known,
                    sampler,
                    answer,
                    goal,
                },
            );
        }
        if random.below(25) == 0
            && let Some((&id, _)) = running.iter().nth(random.below(running.len().max(1)))
        {
            s.remove(id);
            running.remove(&id);
            seen.cancelled += 1;
            continue;
        }
        let decoding: Vec<SequenceId> = s.decoding().collect();
        for id in decoding {
            let one = &running[&id];
            let rest = &one.known.answer[one.answer.len()..];
            let guess = |&token: &u32| {
                if random.below(4) == 0 {
                    (token + 1) % 300
                } else {
                    token
                }
            };
            let guesses: Vec<u32> = rest.iter().take(drafts).map(guess).collect();
            s.draft(id, &guesses);
        }
        let step = s
            .plan(0)
            .unwrap_or_else(|| panic!("seed {seed}: no step and work left"));
        seen.cached += step.admitted.iter().map(|a| a.cached_tokens).sum::<usize>();
        let candidates = ranks.step(&step.batch).unwrap().unwrap();
        s.done();
        let mut rows = candidates.iter();
        for sample in &step.samples {
            let one = running.get_mut(&sample.id).unwrap();
            let mut taken = Vec::new();
            let mut on = true;
            for (i, row) in rows.by_ref().take(sample.rows()).enumerate() {
                if !on {
                    continue;
                }
                let position = one.known.prompt.len() + one.answer.len();
                let token = one.sampler.sample(position as u64, &row.top).unwrap();
                one.sampler.accept(token);
                one.answer.push(token);
                taken.push(token);
                let right = sample.drafts.get(i) == Some(&token);
                on = right && one.answer.len() < one.goal;
                seen.drafts_right += usize::from(right);
                seen.drafts_wrong += usize::from(!right && i < sample.drafts.len());
            }
            assert_eq!(
                one.answer,
                one.known.answer[..one.answer.len()],
                "schedule {seed}, sequence {:?}",
                sample.id
            );
            if one.answer.len() >= one.goal {
                s.remove(sample.id);
                running.remove(&sample.id);
                seen.finished += 1;
            } else {
                s.accept(sample.id, &taken);
            }
        }
    }
    assert_eq!(s.used_blocks(), 0, "schedule {seed} lost blocks");
    seen.preemptions += s.preemptions();
}

fn play_all(format: KvFormat, seeds: std::ops::Range<u64>) {
    let mut ranks = tiny_llama_in(format);
    let known = known(&mut ranks);
    let mut seen = Seen::default();
    for seed in seeds {
        play(&mut ranks, &known, seed, &mut seen);
    }
    let Seen {
        preemptions,
        cached,
        drafts_right,
        drafts_wrong,
        cancelled,
        finished,
    } = seen;
    println!(
        "{finished} finished, {cancelled} cancelled, {preemptions} gave way, {cached} tokens found, {drafts_right} drafts right and {drafts_wrong} wrong"
    );
    for happened in [
        preemptions as usize,
        cached,
        drafts_right,
        drafts_wrong,
        cancelled,
        finished,
    ] {
        assert!(happened > 50, "the schedules try too little");
    }
}

#[test]
fn any_schedule_gives_each_sequence_the_tokens_that_it_gives_alone() {
    play_all(KvFormat::F16, 0..100);
}

#[test]
fn so_it_does_with_keys_and_values_in_int8() {
    play_all(KvFormat::Int8, 0..100);
}

#[test]
#[ignore = "a thousand schedules on a real model take a while"]
fn a_thousand_schedules_give_each_sequence_the_tokens_that_it_gives_alone() {
    for format in KvFormat::ALL {
        play_all(format, 0..1000);
    }
}
