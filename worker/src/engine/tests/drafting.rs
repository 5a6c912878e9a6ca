//! Drafts change how many steps an answer takes, and nothing else.

use std::collections::BTreeMap;

use super::*;

/// Knows the answer of each prompt, and spoils what it says by a rule.
struct Fake {
    answers: Vec<(Vec<u32>, Vec<u32>)>,
    sequences: BTreeMap<SequenceId, (usize, usize)>,
    /// The draft for (position in the answer, place in the draft), given the right token.
    spoil: fn(usize, usize, u32) -> u32,
    counts: Sender<(usize, usize)>,
}

impl Drafter for Fake {
    fn begin(&mut self, id: SequenceId, prompt: &[u32]) {
        let known = self.answers.iter().position(|(p, _)| p == prompt);
        self.sequences.insert(id, (known.unwrap(), 0));
    }

    fn draft(&mut self, decoding: &[SequenceId]) -> Vec<(SequenceId, Vec<u32>)> {
        let one = |&id: &SequenceId| {
            let (which, at) = self.sequences[&id];
            let rest = &self.answers[which].1[at..];
            let spoiled = rest
                .iter()
                .enumerate()
                .map(|(i, &t)| (self.spoil)(at, i, t));
            (id, spoiled.take(5).collect())
        };
        decoding.iter().map(one).collect()
    }

    fn took(&mut self, id: SequenceId, tokens: &[u32], drafts: &[u32]) {
        assert_eq!(tokens[..tokens.len() - 1], drafts[..tokens.len() - 1]);
        self.sequences.get_mut(&id).unwrap().1 += tokens.len();
        let _ = self.counts.send((tokens.len(), drafts.len()));
    }

    fn stepped(&mut self, rows: usize, seconds: f64) {
        assert!(rows > 0 && seconds >= 0.0);
    }

    fn end(&mut self, id: SequenceId) {
        assert!(self.sequences.remove(&id).is_some(), "ended twice");
    }
}

fn requests() -> Vec<Prepared> {
    let sampled = Sampling {
        temperature: 1.2,
        top_p: 0.9,
        frequency_penalty: 0.3,
        ..Sampling::default()
    };
    (0..6u32)
        .map(|i| Prepared {
            sampling: if i % 2 == 0 {
                Sampling::greedy()
            } else {
                sampled.clone()
            },
            seed: u64::from(i),
            max_tokens: Some(30),
            // Drafts that a form does not allow are as wrong as others.
            matcher: (i % 3 == 0).then(|| {
                let endless = Tokenizer::from_vocabulary(&vocabulary(false)).unwrap();
                constrained::matching("([a-e][f-z]){20}", Arc::new(endless))
            }),
            ..prepared((0..3 + 7 * i).map(|t| 5 + (t * 11 + i) % 250).collect())
        })
        .collect()
}

/// The answers to all requests at once, with `drafter` if there is one.
fn answers(drafter: Option<Fake>) -> Vec<Vec<u32>> {
    let ranks = tiny_llama();
    let limits = Limits {
        // Few enough that sequences are preempted while they draft.
        blocks: 14,
        step_rows: 24,
        ..limits()
    };
    let config = EngineConfig {
        model: "drafting".into(),
        limits,
    };
    let endless = Arc::new(Tokenizer::from_vocabulary(&vocabulary(false)).unwrap());
    let (engine, runner) = Engine::new(ranks, endless, None, config);
    let runner = match drafter {
        Some(fake) => runner.with_drafter(Box::new(fake)),
        None => runner,
    };
    let thread = std::thread::spawn(|| runner.run());
    let streams: Vec<Stream> = requests()
        .into_iter()
        .map(|r| engine.submit(r).unwrap())
        .collect();
    let answers = streams.into_iter().map(|s| read(s).tokens).collect();
    drop(engine);
    thread.join().unwrap();
    answers
}

#[test]
fn drafts_right_wrong_or_random_give_the_tokens_of_plain_decoding() {
    let plain = answers(None);
    assert!(plain.iter().all(|a| a.len() == 30));
    let right: fn(usize, usize, u32) -> u32 = |_, _, t| t;
    let wrong: fn(usize, usize, u32) -> u32 = |_, _, t| t ^ 1;
    let random: fn(usize, usize, u32) -> u32 =
        |at, i, t| t ^ u32::from((at * 7 + i * 13).is_multiple_of(5));
    let mut steps = Vec::new();
    for spoil in [right, wrong, random] {
        let (counts, counted) = channel();
        let known = requests().into_iter().map(|r| r.tokens);
        let fake = Fake {
            answers: known.zip(plain.iter().cloned()).collect(),
            sequences: BTreeMap::new(),
            spoil,
            counts,
        };
        assert_eq!(answers(Some(fake)), plain);
        let counts: Vec<(usize, usize)> = counted.try_iter().collect();
        assert!(
            counts.iter().any(|&(_, drafts)| drafts > 0),
            "no draft was taken up"
        );
        steps.push(counts.len());
    }
    let [right, wrong, random] = steps[..] else {
        unreachable!()
    };
    assert!(right < random && random < wrong, "{right} {random} {wrong}");
}
