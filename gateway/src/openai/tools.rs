//! Calls of tools in what a model writes: Llama 3's bare JSON (`{"name": …, "parameters": …}`, several separated by `;`), its
//! form for built-in tools (`name.call(key="value")`), and the `<tool_call>` form of ChatML models. Pure.
//!
//! Llama 3's `<|python_tag|>` is a control token, which adds nothing to the text: what stands behind it is one of these forms.

use coordinator::Redacted;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// What ChatML models write around a call.
const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
/// Most calls in one answer; a model that repeats itself makes no more.
const MAX_CALLS: usize = 16;

/// A call that the model wants made.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ToolCall {
    #[schema(example = "call_0190c0de0")]
    pub id: String,
    /// `function`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub function: FunctionCall,
}

/// The function and what it is called with.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct FunctionCall {
    pub name: String,
    /// A JSON object as text, as the model wrote it.
    #[schema(value_type = String)]
    pub arguments: Redacted<String>,
}

/// What a chunk adds to a call: id, type and name in its first chunk, then pieces of its arguments.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ToolCallDelta {
    /// Place among the answer's calls.
    pub index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    pub function: FunctionDelta,
}

/// What a chunk adds to a call's function.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[schema(value_type = String)]
    pub arguments: Redacted<String>,
}

/// What a text turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    Text(String),
    /// A call of this function begins.
    Call(String),
    /// The last call's arguments go on.
    Arguments(String),
}

/// Tells calls from text while it comes. Text is held back only while it may be the beginning of a call.
#[derive(Debug)]
pub struct Reader {
    offered: Vec<String>,
    /// What came and is not told yet.
    held: String,
    state: State,
    calls: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space came.
    Start,
    Text,
    /// A call's head; `tagged` says whether a tag opened it.
    Head {
        tagged: bool,
    },
    /// Within the arguments.
    Arguments {
        tagged: bool,
        nesting: Nesting,
    },
    /// Behind a call's arguments.
    Tail {
        tagged: bool,
    },
    /// A call in an unusual form: all of it is needed.
    Whole,
}

