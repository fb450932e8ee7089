//! The results as text: a Markdown table, CSV, and a plot of KL against KV kept.

use std::fmt::Write;

use crate::eval::figures::Figures;
use crate::eval::plan::{Method, Setting};

/// One row of the results.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    /// Tokens per window.
    pub context: usize,
    /// What was measured.
    pub setting: Setting,
    /// What it came to, over all windows.
    pub figures: Figures,
}

/// A Markdown table.
pub fn markdown(rows: &[Row]) -> String {
    let mut text = "| context | method | p or budget | KV kept | KL to dense | top-1 | perplexity | mask bytes/round |\n\
        | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    for row in rows {
        let f = &row.figures;
        let bytes = if f.mask_bytes > 0 {
            format!("{:.0}", f.mask_bytes_per_round())
        } else {
            String::new()
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:.1} % | {:.4} | {:.3} | {:.2} ({:+.2} %) | {bytes} |",
            row.context,
            row.setting.method,
            row.setting.value,
            100.0 * f.kept(),
            f.mean_kl(),
            f.top1(),
            f.perplexity(),
            100.0 * f.perplexity_loss(),
        );
    }
    text
}

/// Comma-separated values with a header.
pub fn csv(rows: &[Row]) -> String {
    let mut text = "context,method,setting,positions,kv_read,kv_dense,kept,kl,top1,perplexity,perplexity_loss,\
        mask_bytes_per_round\n"
        .to_owned();
    for row in rows {
        let f = &row.figures;
        let _ = writeln!(
            text,
            "{},\"{}\",{},{},{},{},{:.6},{:.6},{:.6},{:.4},{:.6},{:.1}",
            row.context,
            row.setting.method,
            row.setting.value,
            f.positions,
            f.kv.read,
            f.kv.dense,
            f.kept(),
            f.mean_kl(),
            f.top1(),
            f.perplexity(),
            f.perplexity_loss(),
            f.mask_bytes_per_round(),
        );
    }
    text
}

/// KL (logarithmic) against KV kept, one line per method, as SVG. Contexts are panels side by side.
pub fn svg(rows: &[Row]) -> String {
    let mut contexts: Vec<usize> = rows.iter().map(|row| row.context).collect();
    contexts.sort_unstable();
    contexts.dedup();
    let width = PANEL_WIDTH * contexts.len() as f64;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{PANEL_HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (index, &context) in contexts.iter().enumerate() {
        let of_context: Vec<&Row> = rows.iter().filter(|row| row.context == context).collect();
        panel(&mut text, index as f64 * PANEL_WIDTH, context, &of_context);
    }
    text.push_str("</svg>\n");
    text
}

const PANEL_WIDTH: f64 = 520.0;
const PANEL_HEIGHT: f64 = 400.0;
/// Left, right, top and bottom of a panel's axes.
const AXES: (f64, f64, f64, f64) = (64.0, 500.0, 36.0, 350.0);
/// Largest share kept on the horizontal axis.
const MOST_KEPT: f64 = 0.55;
/// Decades of KL on the vertical axis, as powers of ten.
const DECADES: (i32, i32) = (-4, 0);

fn colour(method: Method) -> &'static str {
    match method {
        Method::Dense => "#999999",
        Method::Ours => "#d62728",
        Method::Paper => "#1f77b4",
        Method::StreamingLlm => "#2ca02c",
        Method::H2o => "#9467bd",
        Method::Quest => "#ff7f0e",
        Method::Oracle => "#000000",
    }
}

fn panel(text: &mut String, x: f64, context: usize, rows: &[&Row]) {
    let (left, right, top, bottom) = AXES;
    let across = |kept: f64| x + left + (right - left) * (kept / MOST_KEPT).min(1.0);
    let decades = f64::from(DECADES.1 - DECADES.0);
    let down = |kl: f64| {
        let share = (kl.max(1e-9).log10() - f64::from(DECADES.0)) / decades;
        bottom - (bottom - top) * share.clamp(0.0, 1.0)
    };
    for tenth in 0..=5 {
        let kept = f64::from(tenth) / 10.0;
        let at = across(kept);
        let _ = writeln!(
            text,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.0} %</text>",
            bottom + 16.0,
            100.0 * kept
        );
    }
    for decade in DECADES.0..=DECADES.1 {
        let kl = 10f64.powi(decade);
        let at = down(kl);
        let _ = writeln!(
            text,
            "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{kl}</text>",
            x + left,
            x + right,
            x + left - 6.0,
            at + 4.0
        );
    }
    let _ = writeln!(
        text,
        "<text x=\"{:.1}\" y=\"20\" text-anchor=\"middle\" font-weight=\"bold\">context {context}: KL to dense (nats) \
         against KV entries kept</text>",
        x + (left + right) / 2.0
    );
    let methods = Method::ALL
        .into_iter()
        .filter(|&method| method != Method::Dense);
    for (index, method) in methods.enumerate() {
        let mut points: Vec<(f64, f64)> = rows
            .iter()
            .filter(|row| row.setting.method == method)
            .map(|row| (row.figures.kept(), row.figures.mean_kl()))
            .collect();
        if points.is_empty() {
            continue;
        }
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let line: Vec<String> = points
            .iter()
            .map(|&(kept, kl)| format!("{:.1},{:.1}", across(kept), down(kl)))
            .collect();
        let colour = colour(method);
        let dash = if method == Method::Oracle {
            " stroke-dasharray=\"5 3\""
        } else {
            ""
        };
        let _ = writeln!(
            text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>",
            line.join(" ")
        );
        for point in &line {
            let (cx, cy) = point.split_once(',').unwrap_or(("0", "0"));
            let _ = writeln!(
                text,
                "<circle cx=\"{cx}\" cy=\"{cy}\" r=\"3\" fill=\"{colour}\"/>"
            );
        }
        let y = top + 16.0 + 16.0 * index as f64;
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"end\" fill=\"{colour}\">{method}</text>",
            x + right - 6.0
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use specattn_engine::KvReads;

    fn rows() -> Vec<Row> {
        let row = |context, method, value, kl| Row {
            context,
            setting: Setting { method, value },
            figures: Figures {
                positions: 100,
                kl,
                agreements: 95,
                nll: 300.0,
                dense_nll: 299.0,
                kv: KvReads {
                    read: 20,
                    dense: 100,
                },
                rounds: 20,
                mask_bytes: 8_000,
            },
        };
        vec![
            row(4096, Method::Ours, 0.9, 0.5),
            row(4096, Method::Paper, 0.9, 1.2),
            row(8192, Method::Ours, 0.9, 0.4),
        ]
    }

    #[test]
    fn the_table_has_every_figure() {
        let table = markdown(&rows());
        assert!(
            table.contains(
                "| 4096 | SpecAttn, this map | 0.9 | 20.0 % | 0.0050 | 0.950 | 20.09 (+1.01 %) | 400 |"
            ),
            "{table}"
        );
        assert_eq!(csv(&rows()).lines().count(), 4);
    }

    #[test]
    fn the_plot_has_a_panel_per_context_and_a_line_per_method() {
        let plot = svg(&rows());
        assert_eq!(plot.matches("<polyline").count(), 3);
        assert!(plot.contains("context 4096") && plot.contains("context 8192"));
        assert!(plot.ends_with("</svg>\n"));
    }
}
