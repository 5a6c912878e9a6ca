//! German words for the full-text index: lowercase, Snowball stems, no stop words, compounds taken apart.
//!
//! The dictionary for compounds is a committed list of administrative words plus, for each document, that document's own nouns:
//! so a document is indexed alike whenever and on whichever replica it is indexed.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::OnceLock;

use rust_stemmers::{Algorithm, Stemmer};

/// Longest word looked at, in bytes; what is longer (base64, table rules) is cut here.
const MAX_WORD_BYTES: usize = 80;
/// Shortest word that may be a compound ("Amtsweg" has 7 letters).
const MIN_COMPOUND_CHARS: usize = 7;
/// Longest word that is taken apart, since the work grows with its square; statutes stay below.
const MAX_COMPOUND_CHARS: usize = 40;
/// Shortest part: "Amt", "Bau", "Hof", "Rat", "Weg".
const MIN_PART_CHARS: usize = 3;
/// Shortest part that is recognised by its stem alone.
const MIN_STEMMED_CHARS: usize = 4;

const STOP_WORDS: &str = "aber alle allem allen aller alles als also am an ander andere anderem anderen anderer anderes auch auf aus bei beim bin bis bist da \
damit dann das dass dasselbe dein deine dem den denn der deren derer des desselben dessen dich die dies diese diesem diesen dieser dieses dir doch dort du durch ein eine \
einem einen einer eines einig einige er es etwa etwas euch euer eure für gegen gibt hab habe haben hat hatte hätte hätten hier hin hinter ich ihm ihn ihnen ihr ihre ihrem ihren \
ihrer ihres im in indem ins ist ja jede jedem jeden jeder jedes jemand jener jetzt kann kein keine keinem keinen keiner können könnte mal man manche mein meine \
meinem meinen meiner mich mir mit muss müssen musste nach nicht nichts noch nun nur ob oder ohne sehr sein seine seinem seinen seiner seines seit selbst sich sie sind so \
solche soll sollen sollte sondern sonst sowie über um und uns unser unsere unter vom von vor während war waren warum was weil welche welchem welchen welcher welches wenn wer werde werden \
wie wieder will wir wird wirst wo wohin wollen worden wurde wurden würde würden zu zum zur zwar zwischen the of and";

/// A word as it stands in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    /// Lowercase, umlauts composed.
    pub lower: String,
    /// Began with a capital: in German most likely a noun.
    pub capital: bool,
    /// Stands right after a section sign, or joined to its number's letter.
    pub section: bool,
}

/// What the index holds of one text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// Stems of the words as written, in order.
    pub words: Vec<String>,
    /// Stems of the parts of compounds, of neighbouring parts joined, and of hyphenated words joined.
    pub parts: Vec<String>,
}

/// One searched word with its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryWord {
    /// Lowercase, as it was written.
    pub lower: String,
    pub stem: String,
    /// Empty unless it is a compound.
    pub parts: Vec<String>,
}

impl QueryWord {
    fn new(lower: String, own: &Dictionary) -> Self {
        let parts = split_compound(&lower, &[Dictionary::committed(), own]).unwrap_or_default();
        Self {
            stem: stem(&lower),
            parts: parts.into_iter().map(|part| stem(&lower[part])).collect(),
            lower,
        }
    }

    /// The word with umlauts, where it may be written without ("gebuehr"); not where "ue" is no umlaut ("steuer", "bauer",
    /// "quelle").
    pub fn with_umlauts(&self) -> Option<Self> {
        let mut umlauts = String::with_capacity(self.lower.len());
        let mut rest = self.lower.chars().peekable();
        let mut before = None;
        while let Some(c) = rest.next() {
            let umlaut = match (c, rest.peek()) {
                ('a', Some('e')) => Some('ä'),
                ('o', Some('e')) => Some('ö'),
                ('u', Some('e')) if !matches!(before, Some('a' | 'e' | 'ä' | 'q')) => Some('ü'),
                _ => None,
            };
            if umlaut.is_some() {
                rest.next();
            }
            let c = umlaut.unwrap_or(c);
            umlauts.push(c);
            before = Some(c);
        }
        (umlauts != self.lower).then(|| Self::new(umlauts, &Dictionary::default()))
    }
}