/// Where in a JSON value its text stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    /// The bytes of `text` up to the value's end, if that is in it.
    fn end(&mut self, text: &str) -> Option<usize> {
        for (i, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                b'{' | b'[' if !self.in_string => self.depth += 1,
                b'}' | b']' if !self.in_string => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(i + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

/// What a call's beginning says.
#[derive(Debug, PartialEq, Eq)]
enum Head {
    /// More must come to tell.
    Short,
    /// The function, and where its arguments begin.
    Call(String, usize),
    /// No call of an offered tool.
    Other,
    /// A call perhaps, but not in the usual order.
    Unusual,
}

impl Reader {
    /// For an answer that may call tools of these names.
    pub fn new(offered: Vec<String>) -> Self {
        Self {
            offered,
            held: String::new(),
            state: State::Start,
            calls: 0,
        }
    }

    /// What `text` adds.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while self.advance(&mut pieces) {}
        pieces
    }

    /// What was still held back when the answer ended.
    pub fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Arguments { .. } => {}
            // Separators and closing signs add nothing.
            State::Tail { .. } if self.is_separator(&held) => {}
            State::Start | State::Head { .. } | State::Whole => match parse(&held, &self.offered) {
                Some(calls) => {
                    for (name, arguments) in calls {
                        pieces.extend([Piece::Call(name), Piece::Arguments(arguments)]);
                    }
                }
                None => {
                    let opened = matches!(self.state, State::Head { tagged: true });
                    let tag = if opened { OPEN } else { "" };
                    text_piece(format!("{tag}{held}"), &mut pieces);
                }
            },
            State::Text | State::Tail { .. } => text_piece(held, &mut pieces),
        }
        pieces
    }

    fn is_separator(&self, text: &str) -> bool {
        let rest = text.trim().trim_start_matches('}').trim_start();
        let rest = rest.strip_prefix(CLOSE).unwrap_or(rest);
        CLOSE.starts_with(rest) || rest.trim_matches([';', ',', ' ', '\n']).is_empty()
    }

    /// One step; false when more text must come first.
    fn advance(&mut self, pieces: &mut Vec<Piece>) -> bool {
        match self.state {
            State::Whole => false,
            State::Start => self.start(),
            State::Text => self.text(pieces),
            State::Head { tagged } => self.head(tagged, pieces),
            State::Arguments {
                tagged,
                mut nesting,
            } => {
                let end = nesting.end(&self.held);
                let rest = self.held.split_off(end.unwrap_or(self.held.len()));
                let arguments = std::mem::replace(&mut self.held, rest);
                if !arguments.is_empty() {
                    pieces.push(Piece::Arguments(arguments));
                }
                self.state = match end {
                    Some(_) => State::Tail { tagged },
                    None => State::Arguments { tagged, nesting },
                };
                end.is_some()
            }
            State::Tail { tagged } => self.tail(tagged),
        }
    }

    fn start(&mut self) -> bool {
        let begun = self.held.trim_start();
        if begun.is_empty() {
            return false;
        }
        let built_in = |name: &String| {
            let open = format!("{name}.call(");
            begun.starts_with(&open) || open.starts_with(begun)
        };
        self.state = if begun.starts_with('{') {
            State::Head { tagged: false }
        } else if begun.starts_with(OPEN) {
            State::Text
        } else if OPEN.starts_with(begun) {
            return false;
        } else if self.offered.iter().any(built_in) {
            let whole = self
                .offered
                .iter()
                .any(|n| begun.starts_with(&format!("{n}.call(")));
            if !whole {
                return false;
            }
            State::Whole
        } else {
            State::Text
        };
        true
    }

    fn text(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let opened = self.held.find(OPEN);
        let at = opened.unwrap_or_else(|| self.held.len() - begun(&self.held, OPEN));
        let rest = self.held.split_off(at);
        let text = std::mem::replace(&mut self.held, rest);
        // White space before a call is the call's.
        if opened.is_none() || !text.trim().is_empty() {
            text_piece(text, pieces);
        }
        if opened.is_some() {
            self.held.drain(..OPEN.len());
            self.state = State::Head { tagged: true };
        }
        opened.is_some()
    }

    fn head(&mut self, tagged: bool, pieces: &mut Vec<Piece>) -> bool {
        let head = if self.calls < MAX_CALLS {
            head(&self.held, &self.offered)
        } else {
            Head::Other
        };
        match head {
            Head::Short => false,
            Head::Call(name, at) => {
                self.held.drain(..at);
                self.calls += 1;
                pieces.push(Piece::Call(name));
                let nesting = Nesting::default();
                self.state = State::Arguments { tagged, nesting };
                true
            }
            Head::Other => {
                if tagged {
                    text_piece(OPEN.to_owned(), pieces);
                }
                self.state = State::Text;
                true
            }
            Head::Unusual => {
                self.state = State::Whole;
                true
            }
        }
    }

    fn tail(&mut self, tagged: bool) -> bool {
        let rest = self.held.trim_start();
        let Some(rest) = rest.strip_prefix('}') else {
            // Not JSON; what follows is text.
            if !rest.is_empty() {
                self.state = State::Text;
            }
            return !rest.is_empty();
        };
        let mut rest = rest.trim_start();
        if tagged {
            if rest.len() < CLOSE.len() && CLOSE.starts_with(rest) {
                return false;
            }
            rest = rest.strip_prefix(CLOSE).unwrap_or(rest);
        }
        let next = rest.trim_start_matches([';', ',', ' ', '\n', '\r', '\t']);
        if next.is_empty() || (next.len() < OPEN.len() && OPEN.starts_with(next)) {
            return false;
        }
        self.state = if next.starts_with('{') && !tagged {
            State::Head { tagged: false }
        } else {
            State::Text
        };
        self.held = if self.state == State::Text && !next.starts_with(OPEN) {
            rest.to_owned()
        } else {
            next.to_owned()
        };
        true
    }
}

fn text_piece(text: String, pieces: &mut Vec<Piece>) {
    if !text.is_empty() {
        pieces.push(Piece::Text(text));
    }
}

/// Bytes of the longest end of `text` that `sign` begins with.
fn begun(text: &str, sign: &str) -> usize {
    let longest = text.len().min(sign.len() - 1);
    (1..=longest)
        .rev()
        .find(|&len| text.as_bytes().ends_with(&sign.as_bytes()[..len]))
        .unwrap_or(0)
}

/// Reads a call up to the brace that opens its arguments.
fn head(text: &str, offered: &[String]) -> Head {
    let mut at = text.len() - text.trim_start().len();
    let mut name = None;
    let rest = |at: usize| text.get(at..).unwrap_or_default();
    let white = |at: usize| at + rest(at).len() - rest(at).trim_start().len();
    if rest(at).is_empty() {
        return Head::Short;
    }
    if !rest(at).starts_with('{') {
        return Head::Other;
    }
    at += 1;
    loop {
        at = white(at);
        let key = match string(rest(at)) {
            Ok(Some((key, len))) => {
                at = white(at + len);
                key
            }
            Ok(None) => return Head::Short,
            Err(()) => return Head::Unusual,
        };
        match rest(at).chars().next() {
            None => return Head::Short,
            Some(':') => at = white(at + 1),
            Some(_) => return Head::Other,
        }
        if key == "parameters" || key == "arguments" {
            return match (rest(at).chars().next(), name) {
                (None, _) => Head::Short,
                (Some('{'), Some(name)) => Head::Call(name, at),
                _ => Head::Unusual,
            };
        }
        let value = match string(rest(at)) {
            Ok(Some((value, len))) => {
                at = white(at + len);
                value
            }
            Ok(None) => return Head::Short,
            Err(()) if name.is_none() => return Head::Other,
            Err(()) => return Head::Unusual,
        };
        if key == "name" {
            if !offered.contains(&value) {
                return Head::Other;
            }
            name = Some(value);
        }
        match rest(at).chars().next() {
            None => return Head::Short,
            Some(',') => at += 1,
            Some('}') if name.is_some() => return Head::Unusual,
            Some(_) => return Head::Other,
        }
    }
}

