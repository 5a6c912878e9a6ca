//! A value that may not appear in a log, a metric or a trace.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Carries a prompt, an answer or document text: prints as `[redacted]`, serialises as the value itself.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Redacted<T>(T);

impl<T> Redacted<T> {
    pub const fn new(value: T) -> Self {
        Self(value)
    }

    /// The value, for use; never for logging.
    pub const fn expose(&self) -> &T {
        &self.0
    }

    /// The value, for changing in place.
    pub const fn expose_mut(&mut self) -> &mut T {
        &mut self.0
    }

    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> From<T> for Redacted<T> {
    fn from(value: T) -> Self {
        Self(value)
    }
}

impl From<&str> for Redacted<String> {
    fn from(value: &str) -> Self {
        Self(value.to_owned())
    }
}

impl<T> fmt::Debug for Redacted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl<T> fmt::Display for Redacted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printed_value_is_hidden_and_serialised_value_is_itself() {
        let secret = Redacted::new("Bescheid Nr. 7".to_owned());
        assert_eq!(
            format!("{secret} {secret:?} {:#?}", Some(&secret)),
            "[redacted] [redacted] Some(\n    [redacted],\n)"
        );
        let json = serde_json::to_string(&secret).expect("a string serialises");
        assert_eq!(json, "\"Bescheid Nr. 7\"");
        let back: Redacted<String> = serde_json::from_str(&json).expect("and comes back");
        assert_eq!(back.expose(), "Bescheid Nr. 7");
    }
}
