//! What followed the last time: the continuation of the longest earlier match of a sequence's end. Pure.

/// Most tokens of one guess.
pub const MAX_DRAFTS: usize = 12;
/// Longer matches say no more than one of this length.
pub const LONGEST_MATCH: usize = 16;
/// Earlier places that are compared; a bound on the work for text that repeats one phrase without end.
const PLACES: usize = 32;

/// How a sequence may go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guess {
    /// At least one, at most [`MAX_DRAFTS`].
    pub tokens: Vec<u32>,
    /// Tokens before it that stand before its model too, at most [`LONGEST_MATCH`].
    pub matched: usize,
}

/// One sequence's own tokens, prompt and answer, with an index; nobody else's enter it. About 28 bytes a token.
#[derive(Debug, Clone, Default)]
pub struct History {
    tokens: Vec<u32>,
    triples: Chains<3>,
    pairs: Chains<2>,
}

impl History {
    /// The index is made at the first guess: a sequence that waits costs its tokens only.
    pub fn new(prompt: &[u32]) -> Self {
        Self {
            tokens: prompt.to_vec(),
            ..Self::default()
        }
    }

    /// The sequence went on.
    pub fn extend(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
    }

    /// What followed the longest match of the end among the latest places of its last three tokens, else of its last two.
    /// Where it reaches the end it goes on in itself, as a copy does in LZ77 (Ziv and Lempel 1977).
    pub fn guess(&mut self) -> Option<Guess> {
        self.triples.index(&self.tokens);
        self.pairs.index(&self.tokens);
        let found = self.triples.longest(&self.tokens);
        let (next, matched) = found.or_else(|| self.pairs.longest(&self.tokens))?;
        let mut tokens: Vec<u32> = Vec::with_capacity(MAX_DRAFTS);
        for at in next..next + MAX_DRAFTS {
            let token = match at.checked_sub(self.tokens.len()) {
                None => self.tokens[at],
                Some(own) => tokens[own],
            };
            tokens.push(token);
        }
        Some(Guess { tokens, matched })
    }
}

/// Earlier places of each run of `N` tokens: the latest by its hash, from each place the one before.
#[derive(Debug, Clone, Default)]
struct Chains<const N: usize> {
    /// By hash, a power of two of them: one more than the latest place, 0 for none.
    heads: Vec<u32>,
    /// By place: one more than the place before it with the same hash, 0 for none.
    before: Vec<u32>,
}

impl<const N: usize> Chains<N> {
    /// Takes up all runs that something follows; what was taken up before must be unchanged.
    fn index(&mut self, tokens: &[u32]) {
        let runs = tokens.len().saturating_sub(N);
        if runs > self.heads.len() {
            self.heads = vec![0; (2 * runs).next_power_of_two()];
            self.before.clear();
        }
        for place in self.before.len()..runs {
            let head = self.hash(&tokens[place..place + N]);
            self.before.push(self.heads[head]);
            self.heads[head] = place as u32 + 1;
        }
    }

    /// Where the continuation of the longest match begins, and its length; the latest of equal ones.
    fn longest(&self, tokens: &[u32]) -> Option<(usize, usize)> {
        if tokens.len() <= N {
            return None;
        }
        let end = &tokens[tokens.len() - N..];
        let mut place = self.heads[self.hash(end)];
        let mut best: Option<(usize, usize)> = None;
        for _ in 0..PLACES {
            let Some(start) = place.checked_sub(1) else {
                break;
            };
            let next = start as usize + N;
            let matched = common_end(&tokens[..next], tokens);
            // A shorter one is another run with the same hash.
            if matched >= N && best.is_none_or(|(_, longest)| matched > longest) {
                best = Some((next, matched));
                if matched == LONGEST_MATCH {
                    break;
                }
            }
            place = self.before[start as usize];
        }
        best
    }

    fn hash(&self, run: &[u32]) -> usize {
        let mixed = run.iter().fold(0u64, |hash, &token| {
            (hash ^ u64::from(token))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
        });
        mixed as usize & (self.heads.len() - 1)
    }
}

/// Tokens in which two ends agree, counted up to [`LONGEST_MATCH`].
fn common_end(a: &[u32], b: &[u32]) -> usize {
    let pairs = a.iter().rev().zip(b.iter().rev()).take(LONGEST_MATCH);
    pairs.take_while(|(a, b)| a == b).count()
}