/// The JSON string that `text` begins with and its length; `Ok(None)` if it is not complete, `Err` if there is none.
fn string(text: &str) -> Result<Option<(String, usize)>, ()> {
    if text.is_empty() {
        return Ok(None);
    }
    if !text.starts_with('"') {
        return Err(());
    }
    let mut escaped = false;
    for (i, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => {
                let literal = text.get(..=i).ok_or(())?;
                return serde_json::from_str(literal)
                    .map(|s| Some((s, i + 1)))
                    .map_err(|_| ());
            }
            _ => {}
        }
    }
    Ok(None)
}

/// The calls that a whole text consists of; `None` when it is anything else than calls of `offered` tools.
fn parse(text: &str, offered: &[String]) -> Option<Vec<(String, String)>> {
    if let Some(call) = built_in(text.trim(), offered) {
        return Some(vec![call]);
    }
    let mut calls = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let inside = rest.strip_prefix(OPEN).unwrap_or(rest);
        // Reads one JSON value and tells where it ends.
        let mut values =
            serde_json::Deserializer::from_str(inside).into_iter::<Map<String, Value>>();
        let call = values.next()?.ok()?;
        let after = inside.get(values.byte_offset()..)?.trim_start();
        rest = after
            .strip_prefix(CLOSE)
            .unwrap_or(after)
            .trim_start_matches([';', ','])
            .trim_start();
        if calls.len() == MAX_CALLS {
            return None;
        }
        calls.push(read(call, offered)?);
    }
    (!calls.is_empty()).then_some(calls)
}

fn read(mut call: Map<String, Value>, offered: &[String]) -> Option<(String, String)> {
    let name = call.get("name")?.as_str()?.to_owned();
    if !offered.contains(&name) {
        return None;
    }
    let arguments = match call
        .remove("parameters")
        .or_else(|| call.remove("arguments"))
    {
        Some(Value::Object(arguments)) => Value::Object(arguments).to_string(),
        None | Some(Value::Null) => "{}".to_owned(),
        Some(_) => return None,
    };
    Some((name, arguments))
}

