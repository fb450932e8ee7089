//! Latency and throughput against load, as SVG.

use std::fmt::Write;

use crate::bench::report::{LoadReport, Report};
use crate::bench::tally::Quantiles;

const PANEL_WIDTH: f64 = 420.0;
const PANEL_HEIGHT: f64 = 300.0;
/// Left, right, top and bottom of a panel's axes.
const AXES: (f64, f64, f64, f64) = (64.0, 400.0, 36.0, 250.0);
const GREY: &str = "#ddd";

/// A curve: its name, its colour and its points, of which the missing ones are left out.
struct Curve {
    name: &'static str,
    colour: &'static str,
    points: Vec<(f64, f64)>,
}

/// Which latency of a load.
type Latency = fn(&LoadReport) -> &Quantiles;

/// Four panels: time to the first token, time per token, end to end (logarithmic), and tokens/s.
pub fn svg(report: &Report) -> String {
    let (width, height) = (2.0 * PANEL_WIDTH, 2.0 * PANEL_HEIGHT);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let loads = &report.loads;
    let latencies: [(&str, Latency); 3] = [
        ("time to first token, ms", |l| &l.figures.ttft_ms),
        ("time per token, ms", |l| &l.figures.itl_ms),
        ("end to end, ms", |l| &l.figures.e2e_ms),
    ];
    let unit = loads.first().map_or("load", |load| load.unit);
    let most = loads
        .iter()
        .map(|l| l.load)
        .fold(f64::MIN_POSITIVE, f64::max);
    for (index, (name, of)) in latencies.into_iter().enumerate() {
        let curve = |name, colour, value: fn(&Quantiles) -> Option<f64>| Curve {
            name,
            colour,
            points: sorted(loads.iter().filter_map(|l| Some((l.load, value(of(l))?)))),
        };
        let curves = [
            curve("p99", "#d62728", |q| q.p99),
            curve("p95", "#ff7f0e", |q| q.p95),
            curve("p50", "#1f77b4", |q| q.p50),
        ];
        let scale = Scale::logarithmic(&curves);
        panel(
            &mut text,
            index,
            (&format!("{name}, by {unit}"), most),
            &scale,
            &curves,
        );
    }
    let tokens = [Curve {
        name: "tokens/s",
        colour: "#2ca02c",
        points: sorted(loads.iter().map(|l| (l.load, l.figures.tokens_per_second))),
    }];
    let scale = Scale::linear(&tokens);
    panel(
        &mut text,
        3,
        (&format!("tokens/s, by {unit}"), most),
        &scale,
        &tokens,
    );
    text.push_str("</svg>\n");
    text
}

fn sorted(points: impl Iterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let mut points: Vec<_> = points.collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

/// A vertical axis.
enum Scale {
    /// From zero to this.
    Linear(f64),
    /// Between two powers of ten.
    Decades(i32, i32),
}

impl Scale {
    fn linear(curves: &[Curve]) -> Self {
        let most = values(curves).fold(0.0, f64::max);
        let step = 10f64.powf(most.max(1e-9).log10().floor());
        Self::Linear((most / step).ceil().max(1.0) * step)
    }

    fn logarithmic(curves: &[Curve]) -> Self {
        let (low, high) = values(curves)
            .filter(|&v| v > 0.0)
            .fold((f64::MAX, 0.0_f64), |(low, high), v| {
                (low.min(v), high.max(v))
            });
        if high <= 0.0 {
            return Self::Decades(0, 1);
        }
        let low = low.log10().floor() as i32;
        Self::Decades(low, (high.log10().ceil() as i32).max(low + 1))
    }

    /// Where on the axis a value lies, from 0 to 1.
    fn share(&self, value: f64) -> f64 {
        let share = match *self {
            Self::Linear(most) => value / most,
            Self::Decades(low, high) => {
                (value.max(1e-9).log10() - f64::from(low)) / f64::from(high - low)
            }
        };
        share.clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        match *self {
            Self::Linear(most) => (0..=4)
                .map(|quarter| most * f64::from(quarter) / 4.0)
                .collect(),
            Self::Decades(low, high) => (low..=high).map(|power| 10f64.powi(power)).collect(),
        }
    }
}

fn values(curves: &[Curve]) -> impl Iterator<Item = f64> {
    curves
        .iter()
        .flat_map(|curve| curve.points.iter().map(|point| point.1))
}

/// Draws panel `index`; `title` comes with the largest load.
fn panel(text: &mut String, index: usize, title: (&str, f64), scale: &Scale, curves: &[Curve]) {
    let (title, most) = title;
    let (left, right, top, bottom) = AXES;
    let corner = (
        PANEL_WIDTH * (index % 2) as f64,
        PANEL_HEIGHT * (index / 2) as f64,
    );
    let across = |load: f64| left + (right - left) * load / most;
    let down = |value: f64| bottom - (bottom - top) * scale.share(value);
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "<g transform=\"translate({},{})\">",
        corner.0, corner.1
    );
    let _ = writeln!(
        text,
        "<text x=\"{:.1}\" y=\"20\" text-anchor=\"middle\" font-weight=\"bold\">{title}</text>",
        (left + right) / 2.0
    );
    for tick in scale.ticks() {
        let y = down(tick);
        let _ = writeln!(
            text,
            "<line x1=\"{left}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"{GREY}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>",
            left - 6.0,
            y + 4.0
        );
    }
    let loads = curves
        .iter()
        .map(|curve| &curve.points)
        .max_by_key(|points| points.len());
    for &(load, _) in loads.into_iter().flatten() {
        let x = across(load);
        let _ = writeln!(
            text,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\" stroke=\"{GREY}\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{load}</text>",
            bottom + 16.0
        );
    }
    for (row, curve) in curves.iter().enumerate() {
        draw(text, curve, |(load, value)| (across(load), down(value)));
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{}\">{}</text>",
            left + 8.0,
            top + 14.0 + 15.0 * row as f64,
            curve.colour,
            curve.name
        );
    }
    text.push_str("</g>\n");
}

fn draw(text: &mut String, curve: &Curve, place: impl Fn((f64, f64)) -> (f64, f64)) {
    let colour = curve.colour;
    let places: Vec<(f64, f64)> = curve.points.iter().map(|&point| place(point)).collect();
    let line: Vec<String> = places
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    let _ = writeln!(
        text,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
        line.join(" ")
    );
    for (x, y) in places {
        let _ = writeln!(
            text,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::report;

    #[test]
    fn every_quantile_has_a_line_with_a_point_per_load() {
        let plot = svg(&report());
        assert_eq!(plot.matches("<polyline").count(), 10);
        // Two loads; the end-to-end panel has no samples.
        assert_eq!(plot.matches("<circle").count(), 2 * 7);
        assert_eq!(plot.matches("<g ").count(), plot.matches("</g>").count());
        assert!(!plot.contains("NaN") && !plot.contains("inf"), "{plot}");
    }

    #[test]
    fn no_loads_make_an_empty_plot() {
        let mut report = report();
        report.loads.clear();
        assert!(!svg(&report).contains("NaN"));
    }

    #[test]
    fn axes_hold_their_values() {
        let curves = [Curve {
            name: "",
            colour: "",
            points: vec![(1.0, 3.0), (2.0, 470.0)],
        }];
        let scale = Scale::logarithmic(&curves);
        assert_eq!(scale.ticks(), [1.0, 10.0, 100.0, 1000.0]);
        assert!(scale.share(3.0) > 0.0 && scale.share(470.0) < 1.0);
        assert_eq!(Scale::linear(&curves).ticks()[4], 500.0);
    }
}
