//! Times and sizes as people write them on the command line.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};

/// `90s`, `30m`, `2h`, `1d`.
pub fn duration(text: &str) -> Result<Duration> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let seconds = match unit {
        "s" | "" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => {
            return Err(anyhow!(
                "expected a time as 90s, 30m, 2h or 1d, got {text:?}"
            ));
        }
    };
    let number: u64 = number
        .parse()
        .with_context(|| format!("expected a time as 90s, 30m, 2h or 1d, got {text:?}"))?;
    Ok(Duration::from_secs(number.saturating_mul(seconds)))
}

/// `24GiB`, `900GB`, `512MiB`, or plain bytes.
pub fn byte_count(text: &str) -> Result<u64> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1_u64 << 40,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(anyhow!("expected bytes as 24GiB, got {text:?}")),
    };
    let number: u64 = number
        .parse()
        .with_context(|| format!("expected bytes as 24GiB, got {text:?}"))?;
    number
        .checked_mul(factor)
        .with_context(|| format!("{text} is more than can be counted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_read_or_refused() {
        assert_eq!(duration("90s").ok(), Some(Duration::from_secs(90)));
        assert_eq!(duration("2h").ok(), Some(Duration::from_secs(7200)));
        assert_eq!(byte_count("24GiB").ok(), Some(24 << 30));
        assert_eq!(byte_count("900GB").ok(), Some(900_000_000_000));
        for bad in ["", "h", "1x", "-1s", "1.5h", "99999999999999999999s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        for bad in ["", "GiB", "1Gi", "99999999999TiB"] {
            assert!(byte_count(bad).is_err(), "{bad}");
        }
    }
}
