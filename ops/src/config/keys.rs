//! The names of all keys and how their text in the environment is read.

use toml::Value;

pub struct Key {
    pub name: &'static str,
    pub kind: Kind,
}

#[derive(Clone, Copy)]
pub enum Kind {
    Text,
    Number,
    Switch,
    /// Comma-separated in the environment.
    List,
    /// `key=value` pairs, comma-separated in the environment.
    Map,
    /// The same with whole numbers as values.
    Numbers,
}

impl Kind {
    /// The value that an environment variable's text stands for.
    pub fn read(self, text: &str) -> Option<Value> {
        let parts = || text.split(',').map(str::trim).filter(|p| !p.is_empty());
        Some(match self {
            Kind::Text => Value::String(text.to_owned()),
            Kind::Number => Value::Integer(text.trim().parse().ok()?),
            Kind::Switch => Value::Boolean(text.trim().parse().ok()?),
            Kind::List => Value::Array(parts().map(|p| Value::String(p.to_owned())).collect()),
            Kind::Map | Kind::Numbers => {
                let pairs = parts().map(|p| {
                    let (key, value) = p.split_once('=')?;
                    let value = match self {
                        Kind::Numbers => Value::Integer(value.trim().parse().ok()?),
                        _ => Value::String(value.to_owned()),
                    };
                    Some((key.trim().to_owned(), value))
                });
                Value::Table(pairs.collect::<Option<_>>()?)
            }
        })
    }

    pub fn expected(self) -> &'static str {
        match self {
            Kind::Text => "text",
            Kind::Number => "a whole number",
            Kind::Switch => "true or false",
            Kind::List => "values separated by commas",
            Kind::Map => "pairs as 1=10.0.0.1:7443, separated by commas",
            Kind::Numbers => "pairs as musterstadt=2, separated by commas",
        }
    }
}

const fn key(name: &'static str, kind: Kind) -> Key {
    Key { name, kind }
}

const SECTIONS: [(&str, &[Key]); 5] = [
    (
        "node",
        &[
            key("name", Kind::Text),
            key("data", Kind::Text),
            key("roles", Kind::List),
            key("listen", Kind::Text),
            key("advertise", Kind::Text),
            key("admin_listen", Kind::Text),
        ],
    ),
    (
        "cluster",
        &[
            key("name", Kind::Text),
            key("seeds", Kind::List),
            key("bootstrap", Kind::Map),
        ],
    ),
    (
        "worker",
        &[
            key("data_listen", Kind::Text),
            key("data_advertise", Kind::Text),
            key("threads", Kind::Number),
            key("memory_bytes", Kind::Number),
            key("read_bytes_per_s", Kind::Number),
            key("wire", Kind::Text),
            key("kv_format", Kind::Text),
            key("speculate", Kind::Switch),
            key("max_waiting", Kind::Number),
            key("mixed_rows", Kind::Number),
            key("tenant_running", Kind::Number),
            key("tenant_waiting", Kind::Number),
            key("tenant_weights", Kind::Numbers),
        ],
    ),
    (
        "gateway",
        &[
            key("listen", Kind::Text),
            key("max_upload_bytes", Kind::Number),
            key("max_connections", Kind::Number),
            key("max_uploads", Kind::Number),
            key("drain_s", Kind::Number),
            key("operator_tenant", Kind::Text),
            key("metrics_public", Kind::Switch),
        ],
    ),
    (
        "log",
        &[
            key("level", Kind::Text),
            key("format", Kind::Text),
            key("file", Kind::Text),
            key("max_bytes", Kind::Number),
        ],
    ),
];

/// The keys of a section, if there is such a section.
pub fn of_section(name: &str) -> Option<&'static [Key]> {
    SECTIONS
        .iter()
        .find(|(section, _)| *section == name)
        .map(|(_, keys)| *keys)
}

pub fn sections() -> impl Iterator<Item = &'static str> {
    SECTIONS.iter().map(|(name, _)| *name)
}
