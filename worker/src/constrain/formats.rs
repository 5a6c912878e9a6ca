//! JSON Schema's formats of strings as patterns that let nothing through which a strict reader refuses.

/// Formats that an answer can keep to.
pub(super) const SUPPORTED: [&str; 10] = [
    "date",
    "time",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
];

/// What is known of a format.
pub(super) enum Known {
    /// This pattern, anchored at both ends.
    Pattern(&'static str),
    /// The library's own pattern is exact.
    Kept,
    /// JSON Schema defines it, and no pattern here keeps to it.
    Refused,
    /// JSON Schema does not define it: a note.
    Note,
}

pub(super) fn pattern(name: &str) -> Known {
    match name {
        "date" => Known::Pattern(DATE),
        "time" => Known::Pattern(TIME),
        "date-time" => Known::Pattern(DATE_TIME),
        "email" => Known::Pattern(EMAIL),
        "hostname" => Known::Pattern(HOSTNAME),
        "duration" | "ipv4" | "ipv6" | "uuid" | "uri" => Known::Kept,
        "idn-email"
        | "idn-hostname"
        | "uri-reference"
        | "iri"
        | "iri-reference"
        | "uri-template"
        | "json-pointer"
        | "relative-json-pointer"
        | "regex" => Known::Refused,
        _ => Known::Note,
    }
}

/// RFC 3339's full-date, with 29 February in leap years only.
macro_rules! date {
    () => {
        concat!(
            "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])",
            "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)",
            "|02-(?:0[1-9]|1[0-9]|2[0-8]))",
            "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
        )
    };
}

/// RFC 3339's full-time without leap seconds, which stand at one moment of some years only.
macro_rules! time {
    () => {
        r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
    };
}

const DATE: &str = concat!("^", date!(), "$");
const TIME: &str = concat!("^", time!(), "$");
const DATE_TIME: &str = concat!("^", date!(), "T", time!(), "$");
/// RFC 1123: labels of at most 63, 253 in all; four labels cannot be longer.
const HOSTNAME: &str = "^[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,58}[a-zA-Z0-9])?(?:\\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?){0,3}$";
/// RFC 5321's mailbox with a dotted local part of at most 64 and a domain of names. Addresses in brackets and quoted local
/// parts are left out: nobody means them.
const EMAIL: &str = "^[a-zA-Z0-9_+-]{1,20}(?:\\.[a-zA-Z0-9_+-]{1,20}){0,2}@[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,58}[a-zA-Z0-9])?(?:\\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?){1,3}$";
