//! What grammars let through, what is refused before and during an answer, on a vocabulary of bytes and a few words.

use coordinator::Redacted;
use coordinator::ids::TenantId;
use serde_json::json;

use super::*;
use crate::client::Calls;
use crate::text::{TokenKind, Vocabulary};

const END: u32 = 2;
/// Byte `b` is the token `BYTES + b`.
const BYTES: u32 = 3;
const WORDS: [&str; 8] = [
    "{\"",
    "\":",
    "\",\"",
    "name",
    "\"}",
    "}}",
    "<tool_call>",
    "wetter",
];

fn tokenizer() -> Arc<Tokenizer> {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    let mut kinds = vec![TokenKind::Unknown, TokenKind::Control, TokenKind::Control];
    tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
    kinds.resize(tokens.len(), TokenKind::Byte);
    tokens.extend(WORDS.map(str::to_owned));
    kinds.resize(tokens.len(), TokenKind::Normal);
    let vocabulary = Vocabulary {
        model: "llama".into(),
        scores: vec![0.0; tokens.len()],
        tokens,
        kinds,
        bos: Some(1),
        eos: Some(END),
        unknown: Some(0),
        add_space_prefix: Some(false),
        ..Vocabulary::default()
    };
    Arc::new(Tokenizer::from_vocabulary(&vocabulary).unwrap())
}

fn tenant() -> TenantId {
    TenantId::new("t1").unwrap()
}

fn constrainer() -> Constrainer {
    Constrainer::new(tokenizer())
}

fn schema_text(schema: &str) -> Constraint {
    Constraint {
        format: Some(Format::Schema {
            schema: Redacted::new(schema.into()),
            param: "schema".into(),
        }),
        calls: None,
    }
}

fn regex(pattern: &str) -> Constraint {
    Constraint {
        format: Some(Format::Regex {
            pattern: Redacted::new(pattern.into()),
            param: "pattern".into(),
        }),
        calls: None,
    }
}

fn matcher(constraint: &Constraint) -> Matcher {
    constrainer()
        .matcher(&tenant(), constraint, &[], CallForm::Bare)
        .unwrap()
        .expect("a constraint")
}

fn allows(mask: &[u32], token: u32) -> bool {
    mask.get(token as usize / 32)
        .is_some_and(|word| word >> (token % 32) & 1 == 1)
}

/// Whether `text` byte by byte is a whole answer.
fn takes(matcher: &mut Matcher, text: &str) -> bool {
    for &byte in text.as_bytes() {
        if matcher.is_over() {
            return false;
        }
        let token = BYTES + u32::from(byte);
        let mask = matcher.masks(&[]).unwrap().remove(0);
        if mask.is_some_and(|mask| !allows(&mask, token)) {
            return false;
        }
        matcher.accept(token).unwrap();
    }
    matcher.is_over()
        || matcher.masks(&[]).unwrap()[0]
            .as_ref()
            .is_none_or(|mask| allows(mask, END))
}