fn stop_words() -> &'static HashSet<&'static str> {
    static WORDS: OnceLock<HashSet<&'static str>> = OnceLock::new();
    WORDS.get_or_init(|| STOP_WORDS.split_whitespace().collect())
}

/// Whether a lowercase word says nothing by itself.
pub fn is_stop_word(lower: &str) -> bool {
    stop_words().contains(lower)
}

/// The stem of a lowercase word; words with digits stay as they are.
pub fn stem(lower: &str) -> String {
    if lower.bytes().any(|b| b.is_ascii_digit()) {
        return lower.to_owned();
    }
    match Stemmer::create(Algorithm::German).stem(lower) {
        Cow::Borrowed(same) => same.to_owned(),
        Cow::Owned(stem) => stem,
    }
}

/// The words of a text in order. "§ 5 a" becomes "§5a" beside "5a"; a Roman number up to 39 comes as its Arabic twin too.
pub fn words(text: &str) -> Vec<Word> {
    let mut words = Vec::new();
    let mut after_section_sign = false;
    for (raw, sign_before) in runs(text) {
        after_section_sign |= sign_before;
        let lower = compose(&raw.to_lowercase());
        let digits = lower.starts_with(|c: char| c.is_ascii_digit());
        if after_section_sign && digits {
            words.push(Word {
                lower: format!("§{lower}"),
                capital: false,
                section: true,
            });
        }
        after_section_sign = false;
        if let Some(number) = roman(&raw) {
            words.push(Word {
                lower: number.to_string(),
                capital: false,
                section: false,
            });
        }
        let capital = raw.starts_with(char::is_uppercase);
        words.push(Word {
            lower,
            capital,
            section: false,
        });
    }
    words
}

/// Runs of letters and digits, each with whether a section sign stands between it and the run before.
fn runs(text: &str) -> Vec<(String, bool)> {
    let mut runs = Vec::new();
    let (mut run, mut sign) = (String::new(), false);
    for c in text.chars().chain([' ']) {
        if c.is_alphanumeric() || (c == '\u{308}' && !run.is_empty()) {
            if run.len() < MAX_WORD_BYTES {
                run.push(c);
            }
        } else if c != '\u{ad}' {
            if !run.is_empty() {
                runs.push((std::mem::take(&mut run), std::mem::take(&mut sign)));
            }
            sign |= c == '§';
        }
    }
    runs
}

/// Joins a vowel and a combining diaeresis, as some PDF files write umlauts.
fn compose(lower: &str) -> String {
    if !lower.contains('\u{308}') {
        return lower.to_owned();
    }
    lower
        .replace("a\u{308}", "ä")
        .replace("o\u{308}", "ö")
        .replace("u\u{308}", "ü")
        .replace('\u{308}', "")
}

/// The value of a Roman number from II to XXXIX ("SGB II", "Art. XI"); single letters are words or letters.
fn roman(raw: &str) -> Option<u32> {
    if raw.len() < 2 || !raw.bytes().all(|b| matches!(b, b'I' | b'V' | b'X')) {
        return None;
    }
    let tens = raw.bytes().take_while(|b| *b == b'X').count();
    let ones = match &raw[tens..] {
        "" => 0,
        "I" => 1,
        "II" => 2,
        "III" => 3,
        "IV" => 4,
        "V" => 5,
        "VI" => 6,
        "VII" => 7,
        "VIII" => 8,
        "IX" => 9,
        _ => return None,
    };
    (tens <= 3).then(|| 10 * tens as u32 + ones)
}

/// Known words, whole and as stems.
#[derive(Clone, Default)]
pub struct Dictionary {
    words: HashSet<String>,
    stems: HashSet<String>,
}

