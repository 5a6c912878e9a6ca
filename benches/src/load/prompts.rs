//! What is asked: prompts of a wanted length, and mixes of lengths as a municipality's users have them.

use rand::Rng;
use rand::seq::IndexedRandom;

/// Words that are one token each, with the blank before them, in the vocabularies of Llama 3, GPT-2 and SmolLM2.
const WORDS: [&str; 96] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
    "car",
    "city",
    "community",
    "name",
    "president",
    "team",
    "minute",
    "idea",
    "body",
    "information",
    "back",
    "parent",
    "face",
    "others",
    "level",
    "office",
    "door",
    "health",
    "person",
    "art",
    "war",
    "history",
    "party",
    "result",
    "change",
    "morning",
    "reason",
    "research",
    "girl",
    "guy",
    "moment",
    "air",
];
/// Longest prompt that is drawn, in tokens; no mix here needs more.
const MAX_PROMPT: usize = 65_536;

/// Lengths that spread as a logarithmic normal distribution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lengths {
    pub median: f64,
    /// Standard deviation of the logarithm; 0 gives always the median.
    pub spread: f64,
}

impl Lengths {
    fn draw(self, random: &mut impl Rng) -> usize {
        // Box and Muller, one of the pair.
        let (u, v): (f64, f64) = (1.0 - random.random::<f64>(), random.random());
        let normal = (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos();
        let length = self.median * (self.spread * normal).exp();
        (length.round() as usize).clamp(1, MAX_PROMPT)
    }
}

/// One kind of question.
#[derive(Debug, Clone, PartialEq)]
pub struct Kind {
    pub name: &'static str,
    /// How many of all questions are of this kind, in any unit.
    pub weight: f64,
    /// Tokens that all questions of this kind begin with: instructions, or the same documents.
    pub shared: usize,
    /// Tokens that are new in each.
    pub prompt: Lengths,
    pub answer: Lengths,
}

/// Questions of several kinds.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    kinds: Vec<Kind>,
    total_weight: f64,
}

impl Mix {
    /// A mix of kinds, at least one of positive weight.
    pub fn new(kinds: Vec<Kind>) -> Self {
        let total_weight = kinds.iter().map(|k| k.weight).sum();
        Mix {
            kinds,
            total_weight,
        }
    }

    /// All prompts and all answers of one length.
    pub fn fixed(prompt: usize, answer: usize) -> Self {
        let always = |tokens: usize| Lengths {
            median: tokens as f64,
            spread: 0.0,
        };
        Mix::new(vec![Kind {
            name: "fixed",
            weight: 1.0,
            shared: 0,
            prompt: always(prompt),
            answer: always(answer),
        }])
    }

    /// Short chat, answers from documents with some thousand tokens of passages, and whole case files.
    pub fn town_hall() -> Self {
        let kind = |name, weight, shared, prompt: (f64, f64), answer: (f64, f64)| Kind {
            name,
            weight,
            shared,
            prompt: Lengths {
                median: prompt.0,
                spread: prompt.1,
            },
            answer: Lengths {
                median: answer.0,
                spread: answer.1,
            },
        };
        Mix::new(vec![
            kind("chat", 0.6, 64, (60.0, 0.8), (150.0, 0.6)),
            kind("documents", 0.3, 200, (2_000.0, 0.4), (200.0, 0.5)),
            kind("case file", 0.1, 200, (8_000.0, 0.4), (300.0, 0.4)),
        ])
    }

    /// The same mix with all lengths multiplied: for machines and models that are slower than the mix was made for.
    pub fn scaled(mut self, factor: f64) -> Self {
        for kind in &mut self.kinds {
            kind.shared = (kind.shared as f64 * factor).round() as usize;
            kind.prompt.median *= factor;
            kind.answer.median *= factor;
        }
        self
    }

    /// A prompt and the wanted tokens of its answer.
    pub fn draw(&self, random: &mut impl Rng) -> (String, usize) {
        let mut left = random.random::<f64>() * self.total_weight;
        let kind = self
            .kinds
            .iter()
            .find(|kind| {
                left -= kind.weight;
                left < 0.0
            })
            .or(self.kinds.last());
        let Some(kind) = kind else {
            return (String::new(), 1);
        };
        let mut prompt = shared_text(kind.shared);
        let tokens = kind.prompt.draw(random);
        words(random, tokens, &mut prompt);
        (prompt, kind.answer.draw(random))
    }
}

/// A prompt of `tokens` words, one token each in common vocabularies.
pub fn prompt(random: &mut impl Rng, tokens: usize) -> String {
    let mut text = String::new();
    words(random, tokens, &mut text);
    text
}

fn words(random: &mut impl Rng, count: usize, text: &mut String) {
    for _ in 0..count {
        text.push(' ');
        text.push_str(WORDS.choose(random).unwrap_or(&WORDS[0]));
    }
}

/// The same words in every call: a step through the list that meets all of it.
fn shared_text(tokens: usize) -> String {
    (0..tokens).fold(String::new(), |mut text, i| {
        text.push(' ');
        text.push_str(WORDS[i * 35 % WORDS.len()]);
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn a_fixed_mix_has_its_lengths() {
        let mut random = StdRng::seed_from_u64(1);
        for _ in 0..20 {
            let (prompt, answer) = Mix::fixed(132, 64).draw(&mut random);
            assert_eq!(prompt.split_whitespace().count(), 132);
            assert_eq!(answer, 64);
        }
    }

    #[test]
    fn the_town_halls_mix_has_its_medians_and_shares() {
        let mut random = StdRng::seed_from_u64(2);
        let mut lengths: Vec<usize> = (0..4000)
            .map(|_| {
                Mix::town_hall()
                    .scaled(0.1)
                    .draw(&mut random)
                    .0
                    .split(' ')
                    .count()
                    - 1
            })
            .collect();
        lengths.sort_unstable();
        let share = |most| lengths.iter().filter(|&&l| l <= most).count() as f64 / 4000.0;
        // Chat is about 6 + 6 tokens long at a tenth, documents 20 + 200, files 20 + 800.
        assert!((0.55..0.65).contains(&share(60)), "{}", share(60));
        assert!((0.86..0.93).contains(&share(480)), "{}", share(480));
    }

    #[test]
    fn questions_of_a_kind_begin_alike() {
        let mut random = StdRng::seed_from_u64(3);
        let mix = Mix::new(vec![Kind {
            name: "documents",
            weight: 1.0,
            shared: 50,
            prompt: Lengths {
                median: 10.0,
                spread: 0.0,
            },
            answer: Lengths {
                median: 5.0,
                spread: 0.0,
            },
        }]);
        let (a, b) = (mix.draw(&mut random).0, mix.draw(&mut random).0);
        let common = a.split(' ').zip(b.split(' ')).take_while(|(a, b)| a == b);
        assert!((51..56).contains(&common.count()));
        assert_ne!(a, b);
    }
}