/// Llama 3's `name.call(key="value", …)`.
fn built_in(text: &str, offered: &[String]) -> Option<(String, String)> {
    let (name, inside) = text.strip_suffix(')')?.split_once(".call(")?;
    if !offered.iter().any(|o| o == name) {
        return None;
    }
    let mut arguments = Map::new();
    let mut rest = inside.trim();
    while !rest.is_empty() {
        let (key, value) = rest.split_once('=')?;
        let mut values = serde_json::Deserializer::from_str(value).into_iter::<Value>();
        arguments.insert(key.trim().to_owned(), values.next()?.ok()?);
        rest = value.get(values.byte_offset()..)?.trim_start();
        rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
    }
    Some((name.to_owned(), Value::Object(arguments).to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (text, calls) of an answer that comes in pieces of `size` characters.
    fn read_in(text: &str, size: usize) -> (String, Vec<(String, String)>) {
        let offered = ["wetter".to_owned(), "suche".to_owned()];
        let mut reader = Reader::new(offered.into());
        let letters: Vec<char> = text.chars().collect();
        let mut pieces = Vec::new();
        for part in letters.chunks(size) {
            pieces.extend(reader.push(&part.iter().collect::<String>()));
        }
        pieces.extend(reader.finish());
        let mut said = String::new();
        let mut calls: Vec<(String, String)> = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Text(text) => said.push_str(&text),
                Piece::Call(name) => calls.push((name, String::new())),
                Piece::Arguments(text) => calls.last_mut().unwrap().1.push_str(&text),
            }
        }
        (said, calls)
    }

    /// However the text is cut, it reads the same.
    fn calls(text: &str) -> (String, Vec<(String, String)>) {
        let whole = read_in(text, usize::MAX);
        for size in [1, 2, 3, 7] {
            assert_eq!(read_in(text, size), whole, "{text} in pieces of {size}");
        }
        whole
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.into(), arguments.into())
    }

    #[test]
    fn calls_are_read_in_the_forms_that_models_write() {
        let one = vec![call("wetter", r#"{"ort": "Ulm"}"#)];
        let two = vec![
            call("wetter", r#"{"ort": "Ulm"}"#),
            call("suche", r#"{"q": "}\"{", "n": [1, {"a": 2}]}"#),
        ];
        let cases = [
            (r#"{"name": "wetter", "parameters": {"ort": "Ulm"}}"#, &one),
            (
                r#" {"type":"function","name":"wetter","arguments":{"ort": "Ulm"}} "#,
                &one,
            ),
            (
                "<tool_call>\n{\"name\": \"wetter\", \"arguments\": {\"ort\": \"Ulm\"}}\n</tool_call>",
                &one,
            ),
            (
                r#"{"name":"wetter","parameters":{"ort": "Ulm"}}; {"name":"suche","parameters":{"q": "}\"{", "n": [1, {"a": 2}]}}"#,
                &two,
            ),
            (
                r#"<tool_call>{"name":"wetter","arguments":{"ort": "Ulm"}}</tool_call>
<tool_call>{"name":"suche","arguments":{"q": "}\"{", "n": [1, {"a": 2}]}}</tool_call>"#,
                &two,
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(calls(text), (String::new(), expected.clone()), "{text}");
        }
    }

    #[test]
    fn calls_in_unusual_forms_are_read_when_they_are_whole() {
        let cases = [
            (r#"{"name":"suche"}"#, call("suche", "{}")),
            (r#"{"name":"suche","parameters":null}"#, call("suche", "{}")),
            (
                r#"{"parameters":{"ort":"Ulm"},"name":"wetter"}"#,
                call("wetter", r#"{"ort":"Ulm"}"#),
            ),
            (
                r#"suche.call(query="Müll, Abfuhr", n=3)"#,
                call("suche", r#"{"query":"Müll, Abfuhr","n":3}"#),
            ),
            ("suche.call()", call("suche", "{}")),
        ];
        for (text, expected) in cases {
            assert_eq!(calls(text), (String::new(), vec![expected]), "{text}");
        }
    }

    #[test]
    fn what_is_no_call_of_an_offered_tool_stays_text() {
        for text in [
            "",
            "Guten Tag",
            "  Guten Tag  ",
            r#"{"name":"unbekannt","parameters":{}}"#,
            r#"{"ort":"Ulm"}"#,
            r#"{"name":"wetter","parameters":"Ulm"}"#,
            r#"{"name":"wetter"} Das war der Aufruf."#,
            r#"Ich rufe auf: {"name":"wetter"}"#,
            "a < b und <tool_call> ist ein Wort",
            "suche.calls(",
            "<tool",
            "Ende: <tool_call>",
        ] {
            assert_eq!(calls(text), (text.to_owned(), vec![]), "{text}");
        }
    }

    #[test]
    fn text_around_calls_is_content_and_a_cut_call_keeps_what_came() {
        let (text, found) = calls(
            "Ich sehe nach.\n<tool_call>\n{\"name\": \"suche\", \"arguments\": {}}\n</tool_call>\nFertig.",
        );
        assert_eq!(
            text,
            "Ich sehe nach.\nFertig.".replace("nach.\nFertig", "nach.\n\nFertig")
        );
        assert_eq!(found, [call("suche", "{}")]);
        assert_eq!(
            calls(r#"{"name": "wetter", "parameters": {"ort": "Ul"#),
            (String::new(), vec![call("wetter", r#"{"ort": "Ul"#)])
        );
        let many = r#"{"name":"wetter","parameters":{}};"#.repeat(MAX_CALLS + 1);
        assert_eq!(calls(&many).1.len(), MAX_CALLS);
    }

    #[test]
    fn arguments_come_while_they_are_written() {
        let mut reader = Reader::new(vec!["wetter".into()]);
        assert_eq!(reader.push(r#"{"name": "wetter", "para"#), []);
        assert_eq!(
            reader.push(r#"meters": {"ort": "#),
            [
                Piece::Call("wetter".into()),
                Piece::Arguments(r#"{"ort": "#.into())
            ]
        );
        assert_eq!(reader.push("\"Ulm\""), [Piece::Arguments("\"Ulm\"".into())]);
        assert_eq!(reader.push("}}"), [Piece::Arguments("}".into())]);
        assert_eq!(reader.finish(), []);
        let mut reader = Reader::new(vec!["wetter".into()]);
        assert_eq!(reader.push("Guten "), [Piece::Text("Guten ".into())]);
    }
}
