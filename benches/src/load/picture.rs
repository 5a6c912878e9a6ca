//! A run as a picture: for each tenant, which part of its answers had their first token by when.

use anyhow::Result;

use super::plan::Plan;
use super::run::Record;
use crate::plot::{Series, lines};

/// Most points of a curve.
const POINTS: usize = 200;

/// Cumulative distribution of the time to the first token, a curve a tenant.
///
/// # Errors
/// No request got a token.
pub fn first_tokens(title: &str, plan: &Plan, records: &[Record]) -> Result<String> {
    let series: Vec<Series> = plan
        .tenants
        .iter()
        .enumerate()
        .map(|(tenant, t)| {
            let mine = records.iter().filter(|r| r.tenant == tenant);
            let mut times: Vec<f64> = mine.filter_map(|r| r.first_token_s()).collect();
            times.sort_by(f64::total_cmp);
            Series {
                name: t.name.clone(),
                points: distribution(&times),
                dashed: false,
            }
        })
        .collect();
    lines(
        title,
        "seconds to the first token",
        "% of the answers",
        true,
        false,
        &series,
    )
}

/// (value, per cent of the sample up to it) of a sorted sample.
fn distribution(sorted: &[f64]) -> Vec<(f64, f64)> {
    let step = sorted.len().div_ceil(POINTS).max(1);
    let last = sorted.len().saturating_sub(1);
    (0..sorted.len())
        .filter(|i| i % step == 0 || *i == last)
        .map(|i| (sorted[i], 100.0 * (i + 1) as f64 / sorted.len() as f64))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_ends_at_all_of_it() {
        let sorted: Vec<f64> = (0..1001).map(f64::from).collect();
        let points = distribution(&sorted);
        assert!(points.len() <= POINTS + 1);
        assert_eq!(points.last(), Some(&(1000.0, 100.0)));
        assert!(points.is_sorted_by(|a, b| a.1 < b.1));
    }
}
