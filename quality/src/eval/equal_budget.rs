//! Methods side by side at the same share of KV kept, read off the lines between their measured points.
//!
//! KL falls with the share kept nearly as a power of it, so both are interpolated as logarithms. Nothing is said beyond
//! a method's first and last point.

use std::fmt::Write;

use crate::eval::plan::Method;
use crate::eval::report::Row;

/// Shares of the KV cache at which methods are compared.
pub const SHARES: [f64; 10] = [0.05, 0.075, 0.1, 0.12, 0.15, 0.2, 0.216, 0.25, 0.3, 0.4];

/// How far outside its measured points a method may be read: budgets are missed by a little.
const SLACK: f64 = 0.02;

/// A method's measured points.
struct Line<'r> {
    method: Method,
    name: &'r str,
    /// (kept, KL), by kept.
    points: Vec<(f64, f64)>,
}

/// One Markdown table per context: KL of every method at each of [`SHARES`], and the first map's over the second's (the
/// paper's) and over the oracle's.
pub fn markdown(rows: &[Row]) -> String {
    let mut contexts: Vec<usize> = rows.iter().map(|row| row.context).collect();
    contexts.sort_unstable();
    contexts.dedup();
    let mut text = String::new();
    for context in contexts {
        let mut lines: Vec<Line<'_>> = Vec::new();
        for row in rows.iter().filter(|row| row.context == context) {
            let method = row.setting.method;
            let point = (row.figures.kept(), row.figures.mean_kl());
            match lines.iter_mut().find(|line| line.method == method) {
                _ if method == Method::Dense => {}
                Some(line) => line.points.push(point),
                None => lines.push(Line {
                    method,
                    name: &row.name,
                    points: vec![point],
                }),
            }
        }
        for line in &mut lines {
            line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        let names: Vec<&str> = lines.iter().map(|line| line.name).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| context | KV kept | {} | first ÷ second | first ÷ oracle |\n| --- | --- |{} --- | --- |",
            names.join(" | "),
            " --- |".repeat(names.len())
        );
        for share in SHARES {
            let of = |method| {
                let line = lines.iter().find(|line| line.method == method)?;
                at(&line.points, share)
            };
            let ratio = |other| Some(of(Method::Map(0))? / of(other)?);
            let cell = |value: Option<f64>, digits: usize| {
                value.map_or_else(String::new, |v| format!("{v:.digits$}"))
            };
            let values = lines.iter().map(|line| cell(at(&line.points, share), 4));
            let values: Vec<String> = values.collect();
            if values.iter().all(String::is_empty) {
                continue;
            }
            let _ = writeln!(
                text,
                "| {context} | {:.1} % | {} | {} | {} |",
                100.0 * share,
                values.join(" | "),
                cell(ratio(Method::Map(1)), 2),
                cell(ratio(Method::Oracle), 1),
            );
        }
        text.push('\n');
    }
    text
}

/// KL at `share` of a line of (kept, KL), sorted by kept; `None` beyond its ends.
fn at(points: &[(f64, f64)], share: f64) -> Option<f64> {
    let (first, last) = (points.first()?, points.last()?);
    let known = first.0 * (1.0 - SLACK)..=last.0 * (1.0 + SLACK);
    if !known.contains(&share) {
        return None;
    }
    let right = points
        .partition_point(|point| point.0 < share)
        .clamp(1, (points.len() - 1).max(1));
    let [a, b] = [points[right - 1], *points.get(right)?];
    let ln = |x: f64| x.max(1e-9).ln();
    let slope = (ln(b.1) - ln(a.1)) / (ln(b.0) - ln(a.0));
    Some((ln(a.1) + slope * (ln(share) - ln(a.0))).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::figures::Figures;
    use crate::eval::plan::Setting;
    use specattn_engine::KvReads;

    #[test]
    fn powers_are_followed_and_nothing_is_said_beyond_the_ends() {
        let points: Vec<(f64, f64)> = [0.05, 0.1, 0.4].map(|k| (k, 0.001 / k / k)).to_vec();
        for share in [0.0495, 0.07, 0.1, 0.2, 0.4] {
            let expected = 0.001 / share / share;
            let found = at(&points, share).unwrap();
            assert!((found / expected - 1.0).abs() < 1e-9, "{share}: {found}");
        }
        assert_eq!(at(&points, 0.04), None);
        assert_eq!(at(&points, 0.5), None);
        assert_eq!(at(&points[..1], 0.05), None);
        assert_eq!(at(&[], 0.05), None);
    }

    #[test]
    fn the_table_has_ratios() {
        let row = |method, name: &str, read, kl| Row {
            context: 4096,
            setting: Setting { method, value: 0.5 },
            name: name.to_owned(),
            figures: Figures {
                positions: 1,
                kl,
                kv: KvReads { read, dense: 1_000 },
                ..Figures::default()
            },
        };
        let rows = [
            row(Method::Dense, "dense", 1_000, 0.0),
            row(Method::Map(0), "ours", 100, 0.02),
            row(Method::Map(0), "ours", 200, 0.01),
            row(Method::Map(1), "the paper's", 100, 0.04),
            row(Method::Map(1), "the paper's", 200, 0.02),
            row(Method::Oracle, "oracle", 100, 0.01),
            row(Method::Oracle, "oracle", 200, 0.005),
        ];
        let table = markdown(&rows);
        assert!(
            table.contains("| 4096 | 20.0 % | 0.0100 | 0.0200 | 0.0050 | 0.50 | 2.0 |"),
            "{table}"
        );
        assert!(!table.contains("| 4096 | 5.0 %") && !table.contains("dense"));
    }
}
