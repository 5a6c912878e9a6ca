//! A client's JSON schema, before a grammar is made of it: its size and shape, the keywords that can be kept to, and formats
//! made exact. Pure.

use serde_json::{Map, Value, json};

use super::formats;

/// Longest schema as text; OpenAI's limit for all names and values is about twice that, in far larger models.
pub const MAX_SCHEMA_BYTES: usize = 64 << 10;
/// Deepest nesting. Every level is a level of recursion in what compiles it.
pub const MAX_DEPTH: usize = 48;
/// Most schemas within a schema: bounds compilation to about a second.
pub const MAX_SCHEMAS: usize = 4000;
/// Most alternatives of one enum, anyOf or oneOf, and values in a const: the grammar has that many rules at one place.
pub const MAX_ALTERNATIVES: usize = 1000;
/// Most conjuncts of one allOf; each may multiply the alternatives of the others.
const MAX_CONJUNCTS: usize = 32;
/// Largest lower bound of a length: more characters or items than an answer can have.
const MAX_LEAST: u64 = 50_000;
/// Longest pattern in bytes.
const MAX_PATTERN_BYTES: usize = 4 << 10;

/// What stands between the parts of an answer, as patterns. No other white space: a small model fills its answer with line breaks and
/// indents until its tokens are used up.
const ITEM_SEPARATOR: &str = ", ?";
const KEY_SEPARATOR: &str = ": ?";

/// Keywords of JSON Schema that no grammar here can keep to.
const UNSUPPORTED: [&str; 17] = [
    "$dynamicRef",
    "$recursiveRef",
    "contains",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "extends",
    "if",
    "maxContains",
    "minContains",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
];

/// Reads a schema and makes it ready to compile. The error says what is wrong, where, and what to do.
pub(super) fn prepare(text: &str) -> Result<Value, String> {
    if text.len() > MAX_SCHEMA_BYTES {
        return Err(format!(
            "must have at most {MAX_SCHEMA_BYTES} bytes, got {}; leave out descriptions, or split the question",
            text.len()
        ));
    }
    let schema = serde_json::from_str(text)
        .map_err(|e| format!("must be JSON of moderate depth; line {} is not", e.line()))?;
    prepare_value(schema)
}

/// As [`prepare`], of a schema that is parsed already.
pub(super) fn prepare_value(schema: Value) -> Result<Value, String> {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        Value::Bool(false) => return Err("is false: it cannot be satisfied by any value".into()),
        other => other,
    };
    let mut walk = Walk::default();
    walk.schema(&mut schema, 0)?;
    if let Value::Object(map) = &mut schema {
        map.insert(
            "x-guidance".into(),
            json!({
                "whitespace_flexible": false,
                "item_separator": ITEM_SEPARATOR,
                "key_separator": KEY_SEPARATOR,
            }),
        );
    }
    Ok(schema)
}

/// Where in the schema the walk is, and what it has met.
#[derive(Default)]
struct Walk {
    path: Vec<String>,
    schemas: usize,
}

impl Walk {
    fn wrong<T>(&self, what: impl std::fmt::Display) -> Result<T, String> {
        if self.path.is_empty() {
            return Err(what.to_string());
        }
        let place: String = self.path.iter().map(|p| format!("/{p}")).collect();
        let place: String = place.chars().take(160).collect();
        Err(format!("at {place}: {what}"))
    }

    fn within<T>(
        &mut self,
        step: impl Into<String>,
        f: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        self.path.push(step.into());
        let result = f(self);
        self.path.pop();
        result
    }

    fn schema(&mut self, schema: &mut Value, depth: usize) -> Result<(), String> {
        self.schemas += 1;
        if self.schemas > MAX_SCHEMAS {
            return Err(format!(
                "must hold at most {MAX_SCHEMAS} schemas in all; use fewer properties and alternatives"
            ));
        }
        if depth > MAX_DEPTH {
            return Err(format!(
                "must be nested at most {MAX_DEPTH} deep; use $defs and $ref, or flatten it"
            ));
        }
        let map = match schema {
            Value::Bool(_) => return Ok(()),
            Value::Object(map) => map,
            _ => return self.wrong("a schema must be an object, true or false"),
        };
        // Ours; a client's would change how every value is written.
        map.remove("x-guidance");
        // `false` asks for nothing, and generators write it.
        if map.get("uniqueItems") == Some(&Value::Bool(false)) {
            map.remove("uniqueItems");
        }
        if let Some(keyword) = UNSUPPORTED.iter().find(|k| map.contains_key(**k)) {
            return self.wrong(format!(
                "the keyword {keyword:?} is not supported; leave it out and check the answer for it yourself"
            ));
        }
        self.bounds(map)?;
        inclusive(map);
        self.format(map)?;
        for (key, value) in map.iter_mut() {
            self.within(key.as_str(), |walk| walk.keyword(key, value, depth + 1))?;
        }
        Ok(())
    }