impl Dictionary {
    /// The committed list.
    pub fn committed() -> &'static Dictionary {
        static COMMITTED: OnceLock<Dictionary> = OnceLock::new();
        COMMITTED.get_or_init(|| {
            let mut dictionary = Dictionary::default();
            include_str!("words.txt")
                .split_whitespace()
                .for_each(|word| dictionary.add(word));
            dictionary
        })
    }

    /// The nouns that stand by themselves in these texts.
    pub fn of_texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Dictionary {
        let mut dictionary = Dictionary::default();
        for word in texts.into_iter().flat_map(words) {
            // Longer ones are compounds themselves more often than parts.
            let length = word.lower.chars().count();
            let plain = word.lower.chars().all(char::is_alphabetic);
            if word.capital && plain && (4..=12).contains(&length) && !is_stop_word(&word.lower) {
                dictionary.add(&word.lower);
            }
        }
        dictionary
    }

    fn add(&mut self, word: &str) {
        if self.words.contains(word) {
            return;
        }
        if word.chars().count() >= MIN_STEMMED_CHARS {
            self.stems.insert(stem(word));
        }
        self.words.insert(word.to_owned());
    }

    fn knows(&self, part: &str, chars: usize) -> bool {
        chars >= MIN_PART_CHARS && self.words.contains(part)
            || chars >= MIN_STEMMED_CHARS && self.stems.contains(&stem(part))
    }
}

/// Takes a lowercase word apart into known parts, with the linking elements s, n, en, es, er, e between them; of several ways the
/// one with the fewest parts, then the one with the longest first part. Where the parts lie, in bytes; `None` unless all of it
/// decomposes.
pub fn split_compound(lower: &str, dictionaries: &[&Dictionary]) -> Option<Vec<Range<usize>>> {
    let starts: Vec<usize> = lower
        .char_indices()
        .map(|(at, _)| at)
        .chain([lower.len()])
        .collect();
    let chars = starts.len() - 1;
    if !(MIN_COMPOUND_CHARS..=MAX_COMPOUND_CHARS).contains(&chars)
        || !lower.chars().all(char::is_alphabetic)
    {
        return None;
    }
    let known = |from: usize, to: usize| {
        let part = &lower[starts[from]..starts[to]];
        dictionaries.iter().any(|d| d.knows(part, to - from))
    };
    // best[i]: the parts that cover the word from its character i to the end.
    let mut best: Vec<Option<Vec<(usize, usize)>>> = vec![None; chars + 1];
    best[chars] = Some(Vec::new());
    for from in (0..=chars.saturating_sub(MIN_PART_CHARS)).rev() {
        for to in (from + MIN_PART_CHARS..=chars).rev() {
            if (from, to) == (0, chars) || !known(from, to) {
                continue;
            }
            for link in ["", "s", "n", "en", "es", "er", "e"] {
                let next = to + link.len();
                if next > chars
                    || (next == chars && !link.is_empty())
                    || !lower[starts[to]..].starts_with(link)
                {
                    continue;
                }
                let Some(rest) = &best[next] else { continue };
                if best[from].as_ref().is_none_or(|b| rest.len() + 1 < b.len()) {
                    let mut parts = vec![(from, to)];
                    parts.extend_from_slice(rest);
                    best[from] = Some(parts);
                }
            }
        }
    }
    let parts = best[0].take()?;
    Some(
        parts
            .into_iter()
            .map(|(from, to)| starts[from]..starts[to])
            .collect(),
    )
}

/// Takes texts of one document apart by the committed words and the document's own. A word is worked on once, however often it
/// stands there: taking it apart stems every piece of it.
pub struct Analyzer {
    own: Dictionary,
    known: HashMap<String, (String, Vec<String>)>,
}

impl Analyzer {
    pub fn new(own: Dictionary) -> Self {
        Self {
            own,
            known: HashMap::new(),
        }
    }

