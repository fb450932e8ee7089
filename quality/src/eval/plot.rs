//! The plot: KL against KV kept, one line per method.

use std::fmt::Write;

use crate::eval::plan::Method;
use crate::eval::report::Row;

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

/// A line's colour: methods have their own, further maps share what is left.
fn colour(method: Method) -> &'static str {
    const MAPS: [&str; 6] = [
        "#d62728", "#1f77b4", "#8c564b", "#e377c2", "#17becf", "#bcbd22",
    ];
    match method {
        Method::Dense => "#999999",
        Method::Map(index) => MAPS[index % MAPS.len()],
        Method::StreamingLlm => "#2ca02c",
        Method::H2o => "#9467bd",
        Method::Quest => "#ff7f0e",
        Method::Previous => "#7f7f7f",
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
    let mut methods: Vec<(Method, &str)> = Vec::new();
    for row in rows {
        let method = row.setting.method;
        if method != Method::Dense && methods.iter().all(|m| m.0 != method) {
            methods.push((method, &row.name));
        }
    }
    for (index, (method, name)) in methods.into_iter().enumerate() {
        let mut points: Vec<(f64, f64)> = rows
            .iter()
            .filter(|row| row.setting.method == method)
            .map(|row| (row.figures.kept(), row.figures.mean_kl()))
            .collect();
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
            "<text x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"end\" fill=\"{colour}\">{name}</text>",
            x + right - 6.0
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::figures::Figures;
    use crate::eval::plan::Setting;

    #[test]
    fn a_panel_per_context_and_a_line_per_method() {
        let row = |context, method, name: &str| Row {
            context,
            setting: Setting { method, value: 0.9 },
            name: name.to_owned(),
            figures: Figures::default(),
        };
        let rows = [
            row(4096, Method::Map(0), "this map"),
            row(4096, Method::Quest, "Quest"),
            row(8192, Method::Map(0), "this map"),
        ];
        let plot = svg(&rows);
        assert_eq!(plot.matches("<polyline").count(), 3);
        assert!(plot.contains("context 4096") && plot.contains("context 8192"));
        assert!(plot.ends_with("</svg>\n"));
    }
}