    fn keyword(&mut self, key: &str, value: &mut Value, depth: usize) -> Result<(), String> {
        match key {
            "properties" | "patternProperties" | "$defs" | "definitions" => {
                let Value::Object(map) = value else {
                    return self.wrong("must be an object of schemas");
                };
                for (name, schema) in map.iter_mut() {
                    if key == "patternProperties" {
                        self.pattern(name)?;
                    }
                    self.within(name.as_str(), |walk| walk.schema(schema, depth))?;
                }
                Ok(())
            }
            "items" if value.is_array() => self.list(value, depth, MAX_ALTERNATIVES),
            "items" | "additionalProperties" | "additionalItems" => self.schema(value, depth),
            "prefixItems" | "anyOf" | "oneOf" => self.list(value, depth, MAX_ALTERNATIVES),
            "allOf" => self.list(value, depth, MAX_CONJUNCTS),
            "enum" => match value.as_array() {
                Some(list) if list.is_empty() => {
                    self.wrong("must hold at least one value, or nothing can satisfy it")
                }
                Some(list) if list.len() > MAX_ALTERNATIVES => self.wrong(format!(
                    "must hold at most {MAX_ALTERNATIVES} values, got {}",
                    list.len()
                )),
                Some(list) => list.iter().try_for_each(|value| self.literal(value)),
                None => self.wrong("must be an array"),
            },
            "const" => self.literal(value),
            "pattern" => match value.as_str() {
                Some(pattern) => self.pattern(pattern),
                None => self.wrong("must be a string"),
            },
            "$ref" => match value.as_str() {
                Some(reference) if reference.starts_with('#') => Ok(()),
                _ => self.wrong("must point into this schema: a string that begins with #"),
            },
            "type" => self.kind(value),
            "required" => match value.as_array() {
                Some(names) if names.iter().all(Value::is_string) => Ok(()),
                _ => self.wrong("must be an array of names"),
            },
            _ => Ok(()),
        }
    }

    fn list(&mut self, value: &mut Value, depth: usize, most: usize) -> Result<(), String> {
        let Value::Array(list) = value else {
            return self.wrong("must be an array of schemas");
        };
        if list.is_empty() || list.len() > most {
            return self.wrong(format!("must hold 1 to {most} schemas, got {}", list.len()));
        }
        for (i, schema) in list.iter_mut().enumerate() {
            self.within(i.to_string(), |walk| walk.schema(schema, depth))?;
        }
        Ok(())
    }

    /// A value that stands in the schema as it is.
    fn literal(&self, value: &Value) -> Result<(), String> {
        let mut left = MAX_ALTERNATIVES;
        let mut open = vec![value];
        while let Some(value) = open.pop() {
            let Some(less) = left.checked_sub(1) else {
                return self.wrong(format!(
                    "a value must have at most {MAX_ALTERNATIVES} parts"
                ));
            };
            left = less;
            match value {
                Value::Array(items) => open.extend(items),
                Value::Object(map) => open.extend(map.values()),
                _ => {}
            }
        }
        Ok(())
    }

    fn kind(&self, value: &Value) -> Result<(), String> {
        const KINDS: [&str; 7] = [
            "null", "boolean", "object", "array", "number", "string", "integer",
        ];
        let known = |value: &Value| value.as_str().is_some_and(|kind| KINDS.contains(&kind));
        let ok = match value {
            Value::Array(list) => !list.is_empty() && list.iter().all(known),
            other => known(other),
        };
        if ok {
            return Ok(());
        }
        self.wrong(format!(
            "must be one of {} or an array of these",
            KINDS.join(", ")
        ))
    }

    fn pattern(&self, pattern: &str) -> Result<(), String> {
        if pattern.len() > MAX_PATTERN_BYTES {
            return self.wrong(format!(
                "a pattern must have at most {MAX_PATTERN_BYTES} bytes, got {}",
                pattern.len()
            ));
        }
        Ok(())
    }

