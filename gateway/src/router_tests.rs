use std::collections::BTreeSet;

use serde_json::Value;

use super::*;

fn description() -> Value {
    serde_json::from_str(&openapi().to_json().unwrap()).unwrap()
}

fn operations(description: &Value) -> Vec<(String, String, Value)> {
    let paths = description["paths"].as_object().unwrap();
    paths
        .iter()
        .flat_map(|(path, item)| {
            item.as_object()
                .unwrap()
                .iter()
                .map(|(method, operation)| (path.clone(), method.clone(), operation.clone()))
        })
        .collect()
}

#[test]
fn every_route_that_others_rely_on_is_described() {
    let description = description();
    let described: BTreeSet<String> = operations(&description)
        .into_iter()
        .map(|(path, method, _)| format!("{method} {path}"))
        .collect();
    for route in [
        "get /v1/models",
        "get /v1/models/{id}",
        "post /v1/chat/completions",
        "post /v1/completions",
        "post /v1/embeddings",
        "get /api/me",
        "get /api/collections",
        "post /api/collections",
        "get /api/collections/{id}",
        "delete /api/collections/{id}",
        "get /api/collections/{id}/documents",
        "post /api/collections/{id}/documents",
        "get /api/documents/{id}",
        "delete /api/documents/{id}",
        "get /api/documents/{id}/chunks",
        "get /api/documents/{id}/original",
        "post /api/retrieve",
        "get /api/tenants",
        "post /api/tenants",
        "get /api/tenants/{id}/keys",
        "post /api/tenants/{id}/keys",
        "delete /api/tenants/{id}/keys/{key}",
        "get /api/status",
        "get /health",
        "get /ready",
        "get /metrics",
    ] {
        assert!(described.contains(route), "{route} is not described");
    }
}

#[test]
fn every_route_with_a_key_describes_401_and_every_id_404_and_every_body_400_and_413() {
    for (path, method, operation) in operations(&description()) {
        let at = format!("{method} {path}");
        let codes: BTreeSet<&str> = operation["responses"]
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        if path.starts_with("/v1/") || path.starts_with("/api/") {
            assert!(codes.contains("401"), "{at}: {codes:?}");
        }
        if path.contains("{id}") {
            assert!(codes.contains("404"), "{at}: {codes:?}");
        }
        if operation.get("requestBody").is_some() {
            assert!(
                codes.contains("400") && codes.contains("413"),
                "{at}: {codes:?}"
            );
        }
        for code in codes.iter().filter(|code| code.starts_with(['4', '5'])) {
            let schema =
                &operation["responses"][*code]["content"]["application/json"]["schema"]["$ref"];
            let expected = if path == "/ready" {
                "#/components/schemas/Ready"
            } else {
                "#/components/schemas/ErrorBody"
            };
            assert_eq!(schema, expected, "{at} {code}");
        }
    }
}

#[test]
fn every_reference_in_the_description_leads_somewhere() {
    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                if let Some(Value::String(to)) = map.get("$ref") {
                    found.insert(to.clone());
                }
                map.values().for_each(|value| references(value, found));
            }
            Value::Array(list) => list.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }
    let description = description();
    let mut found = BTreeSet::new();
    references(&description, &mut found);
    assert!(found.len() > 20, "{found:?}");
    for reference in found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(
            description.pointer(pointer).is_some(),
            "{reference} leads nowhere"
        );
    }
}
