//! Headings of documents that do not mark them: section signs, numbers, capitals.

/// A heading has at most this many words; longer lines are sentences.
const MAX_HEADING_WORDS: usize = 14;

/// Whether a line is the head of a section, such as "§ 5 Steuersatz" or "Artikel 3": not a sentence that begins with one.
pub(super) fn is_section_sign_heading(line: &str) -> bool {
    let line = line.trim();
    let (rest, written_out) =
        if let Some(rest) = line.strip_prefix("§§").or_else(|| line.strip_prefix('§')) {
            (rest, false)
        } else if let Some(rest) = ["Artikel ", "Art. ", "Anlage ", "Abschnitt ", "Kapitel "]
            .iter()
            .find_map(|w| line.strip_prefix(w))
        {
            (rest, true)
        } else {
            return false;
        };
    let rest = rest.trim_start();
    let number_end = rest
        .find(|c: char| !(c.is_alphanumeric() || c == '.'))
        .unwrap_or(rest.len());
    let (number, title) = rest.split_at(number_end);
    let roman = written_out
        && !number.is_empty()
        && number
            .trim_end_matches('.')
            .chars()
            .all(|c| "IVXLC".contains(c));
    if !(roman || number.starts_with(|c: char| c.is_ascii_digit())) {
        return false;
    }
    let title = title.trim_start_matches([' ', ':', '–', '-', '\u{a0}']);
    // "§ 5 Abs. 2 gilt …" cites a section, it does not open one.
    let cites = [
        "Abs", "Satz", "Nr", "Nummer", "und", "bis", "oder", "der ", "des ", "dieser ", "in ",
        "Buchst",
    ];
    if cites.iter().any(|c| title.starts_with(c)) || title.starts_with([',', ';', ')']) {
        return false;
    }
    is_short_title(title) || title.is_empty()
}

/// The depth of "1 Zweck" or "2.3 Fristen", counted from 1; `None` for everything else.
pub(super) fn numbered_heading_depth(line: &str) -> Option<u8> {
    let (number, title) = line.trim().split_once(' ')?;
    let parts: Vec<&str> = number.trim_end_matches('.').split('.').collect();
    let numeric = parts
        .iter()
        .all(|p| (1..=2).contains(&p.len()) && p.chars().all(|c| c.is_ascii_digit()));
    (numeric && parts.len() <= 5 && is_short_title(title)).then_some(parts.len() as u8)
}

/// Starts with a capital, is short and does not end as a sentence does.
pub(super) fn is_short_title(title: &str) -> bool {
    let title = title.trim();
    title.starts_with(|c: char| c.is_uppercase() || c.is_ascii_digit() || c == '(' || c == '„')
        && !title.ends_with(['.', ',', ';', ':', '-', '!'])
        && title.split_whitespace().count() <= MAX_HEADING_WORDS
        && title.chars().any(char::is_alphabetic)
}

/// "SATZUNG ÜBER DIE HUNDESTEUER": two capitals at least, no small letter.
pub(super) fn is_capitals(line: &str) -> bool {
    is_short_title(line)
        && !line.chars().any(char::is_lowercase)
        && line.chars().filter(|c| c.is_uppercase()).count() >= 4
}

/// Whether a line opens an item: "- …", "• …", "(1) …", "1. …", "a) …".
pub(super) fn opens_item(line: &str) -> bool {
    let mut chars = line.chars();
    match chars.next() {
        Some('-' | '–' | '•' | '*' | '▪' | '◦' | '·') => {
            chars.next().is_some_and(char::is_whitespace)
        }
        Some('(') => line.find(')').is_some_and(|end| (2..=4).contains(&end)),
        Some(c) if c.is_ascii_alphanumeric() => {
            let end = line
                .find(|c: char| !c.is_ascii_alphanumeric())
                .unwrap_or(line.len());
            let sign = line.get(end..).unwrap_or("");
            let digits = line
                .get(..end)
                .is_some_and(|n| n.chars().all(|c| c.is_ascii_digit()));
            let opens = if digits {
                sign.starts_with(['.', ')'])
            } else {
                end == 1 && sign.starts_with(')')
            };
            opens && end <= 2 && sign.chars().nth(1).is_some_and(char::is_whitespace)
        }
        _ => false,
    }
}