    /// The terms of a text.
    pub fn terms(&mut self, text: &str) -> Terms {
        let mut terms = Terms::default();
        for word in words(text) {
            if is_stop_word(&word.lower) {
                continue;
            }
            if !self.known.contains_key(&word.lower) {
                let analysed = (stem(&word.lower), parts_of(&word.lower, &self.own));
                self.known.insert(word.lower.clone(), analysed);
            }
            if let Some((stem, parts)) = self.known.get(&word.lower) {
                terms.words.push(stem.clone());
                terms.parts.extend(parts.iter().cloned());
            }
        }
        terms.parts.extend(hyphenated(text));
        terms
    }
}

/// Stems of a compound's parts and of its neighbouring parts joined: "Parkausweis" is found in "Anwohnerparkausweis".
fn parts_of(lower: &str, own: &Dictionary) -> Vec<String> {
    let Some(parts) = split_compound(lower, &[Dictionary::committed(), own]) else {
        return Vec::new();
    };
    let single = parts.iter().cloned();
    // Two parts joined are the word itself.
    let joined = parts
        .windows(2)
        .filter(|_| parts.len() > 2)
        .map(|pair| pair[0].start..pair[1].end);
    single
        .chain(joined)
        .map(|part| stem(&lower[part]))
        .collect()
}

/// The searched words of a question, each once, in order.
pub fn query_words(query: &str) -> Vec<QueryWord> {
    let own = Dictionary::of_texts([query]);
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    for word in words(query) {
        if is_stop_word(&word.lower) {
            continue;
        }
        let word = QueryWord::new(word.lower, &own);
        if seen.insert(word.stem.clone()) {
            out.push(word);
        }
    }
    for joined in hyphenated(query) {
        if seen.insert(joined.clone()) {
            out.push(QueryWord {
                lower: joined.clone(),
                stem: joined,
                parts: Vec::new(),
            });
        }
    }
    out
}

