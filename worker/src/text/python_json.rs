//! JSON as Python's `json.dumps` writes it, because chat templates were trained on its spaces.

use serde_json::{Map, Number, Value};

/// Deepest nesting written; `serde_json` reads no deeper than 128.
const MAX_DEPTH: usize = 128;

/// The arguments of `json.dumps` that templates use.
#[derive(Debug, Clone)]
pub(super) struct Style {
    pub indent: Option<usize>,
    pub ensure_ascii: bool,
    pub sort_keys: bool,
    pub item_separator: String,
    pub key_separator: String,
}

impl Default for Style {
    /// As `transformers` calls it: one line, characters as they are.
    fn default() -> Self {
        let (item_separator, key_separator) = (", ".into(), ": ".into());
        Self {
            indent: None,
            ensure_ascii: false,
            sort_keys: false,
            item_separator,
            key_separator,
        }
    }
}

/// The text of a value.
pub(super) fn dumps(value: &Value, style: &Style) -> String {
    let mut style = style.clone();
    if style.indent.is_some() && style.item_separator == ", " {
        style.item_separator = ",".into();
    }
    let mut out = String::new();
    write(value, &style, 0, &mut out);
    out
}

fn write(value: &Value, style: &Style, depth: usize, out: &mut String) {
    if depth > MAX_DEPTH {
        return out.push_str("null");
    }
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) => out.push_str(&number_text(number)),
        Value::String(text) => string(text, style.ensure_ascii, out),
        Value::Array(items) => {
            let write_item = |item: &&Value, out: &mut String| write(item, style, depth + 1, out);
            enclosed('[', ']', items.iter(), style, depth, out, write_item);
        }
        Value::Object(map) => {
            let write_entry = |(key, value): &(&String, &Value), out: &mut String| {
                string(key, style.ensure_ascii, out);
                out.push_str(&style.key_separator);
                write(value, style, depth + 1, out);
            };
            enclosed(
                '{',
                '}',
                entries(map, style.sort_keys),
                style,
                depth,
                out,
                write_entry,
            );
        }
    }
}

fn entries(map: &Map<String, Value>, sorted: bool) -> impl Iterator<Item = (&String, &Value)> {
    let mut entries: Vec<_> = map.iter().collect();
    if sorted {
        entries.sort_by_key(|(key, _)| *key);
    }
    entries.into_iter()
}

fn enclosed<T>(
    open: char,
    close: char,
    items: impl Iterator<Item = T>,
    style: &Style,
    depth: usize,
    out: &mut String,
    mut write_item: impl FnMut(&T, &mut String),
) {
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    let mut any = false;
    for item in items {
        if any {
            out.push_str(&style.item_separator);
        }
        any = true;
        line(depth + 1, out);
        write_item(&item, out);
    }
    if any {
        line(depth, out);
    }
    out.push(close);
}

/// Python's `repr` of a float: an exponent below 1e-4 and from 1e16 on, of at least two digits.
fn number_text(number: &Number) -> String {
    let text = number.to_string();
    let Some(value) = number.as_f64().filter(|_| number.is_f64()) else {
        return text;
    };
    let size = value.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{value:e}");
        let Some((digits, exponent)) = text.split_once('e') else {
            return text;
        };
        let (sign, exponent) = exponent
            .strip_prefix('-')
            .map_or(('+', exponent), |e| ('-', e));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = format!("{value}");
    if text.contains('.') {
        text
    } else {
        text + ".0"
    }
}

fn string(text: &str, ensure_ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ensure_ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    // Expected texts are what CPython 3.11's json.dumps prints for the same value.
    #[test]
    fn values_print_as_python_prints_them() {
        let value = json!({"b": [1, 2.0, -0.5, 1e16, 1e-5, 1.5e300], "a": {}, "ä": "x\"\\\n\u{1}€😀", "n": null, "l": []});
        let one_line = r#"{"b": [1, 2.0, -0.5, 1e+16, 1e-05, 1.5e+300], "a": {}, "ä": "x\"\\\n\u0001€😀", "n": null, "l": []}"#;
        assert_eq!(dumps(&value, &Style::default()), one_line);
        let ascii = dumps(
            &json!({"ä": "€😀"}),
            &Style {
                ensure_ascii: true,
                ..Style::default()
            },
        );
        assert_eq!(ascii, r#"{"\u00e4": "\u20ac\ud83d\ude00"}"#);
        let indented = dumps(
            &json!({"b": [1, {"c": 2}], "a": []}),
            &Style {
                indent: Some(4),
                ..Style::default()
            },
        );
        assert_eq!(
            indented,
            "{\n    \"b\": [\n        1,\n        {\n            \"c\": 2\n        }\n    ],\n    \"a\": []\n}"
        );
        let sorted = dumps(
            &json!({"b": 1, "a": 2}),
            &Style {
                sort_keys: true,
                ..Style::default()
            },
        );
        assert_eq!(sorted, r#"{"a": 2, "b": 1}"#);
    }
}