fn refused(constraint: &Constraint) -> (String, String) {
    match constrainer().matcher(&tenant(), constraint, &[], CallForm::Bare) {
        Err(InferError::Invalid { param, why }) => (param, why),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn an_answer_keeps_to_its_schema_to_the_last_byte() {
    let schema = json!({
        "type": "object",
        "properties": {"az": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"}, "tag": {"type": "string", "format": "date"}},
        "required": ["az"], "additionalProperties": false
    });
    let constraint = schema_text(&schema.to_string());
    for right in [
        r#"{"az":"AB-7"}"#,
        r#"{"az": "AB-12", "tag": "2024-02-29"}"#,
        r#"{"az":"ZZ-1","tag":"2000-02-29"}"#,
    ] {
        assert!(takes(&mut matcher(&constraint), right), "{right}");
    }
    for wrong in [
        "",
        r#"{"az":"AB-7""#,
        r#"{}"#,
        r#"{"az":"ab-7"}"#,
        r#"{"az":"AB-7","x":1}"#,
        r#"{"az":"AB-7","tag":"2023-02-29"}"#,
        r#"{"az":"AB-7","tag":"1900-02-29"}"#,
        r#"{"az":"AB-7"} ja"#,
        "{ \"az\": \"AB-12\",\n  \"tag\": \"2024-02-29\"\n}",
    ] {
        assert!(!takes(&mut matcher(&constraint), wrong), "{wrong}");
    }
}

#[test]
fn exclusive_bounds_exclude_themselves() {
    let within = |more: &str, text: &str| {
        let schema = format!(r#"{{"type":"number",{more}}}"#);
        takes(&mut matcher(&schema_text(&schema)), text)
    };
    for (bounds, right, wrong) in [
        (r#""exclusiveMinimum":0,"maximum":0.5"#, "0.25", "0"),
        (r#""exclusiveMinimum":3,"exclusiveMaximum":3.7"#, "3.5", "3"),
        (r#""minimum":-0.5,"exclusiveMaximum":0"#, "-0.25", "-0"),
        (r#""minimum":2,"exclusiveMinimum":true"#, "2.5", "2"),
        (r#""exclusiveMaximum":1000000"#, "999999.5", "1000000"),
    ] {
        assert!(within(bounds, right), "{bounds} {right}");
        assert!(!within(bounds, wrong), "{bounds} {wrong}");
    }
}

#[test]
fn any_json_object_is_an_object_and_nothing_else() {
    let constraint = Constraint {
        format: Some(Format::JsonObject),
        calls: None,
    };
    assert!(takes(
        &mut matcher(&constraint),
        r#"{"a":[1,{"b":null}],"ä":"ö"}"#
    ));
    for wrong in ["[1]", "\"a\"", "{\"a\":}", "Hier: {}"] {
        assert!(!takes(&mut matcher(&constraint), wrong), "{wrong}");
    }
}

#[test]
fn a_regular_expression_matches_the_whole_answer() {
    for pattern in ["^(ja|nein)$", "ja|nein", "(ja|nein)"] {
        for right in ["ja", "nein"] {
            assert!(
                takes(&mut matcher(&regex(pattern)), right),
                "{pattern} {right}"
            );
        }
        for wrong in ["j", "jaja", "Ja"] {
            assert!(
                !takes(&mut matcher(&regex(pattern)), wrong),
                "{pattern} {wrong}"
            );
        }
    }
    assert!(takes(
        &mut matcher(&regex(r"\d{5} [A-ZÄÖÜ][a-zäöü/]+\$")),
        "89073 Ulm/$"
    ));
    let (param, why) = refused(&regex("(?=a)b"));
    assert_eq!(param, "pattern", "{why}");
}

#[test]
fn an_answer_that_can_only_end_is_over() {
    let mut held = matcher(&regex("ab"));
    assert!(held.is_held() && !held.is_over());
    for byte in [b'a', b'b'] {
        held.accept(BYTES + u32::from(byte)).unwrap();
    }
    assert!(held.is_over());
}

#[test]
fn masks_behind_drafts_are_those_that_the_drafts_lead_to() {
    let mut held = matcher(&regex("a(b|c)d"));
    let token = |b: u8| BYTES + u32::from(b);
    let masks = held
        .masks(&[token(b'a'), token(b'x'), token(b'd')])
        .unwrap();
    assert_eq!(masks.len(), 4);
    let allowed = |mask: &Option<Mask>| {
        let mask = mask.as_ref().unwrap();
        (0..300).filter(|&t| allows(mask, t)).collect::<Vec<u32>>()
    };
    assert_eq!(allowed(&masks[0]), [token(b'a')]);
    assert_eq!(allowed(&masks[1]), [token(b'b'), token(b'c')]);
    assert!(
        masks[2].is_none(),
        "no row follows a draft that is not allowed"
    );
    assert_eq!(
        held.masks(&[]).unwrap()[0],
        masks[0],
        "drafts leave no trace"
    );
    let whole = held
        .masks(&[token(b'a'), token(b'c'), token(b'd')])
        .unwrap();
    assert_eq!(allowed(&whole[2]), [token(b'd')]);
    assert_eq!(held.masks(&[]).unwrap()[0], masks[0]);
}

fn tools() -> Vec<Value> {
    vec![
        json!({"type": "function", "function": {"name": "wetter", "parameters": {
            "type": "object", "properties": {"ort": {"$ref": "#/$defs/ort"}}, "required": ["ort"],
            "additionalProperties": false, "$defs": {"ort": {"enum": ["Ulm", "Bonn"]}}
        }}}),
        json!({"type": "function", "function": {"name": "suche"}}),
        json!({"type": "function", "function": {"name": "frei", "parameters": {"not": {}}}}),
    ]
}

#[test]
fn a_tool_whose_schema_does_not_compile_takes_any_object_unless_it_is_strict() {
    let tool = |strict: bool| {
        json!({"type": "function", "function": {"name": "schief", "strict": strict, "parameters": {
            "type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}
        }}})
    };
    let matcher = |strict| {
        let constraint = Constraint {
            format: None,
            calls: Some(Calls {
                choice: CallChoice::Required,
                parallel: true,
            }),
        };
        constrainer().matcher(&tenant(), &constraint, &[tool(strict)], CallForm::Bare)
    };
    let mut free = matcher(false).unwrap().unwrap();
    assert!(takes(
        &mut free,
        r#"{"name": "schief", "parameters": {"a": 1}}"#
    ));
    assert!(matches!(matcher(true), Err(InferError::Invalid { param, .. }) if param == "tools"));
}

fn calling(choice: CallChoice, parallel: bool, form: CallForm) -> Matcher {
    let constraint = Constraint {
        format: None,
        calls: Some(Calls { choice, parallel }),
    };
    constrainer()
        .matcher(&tenant(), &constraint, &tools(), form)
        .unwrap()
        .unwrap()
}

#[test]
fn a_required_call_is_a_call_with_arguments_that_fit() {
    let required = || calling(CallChoice::Required, true, CallForm::Bare);
    for right in [
        r#"{"name": "wetter", "parameters": {"ort": "Ulm"}}"#,
        r#"{"name":"suche","parameters":{"beliebig":[1]}}"#,
        r#"{"name": "frei", "parameters": {}}"#,
        r#"{"name": "wetter", "parameters": {"ort": "Ulm"}}; {"name": "wetter", "parameters": {"ort": "Bonn"}}"#,
    ] {
        assert!(takes(&mut required(), right), "{right}");
    }
    for wrong in [
        "Gern",
        r#"{"name": "wetter", "parameters": {"ort": "Berlin"}}"#,
        r#"{"name": "wetter", "parameters": {}}"#,
        r#"{"name": "andere", "parameters": {}}"#,
    ] {
        assert!(!takes(&mut required(), wrong), "{wrong}");
    }
    let two = r#"{"name": "suche", "parameters": {}}; {"name": "suche", "parameters": {}}"#;
    assert!(!takes(
        &mut calling(CallChoice::Required, false, CallForm::Bare),
        two
    ));
    let named = || calling(CallChoice::Named("suche".into()), true, CallForm::Bare);
    assert!(takes(
        &mut named(),
        r#"{"name": "suche", "parameters": {}}"#
    ));
    assert!(!takes(
        &mut named(),
        r#"{"name": "frei", "parameters": {}}"#
    ));
    let tagged =
        "<tool_call>\n{\"name\": \"wetter\", \"arguments\": {\"ort\": \"Ulm\"}}\n</tool_call>";
    assert!(takes(
        &mut calling(CallChoice::Required, true, CallForm::Tagged),
        tagged
    ));
}

#[test]
fn where_calls_are_free_the_grammar_holds_once_one_begins() {
    let auto = || calling(CallChoice::Auto, true, CallForm::Bare);
    for text in ["Guten Tag {", r#"{"ort": "Berlin"}"#, r#"{"name": "Max"}"#] {
        assert!(takes(&mut auto(), text), "{text}");
    }
    assert!(takes(
        &mut auto(),
        r#"{"name": "wetter", "parameters": {"ort": "Ulm"}}"#
    ));
    let mut begun = auto();
    assert!(!takes(
        &mut begun,
        r#"{"name": "wetter", "parameters": {"ort": "Berlin"}}"#
    ));
    assert!(begun.is_held());
    let tagged = || calling(CallChoice::Auto, true, CallForm::Tagged);
    let mut late = tagged();
    let words = |mut text: &str| {
        let mut tokens = Vec::new();
        while let Some(&first) = text.as_bytes().first() {
            let word = WORDS.iter().position(|word| text.starts_with(word));
            tokens.push(BYTES + word.map_or(u32::from(first), |word| 256 + word as u32));
            text = &text[word.map_or(1, |word| WORDS[word].len())..];
        }
        tokens
    };
    for token in
        words("Ich sehe nach. <tool_call>{\"name\": \"wetter\", \"arguments\": {\"ort\": \"")
    {
        late.accept(token).unwrap();
    }
    assert!(late.is_held());
    let mask = late.masks(&[]).unwrap().remove(0).unwrap();
    let next: Vec<u8> = (0..=255u8)
        .filter(|&b| allows(&mask, BYTES + u32::from(b)))
        .collect();
    assert_eq!(next, b"BU");
}

#[test]
fn a_format_holds_where_calls_are_free_and_gives_way_where_they_are_demanded() {
    let both = |choice| {
        let constraint = Constraint {
            format: Some(Format::JsonObject),
            calls: Some(Calls {
                choice,
                parallel: false,
            }),
        };
        constrainer()
            .matcher(&tenant(), &constraint, &tools(), CallForm::Bare)
            .unwrap()
            .unwrap()
    };
    assert!(takes(&mut both(CallChoice::Auto), r#"{"antwort":1}"#));
    assert!(!takes(&mut both(CallChoice::Auto), "Guten Tag"));
    assert!(!takes(&mut both(CallChoice::Required), r#"{"antwort":1}"#));
    assert!(takes(
        &mut both(CallChoice::Required),
        r#"{"name": "suche", "parameters": {}}"#
    ));
}

#[test]
fn tools_that_cannot_be_kept_to_are_named() {
    let strict = vec![
        json!({"type": "function", "function": {"name": "frei", "strict": true,
        "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}}),
    ];
    let constraint = |choice| Constraint {
        format: None,
        calls: Some(Calls {
            choice,
            parallel: true,
        }),
    };
    let error = |choice, tools: &[Value]| match constrainer().matcher(
        &tenant(),
        &constraint(choice),
        tools,
        CallForm::Bare,
    ) {
        Err(InferError::Invalid { param, why }) => (param, why),
        other => panic!("expected a refusal, got {other:?}"),
    };
    let (param, why) = error(CallChoice::Auto, &strict);
    assert_eq!(param, "tools[0].function.parameters");
    assert!(
        why.contains("\"not\"") && why.contains("/properties/a"),
        "{why}"
    );
    let (param, why) = error(CallChoice::Named("fort".into()), &tools());
    assert_eq!(param, "tool_choice");
    assert!(why.contains("fort"), "{why}");
}

#[test]
fn schemas_that_nothing_satisfies_or_that_are_not_schemas_are_refused_with_the_place() {
    let deep = (0..MAX_DEPTH + 2).fold("{}".to_owned(), |inner, _| {
        format!(r#"{{"type":"array","items":{inner}}}"#)
    });
    let deeper_than_json = "[".repeat(5000);
    let wide = json!({"anyOf": vec![json!({"type": "null"}); MAX_ALTERNATIVES + 1]}).to_string();
    let many = json!({"enum": (0..=MAX_ALTERNATIVES).collect::<Vec<_>>()}).to_string();
    let long = json!({"type": "string", "description": "x".repeat(MAX_SCHEMA_BYTES)}).to_string();
    let schemas: serde_json::Map<String, Value> = (0..=MAX_SCHEMAS)
        .map(|i| (format!("{i}"), json!({})))
        .collect();
    let crowded = json!({"properties": schemas}).to_string();
    let cases = [
        ("false", "cannot be satisfied"),
        ("17", "object"),
        ("{", "must be JSON"),
        (deeper_than_json.as_str(), "must be JSON"),
        (&deep, "nested at most"),
        (&wide, "1 to 1000"),
        (&many, "at most 1000"),
        (&long, "at most 65536 bytes"),
        (&crowded, "at most 4000 schemas"),
        (r#"{"type":"strong"}"#, "at /type: must be one of"),
        (
            r#"{"type":"string","minLength":5,"maxLength":3}"#,
            "minLength 5 is above maxLength 3",
        ),
        (
            r#"{"type":"array","minItems":1000000}"#,
            "minItems must be at most",
        ),
        (
            r#"{"type":"integer","minimum":5,"maximum":3}"#,
            "cannot be satisfied",
        ),
        (
            r#"{"type":"number","exclusiveMinimum":3,"maximum":3}"#,
            "cannot be satisfied",
        ),
        (
            r#"{"type":"integer","minimum":3.2,"maximum":3.8}"#,
            "cannot be satisfied",
        ),
        (
            r#"{"type":"integer","multipleOf":0}"#,
            "multipleOf must be above 0",
        ),
        (
            r#"{"allOf":[{"type":"string"},{"type":"integer"}]}"#,
            "cannot be satisfied",
        ),
        (r#"{"type":"string","const":5}"#, "cannot be satisfied"),
        (r#"{"enum":[]}"#, "at /enum: must hold at least one value"),
        (r#"{"anyOf":[]}"#, "at /anyOf: must hold 1 to"),
        (
            r#"{"type":"object","required":["a"],"properties":{"a":false}}"#,
            "cannot be satisfied",
        ),
        (
            r#"{"type":"object","required":["a"],"additionalProperties":false}"#,
            "cannot be satisfied",
        ),
        (
            r#"{"type":"string","pattern":"^a$","const":"b"}"#,
            "cannot be satisfied",
        ),
        (
            r#"{"properties":{"x":{"if":{}}}}"#,
            "at /properties/x: the keyword \"if\"",
        ),
        (r#"{"type":"array","uniqueItems":true}"#, "\"uniqueItems\""),
        (r#"{"type":"string","format":"iri"}"#, "the format \"iri\""),
        (r#"{"type":"string","pattern":"(?=a)"}"#, "cannot be used"),
        (r#"{"type":"string","pattern":"("}"#, "cannot be used"),
        (r##"{"$ref":"#/$defs/fehlt"}"##, "not found"),
        (
            r#"{"$ref":"https://example.org/schema"}"#,
            "at /$ref: must point into this schema",
        ),
        (r##"{"$ref":"#"}"##, "cannot be satisfied"),
        (
            r##"{"$defs":{"a":{"$ref":"#/$defs/a"}},"$ref":"#/$defs/a"}"##,
            "cannot be",
        ),
        (
            r#"{"oneOf":[{"type":"string"},{"type":"string","minLength":2}]}"#,
            "oneOf",
        ),
        (r#"{"properties":[]}"#, "at /properties: must be an object"),
        (
            r#"{"required":[1]}"#,
            "at /required: must be an array of names",
        ),
        (r#"{"items":3}"#, "at /items: a schema must be"),
    ];
    let constrainer = constrainer();
    let mut wrong = Vec::new();
    for (schema, part) in cases {
        let shown = &schema[..schema.len().min(100)];
        match constrainer.matcher(&tenant(), &schema_text(schema), &[], CallForm::Bare) {
            Err(InferError::Invalid { param, why }) => {
                let fits = param == "schema" && why.contains(part);
                if !fits || why.contains('\n') || why.len() > 500 {
                    wrong.push(format!("{shown}: {why}"));
                }
            }
            other => wrong.push(format!("{shown}: {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_schema_generators_write_besides_is_taken() {
    for schema in [
        r#"{"$schema":"https://json-schema.org/draft/2020-12/schema","$id":"https://kommune.de/a","title":"T","type":"object","properties":{"a":{"type":"integer","default":3,"examples":[1],"format":"int32"}}}"#,
        r#"{"type":"array","items":{"type":"string"},"uniqueItems":false,"x-tagged":true}"#,
        r#"{"type":"string","format":"decimal"}"#,
        r#"{"type":["string","null"],"nullable":true,"deprecated":false}"#,
        "true",
        "{}",
    ] {
        matcher(&schema_text(schema));
    }
}

#[test]
fn bombs_end_in_bounded_time_with_an_error_or_a_grammar() {
    let chain: serde_json::Map<String, Value> = (0..2000)
        .map(|i| {
            let next = if i == 1999 {
                json!({"type": "null"})
            } else {
                json!({"$ref": format!("#/$defs/{}", i + 1)})
            };
            (i.to_string(), next)
        })
        .collect();
    let options: Vec<Value> = (0..30)
        .map(|i| json!({"properties": {format!("p{i}"): {"const": i}}, "required": [format!("p{i}")]}))
        .collect();
    let product = json!({"type": "object", "allOf": vec![json!({"anyOf": options}); 32]});
    let doubling: serde_json::Map<String, Value> = (0..60)
        .map(|i| {
            let next = json!({"$ref": format!("#/$defs/{}", (i + 1) % 60)});
            (
                i.to_string(),
                json!({"allOf": [next, next], "type": "object"}),
            )
        })
        .collect();
    let schemas = [
        json!({"$defs": chain, "$ref": "#/$defs/0"}),
        product,
        json!({"$defs": doubling, "$ref": "#/$defs/0"}),
        json!({"type": "string", "minLength": 40000, "maxLength": 50000}),
        json!({"type": "array", "items": {"type": "array", "items": {"type": "null"}, "maxItems": 1_000_000}, "maxItems": 1_000_000_000}),
        json!({"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}),
        json!({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "maxLength": 5000}),
        json!({"type": "string", "pattern": "(x+x+)+y.*z{1000}"}),
        json!({"type": "integer", "minimum": -1e300, "maximum": 1e300, "multipleOf": 7.3}),
        json!({"type": "number", "multipleOf": 1e-300}),
    ];
    for schema in &schemas {
        let started = monotonic();
        let outcome = constrainer().matcher(
            &tenant(),
            &schema_text(&schema.to_string()),
            &[],
            CallForm::Bare,
        );
        let shown: String = schema.to_string().chars().take(60).collect();
        match outcome {
            Ok(Some(mut matcher)) => {
                let masks = matcher.masks(&[]);
                println!("{shown}: taken, {:?}, {}", started.elapsed(), masks.is_ok());
            }
            Ok(None) => panic!("no constraint"),
            Err(InferError::Invalid { why, .. }) => {
                println!("{shown}: {:?} {why}", started.elapsed());
                assert!(!why.contains("took longer"), "{shown}: {why}");
            }
            Err(other) => panic!("{shown}: {other}"),
        }
    }
    for pattern in [
        "((a{1,1000}){1,1000}){1,1000}",
        "(a|aa)+$",
        "(.*.*.*.*x){50}",
        "[a-z]{1,100000}",
    ] {
        let started = monotonic();
        let outcome = constrainer().matcher(&tenant(), &regex(pattern), &[], CallForm::Bare);
        println!("{pattern}: {:?} {}", started.elapsed(), outcome.is_ok());
        assert!(matches!(outcome, Ok(_) | Err(InferError::Invalid { .. })));
    }
    let (_, why) = refused(&regex(&"a".repeat(MAX_PATTERN_BYTES + 1)));
    assert!(why.contains("1 to 8192 bytes"), "{why}");
}

#[test]
fn a_grammar_is_kept_for_its_tenant_alone() {
    let constrainer = constrainer();
    let ask = |tenant: &str| {
        let tenant = TenantId::new(tenant).unwrap();
        constrainer
            .matcher(&tenant, &regex("a+"), &[], CallForm::Bare)
            .unwrap();
        lock(&constrainer.kept).len()
    };
    assert_eq!([ask("t1"), ask("t1"), ask("t2")], [1, 1, 2]);
    for i in 0..2 * MAX_KEPT {
        let _ = constrainer.matcher(&tenant(), &regex(&format!("a{i}")), &[], CallForm::Bare);
    }
    assert_eq!(lock(&constrainer.kept).len(), MAX_KEPT);
}

#[test]
fn a_vocabulary_without_ends_or_with_nothing_in_it_is_no_reason_to_fail_otherwise() {
    let mut vocabulary = Vocabulary {
        model: "llama".into(),
        tokens: vec!["<unk>".into(), "a".into()],
        scores: vec![0.0; 2],
        kinds: vec![TokenKind::Unknown, TokenKind::Normal],
        unknown: Some(0),
        ..Vocabulary::default()
    };
    let build = |v: &Vocabulary| Constrainer::new(Arc::new(Tokenizer::from_vocabulary(v).unwrap()));
    let matcher = build(&vocabulary).matcher(&tenant(), &regex("aa"), &[], CallForm::Bare);
    let mut matcher = matcher.unwrap().unwrap();
    for _ in 0..2 {
        assert_eq!(matcher.masks(&[]).unwrap()[0].as_ref().unwrap()[0], 2);
        matcher.accept(1).unwrap();
    }
    assert!(matcher.is_over());
    let mut stuck = build(&vocabulary)
        .matcher(&tenant(), &regex("ab"), &[], CallForm::Bare)
        .unwrap()
        .unwrap();
    stuck.accept(1).unwrap();
    let exceeded = stuck.masks(&[]).unwrap_err();
    assert!(
        exceeded.why.contains("no token of this model"),
        "{exceeded:?}"
    );
    vocabulary.kinds[1] = TokenKind::Control;
    assert!(matches!(
        build(&vocabulary).matcher(&tenant(), &regex("aa"), &[], CallForm::Bare),
        Err(InferError::Internal { .. })
    ));
}