/// Hyphenated words joined ("E-Mail", "Kfz-Steuer"), stemmed: written without the hyphen they are the same word.
fn hyphenated(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    for token in text.split(|c: char| !(c.is_alphanumeric() || c == '-')) {
        let inner = token.trim_matches('-');
        if inner.contains('-')
            && inner.len() <= MAX_WORD_BYTES
            && inner.chars().all(|c| c.is_alphabetic() || c == '-')
        {
            out.push(stem(&compose(&inner.replace('-', "").to_lowercase())));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(word: &str) -> Vec<String> {
        let parts = split_compound(word, &[Dictionary::committed()]).unwrap_or_default();
        parts.into_iter().map(|part| stem(&word[part])).collect()
    }

    #[test]
    fn administrative_compounds_come_apart_at_their_joints() {
        for (word, parts) in [
            ("hundesteuersatzung", &["hund", "steu", "satzung"][..]),
            ("hundesteuer", &["hund", "steu"]),
            ("verwaltungsgebühr", &["verwaltung", "gebuhr"]),
            ("gebührenordnung", &["gebuhr", "ordnung"]),
            ("anwohnerparkausweis", &["anwohn", "park", "ausweis"]),
            (
                "wohnungsgeberbestätigung",
                &["wohnungs", "geber", "bestätigung"],
            ),
            ("hundesteuermarke", &["hund", "steuer", "marke"]),
            ("führerscheinstelle", &["führerschein", "stelle"]),
            ("kurbeitragspflicht", &[]), // "kur" is not in the list, so the whole stays whole
            ("satzung", &[]),
            (
                "straßenreinigungsgebühren",
                &["strass", "reinigung", "gebuhr"],
            ),
        ] {
            let expected: Vec<String> = parts.iter().map(|p| stem(p)).collect();
            assert_eq!(split(word), expected, "{word}");
        }
    }

    #[test]
    fn a_documents_own_nouns_take_its_compounds_apart() {
        let own = Dictionary::of_texts(["Die Kurtaxe zahlt der Gast"]);
        let word = "kurtaxenbescheid";
        let parts = split_compound(word, &[Dictionary::committed(), &own]).unwrap();
        let parts: Vec<&str> = parts.into_iter().map(|part| &word[part]).collect();
        assert_eq!(parts, ["kurtaxen", "bescheid"]);
        assert_eq!(split_compound(word, &[Dictionary::committed()]), None);
    }

    #[test]
    fn neighbouring_parts_of_a_longer_compound_are_terms_of_their_own() {
        let terms = Analyzer::new(Dictionary::default()).terms("Anwohnerparkausweis Hundesteuer");
        let of = |words: &[&str]| words.iter().map(|w| stem(w)).collect::<Vec<_>>();
        assert_eq!(
            terms.parts,
            of(&[
                "anwohner",
                "park",
                "ausweis",
                "anwohnerpark",
                "parkausweis",
                "hund",
                "steuer"
            ])
        );
    }

    #[test]
    fn a_word_beyond_40_letters_stays_whole_and_a_repeated_one_has_the_same_terms_again() {
        let long = "steuer".repeat(7);
        assert_eq!(split_compound(&long, &[Dictionary::committed()]), None);
        let mut analyzer = Analyzer::new(Dictionary::default());
        let once = analyzer.terms("Verwaltungsgebühr");
        assert_eq!(analyzer.terms("Verwaltungsgebühr"), once);
    }

    #[test]
    fn words_written_without_umlauts_get_them_where_they_can_stand() {
        for (written, umlauts) in [
            ("gebuehr", Some("gebühr")),
            ("aenderung", Some("änderung")),
            ("oeffnungszeiten", Some("öffnungszeiten")),
            ("steuer", None),
            ("bauer", None),
            ("quelle", None),
            ("steuergebuehren", Some("steuergebühren")),
            ("haeuser", Some("häuser")),
            ("hund", None),
        ] {
            let word = QueryWord::new(written.into(), &Dictionary::default());
            let got = word.with_umlauts().map(|word| word.lower);
            assert_eq!(got.as_deref(), umlauts, "{written}");
        }
    }

    #[test]
    fn stems_meet_across_number_case_and_umlaut() {
        for (a, b) in [
            ("steuern", "steuer"),
            ("häuser", "haus"),
            ("gebühren", "gebühr"),
            ("anträge", "antrag"),
        ] {
            assert_eq!(stem(a), stem(b), "{a} and {b}");
        }
    }

    #[test]
    fn sections_roman_numbers_and_umlauts_of_pdf_files_are_read() {
        let lower = |text: &str| words(text).into_iter().map(|w| w.lower).collect::<Vec<_>>();
        assert_eq!(lower("§ 5a Abs. 2"), ["§5a", "5a", "abs", "2"]);
        assert_eq!(lower("§§ 12 SGB II"), ["§12", "12", "sgb", "2", "ii"]);
        assert_eq!(lower("Gebu\u{308}hr Stra\u{ad}ße"), ["gebühr", "straße"]);
        assert_eq!(lower("IM VI XIV"), ["im", "6", "vi", "14", "xiv"]);
    }

    #[test]
    fn stop_words_go_and_hyphenated_words_are_found_joined() {
        let terms = Analyzer::new(Dictionary::default()).terms("Die E-Mail und der Hund");
        assert_eq!(terms.words, ["e", "mail", "hund"]);
        assert_eq!(terms.parts, ["email"]);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_taken_apart_without_panic_and_parts_lie_in_their_word(text in ".{0,200}", word in "[a-zäöüß]{0,40}") {
            let _ = Analyzer::new(Dictionary::of_texts([text.as_str()])).terms(&text);
            if let Some(parts) = split_compound(&word, &[Dictionary::committed()]) {
                proptest::prop_assert!(parts.len() >= 2);
                let mut end = 0;
                for part in parts {
                    proptest::prop_assert!(part.start >= end && part.start - end <= 2);
                    proptest::prop_assert!(word.get(part.clone()).is_some_and(|part| !part.is_empty()));
                    end = part.end;
                }
                proptest::prop_assert_eq!(end, word.len());
            }
        }
    }
}
