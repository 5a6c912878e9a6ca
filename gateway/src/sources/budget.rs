//! How much of the context the passages may take, and what is shown of each when all together are too long.

use coordinator::Redacted;

/// Share of the context that passages may take: the rest is for instruction, conversation and answer. For 8192 tokens
/// these are 1536, which a CPU reads in about five seconds.
const SHARE: (usize, usize) = (3, 16);
/// Bounds of the share, in tokens: below, passages say nothing; above, five passages of the chunker's size fit whole.
const BOUNDS: (usize, usize) = (256, 4096);
/// Mark of a shortened passage.
const ELLIPSIS: &str = " …";

/// Tokens that the passages may take of a context of `context_tokens`.
pub fn for_context(context_tokens: u32) -> usize {
    (context_tokens as usize * SHARE.0 / SHARE.1).clamp(BOUNDS.0, BOUNDS.1)
}

/// Tokens of German text in an English vocabulary, at most: measured vocabularies take one for 2.5 to 4 bytes.
pub fn estimate(text: &str) -> usize {
    text.len().div_ceil(2)
}

/// Shortens the longest passages until all fit into `budget` tokens: each keeps at least an equal share, and what short
/// ones leave over goes to the long ones. `counts` are the texts' tokens.
pub fn fit(texts: Vec<Redacted<String>>, counts: &[usize], budget: usize) -> Vec<Redacted<String>> {
    let cap = cap(counts, budget);
    texts
        .into_iter()
        .zip(counts)
        .map(|(text, &count)| {
            if count <= cap {
                return text;
            }
            // Tokens are spread about evenly over a text of one language.
            let bytes = (text.expose().len() as u128 * cap as u128 / count.max(1) as u128) as usize;
            Redacted::new(shorten(text.expose(), bytes))
        })
        .collect()
}

/// The largest cap so that the sum of `min(count, cap)` stays within `budget`.
fn cap(counts: &[usize], budget: usize) -> usize {
    let mut sorted = counts.to_vec();
    sorted.sort_unstable();
    let mut left = budget;
    for (i, &count) in sorted.iter().enumerate() {
        let share = left / (sorted.len() - i);
        if count > share {
            return share;
        }
        left -= count;
    }
    usize::MAX
}

/// The beginning of `text`, of at most `bytes`, ending after a sentence or at least after a word.
fn shorten(text: &str, bytes: usize) -> String {
    if text.len() <= bytes {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(bytes);
    let head = &text[..end];
    let sentence = [". ", "! ", "? ", ".\n", ";\n", "\n\n"]
        .iter()
        .filter_map(|mark| head.rfind(mark).map(|at| at + mark.trim_end().len().max(1)))
        .max();
    // A sentence's end in the last third loses little; else a word's end.
    let cut = sentence
        .filter(|&at| at * 3 >= end * 2)
        .or_else(|| {
            head.rfind(char::is_whitespace)
                .filter(|&at| at * 3 >= end * 2)
        })
        .unwrap_or(end);
    format!("{}{ELLIPSIS}", text[..cut].trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(lengths: &[usize]) -> Vec<Redacted<String>> {
        lengths
            .iter()
            .map(|&n| Redacted::new("Wort ".repeat(n / 5)))
            .collect()
    }

    #[test]
    fn given_room_for_all_then_nothing_is_shortened() {
        let all = texts(&[100, 200, 300]);
        assert_eq!(fit(all.clone(), &[20, 40, 60], 120), all);
    }

    #[test]
    fn given_too_little_room_then_only_the_long_ones_are_shortened() {
        let all = texts(&[100, 1000, 2000]);
        let shown = fit(all.clone(), &[20, 200, 400], 220);
        assert_eq!(shown[0], all[0], "a short passage stays whole");
        for text in &shown[1..] {
            let text = text.expose();
            assert!(
                text.ends_with('…') && text.len() <= 500 + ELLIPSIS.len(),
                "{} bytes",
                text.len()
            );
        }
    }

    #[test]
    fn the_cap_spends_the_budget_and_never_more() {
        let cases: &[(&[usize], usize)] = &[
            (&[10, 10, 10], 20),
            (&[1, 500, 500], 101),
            (&[7], 3),
            (&[0, 0, 9], 5),
            (&[100, 50, 25, 12, 6], 77),
        ];
        for &(counts, budget) in cases {
            let cap = cap(counts, budget);
            let spent: usize = counts.iter().map(|&count| count.min(cap)).sum();
            assert!(spent <= budget, "{counts:?} {budget}: spent {spent}");
            assert!(
                spent + counts.len() > budget,
                "{counts:?} {budget}: only {spent}"
            );
        }
    }

    #[test]
    fn a_text_is_cut_after_a_sentence_and_never_inside_a_character() {
        let text =
            "Die Steuer beträgt 96 Euro. Für jeden weiteren Hund beträgt sie 120 Euro im Jahr.";
        assert_eq!(shorten(text, 36), "Die Steuer beträgt 96 Euro. …");
        for bytes in 0..text.len() {
            assert!(shorten(text, bytes).len() <= bytes + ELLIPSIS.len());
            assert!(shorten("äöüß".repeat(9).as_str(), bytes).len() <= bytes + ELLIPSIS.len());
        }
    }

    #[test]
    fn a_small_context_gets_less_than_a_large_one_within_bounds() {
        assert_eq!(for_context(8192), 1536);
        assert_eq!(for_context(512), 256);
        assert_eq!(for_context(131_072), 4096);
    }
}
