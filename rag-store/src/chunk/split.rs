//! Cuts one block that is too large: at line ends, then sentence ends, then words, then characters.

use super::size::Size;

/// Parts of `text` that each fit, with what stood between each and the part before it. Together they are the text.
pub(super) fn split(text: &str, target: Size) -> Vec<(&str, &str)> {
    let mut parts = Vec::new();
    split_at(text, "", target, Cut::Lines, &mut parts);
    parts
}

#[derive(Clone, Copy)]
enum Cut {
    Lines,
    Sentences,
    Words,
    Characters,
}

fn split_at<'a>(
    text: &'a str,
    before: &'a str,
    target: Size,
    cut: Cut,
    parts: &mut Vec<(&'a str, &'a str)>,
) {
    if Size::of(text).fits(target) {
        parts.push((text, before));
        return;
    }
    let (finer, cuts) = match cut {
        Cut::Lines => (Cut::Sentences, gaps(text, |gap, _, _| gap.contains('\n'))),
        Cut::Sentences => (
            Cut::Words,
            gaps(text, |_, left, right| ends_sentence(left, right)),
        ),
        Cut::Words => (Cut::Characters, gaps(text, |_, _, _| true)),
        Cut::Characters => (Cut::Characters, halves(text)),
    };
    let mut separator = before;
    let mut from = 0;
    for (start, end) in cuts.into_iter().chain([(text.len(), text.len())]) {
        let piece = text.get(from..start).unwrap_or("");
        // One character cannot be cut further.
        if matches!(cut, Cut::Characters) && piece.chars().count() <= 1 {
            parts.push((piece, separator));
        } else {
            split_at(piece, separator, target, finer, parts);
        }
        separator = text.get(start..end).unwrap_or("");
        from = end;
    }
}

/// White space at which to cut, by what the gap is and what stands left and right of it.
fn gaps(text: &str, wanted: impl Fn(&str, &str, &str) -> bool) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(start) = text
        .get(from..)
        .and_then(|rest| rest.find(char::is_whitespace))
        .map(|i| from + i)
    {
        let rest = text.get(start..).unwrap_or("");
        let end = start + (rest.len() - rest.trim_start().len());
        let gap = text.get(start..end).unwrap_or("");
        if start > 0
            && end < text.len()
            && wanted(
                gap,
                text.get(..start).unwrap_or(""),
                text.get(end..).unwrap_or(""),
            )
        {
            found.push((start, end));
        }
        from = end;
    }
    found
}

/// Not after an abbreviation or an ordinal ("z. B.", "Abs. 2", "1. Januar"): the last word is long, the next a capital.
fn ends_sentence(left: &str, right: &str) -> bool {
    let word = left.rsplit(char::is_whitespace).next().unwrap_or("");
    let stem = word.trim_end_matches(['.', '!', '?', '"', '“', ')']);
    let ended = word.len() > stem.len() && word.contains(['.', '!', '?']);
    let short = stem.chars().count() <= 3 && word.ends_with('.');
    ended
        && !short
        && right.starts_with(|c: char| c.is_uppercase() || c == '(' || c == '§' || c == '„')
}

fn halves(text: &str) -> Vec<(usize, usize)> {
    let middle = (0..=text.len() / 2)
        .rev()
        .find(|i| *i > 0 && text.is_char_boundary(*i));
    // A first character that is wider than half of the text: cut behind it.
    let middle = middle.or_else(|| text.char_indices().nth(1).map(|(i, _)| i));
    middle.map(|i| (i, i)).into_iter().collect()
}