    /// Bounds that contradict each other, or that no answer can reach.
    fn bounds(&self, map: &Map<String, Value>) -> Result<(), String> {
        for (least, most) in [
            ("minLength", "maxLength"),
            ("minItems", "maxItems"),
            ("minProperties", "maxProperties"),
        ] {
            let bound = |key: &str| match map.get(key) {
                None => Ok(None),
                Some(value) => match value.as_u64().or_else(|| whole(value)) {
                    Some(bound) => Ok(Some(bound)),
                    None => self.wrong(format!("{key} must be a whole number of at least 0")),
                },
            };
            let (low, high) = (bound(least)?, bound(most)?);
            if low.is_some_and(|low| low > MAX_LEAST) {
                return self.wrong(format!(
                    "{least} must be at most {MAX_LEAST}, or no answer is long enough"
                ));
            }
            if let (Some(low), Some(high)) = (low, high)
                && low > high
            {
                return self.wrong(format!(
                    "{least} {low} is above {most} {high}: no value can satisfy both"
                ));
            }
        }
        for key in ["exclusiveMinimum", "exclusiveMaximum"] {
            if map
                .get(key)
                .is_some_and(|v| !v.is_number() && !v.is_boolean())
            {
                return self.wrong(format!("{key} must be a number"));
            }
        }
        for key in ["minimum", "maximum", "multipleOf"] {
            if map.get(key).is_some_and(|value| !value.is_number()) {
                return self.wrong(format!("{key} must be a number"));
            }
        }
        if map
            .get("multipleOf")
            .and_then(Value::as_f64)
            .is_some_and(|m| m <= 0.0)
        {
            return self.wrong("multipleOf must be above 0");
        }
        Ok(())
    }

    /// Puts the exact pattern of a format in its place; formats that JSON Schema does not define are notes for people.
    fn format(&self, map: &mut Map<String, Value>) -> Result<(), String> {
        let Some(format) = map.get("format") else {
            return Ok(());
        };
        let Some(name) = format.as_str() else {
            return self.wrong("format must be a string");
        };
        match formats::pattern(name) {
            formats::Known::Pattern(pattern) => {
                map.remove("format");
                let pattern = json!(pattern);
                if !map.contains_key("pattern") {
                    map.insert("pattern".into(), pattern);
                } else if let Some(Value::Array(all)) = map.get_mut("allOf") {
                    all.push(json!({ "pattern": pattern }));
                } else {
                    map.insert("allOf".into(), json!([{ "pattern": pattern }]));
                }
                Ok(())
            }
            formats::Known::Kept => Ok(()),
            formats::Known::Refused => self.wrong(format!(
                "the format {name:?} is not supported; supported: {}",
                formats::SUPPORTED.join(", ")
            )),
            formats::Known::Note => {
                map.remove("format");
                Ok(())
            }
        }
    }
}

/// Makes exclusive bounds of numbers inclusive ones a billionth further in. llguidance 1.9 lets the bound itself through where both
/// bounds share their whole part; what is lost are numbers that nobody means.
fn inclusive(map: &mut Map<String, Value>) {
    if map.get("type").and_then(Value::as_str) == Some("integer") {
        return;
    }
    for (exclusive, bound, inwards) in [
        ("exclusiveMinimum", "minimum", 1.0),
        ("exclusiveMaximum", "maximum", -1.0),
    ] {
        let own = map.get(bound).and_then(Value::as_f64);
        let excluded = match map.get(exclusive) {
            // Draft 4 says it with a flag beside the bound.
            Some(Value::Bool(flag)) => own.filter(|_| *flag),
            Some(value) => value.as_f64(),
            None => None,
        };
        let Some(excluded) = excluded else { continue };
        let moved = excluded + inwards * f64::max(1e-9, excluded.abs() * 1e-15);
        let bounded = match own {
            Some(own) if inwards > 0.0 => own.max(moved),
            Some(own) => own.min(moved),
            None => moved,
        };
        map.remove(exclusive);
        map.insert(bound.into(), json!(bounded));
    }
}

/// JSON writes some whole numbers as `3.0`.
fn whole(value: &Value) -> Option<u64> {
    let number = value.as_f64()?;
    (number.fract() == 0.0 && (0.0..1e15).contains(&number)).then_some(number as u64)
}
