//! The results as text: a Markdown table and CSV.

use std::fmt::Write;

use crate::eval::figures::Figures;
use crate::eval::plan::Setting;

/// One row of the results.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Tokens per window.
    pub context: usize,
    /// What was measured.
    pub setting: Setting,
    /// The method's name.
    pub name: String,
    /// What it came to, over all windows.
    pub figures: Figures,
}

/// A Markdown table.
pub fn markdown(rows: &[Row]) -> String {
    let mut text = "| context | method | p or budget | KV kept | KL to dense | top-1 | perplexity | mask bytes/round | draft and target bytes |\n\
        | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    for row in rows {
        let f = &row.figures;
        let (bytes, system) = if f.mask_bytes > 0 {
            let system = format!("{:.1} %", 100.0 * f.system_kept());
            (format!("{:.0}", f.mask_bytes_per_round()), system)
        } else {
            Default::default()
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:.1} % | {:.4} | {:.3} | {:.2} ({:+.2} %) | {bytes} | {system} |",
            row.context,
            row.name,
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
        mask_bytes_per_round,system_kept\n"
        .to_owned();
    for row in rows {
        let f = &row.figures;
        let _ = writeln!(
            text,
            "{},\"{}\",{},{},{},{},{:.6},{:.6},{:.6},{:.4},{:.6},{:.1},{:.6}",
            row.context,
            row.name,
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
            f.system_kept(),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::plan::Method;
    use specattn_engine::KvReads;

    #[test]
    fn the_table_has_every_figure() {
        let row = Row {
            context: 4096,
            setting: Setting {
                method: Method::Map(0),
                value: 0.9,
            },
            name: "this map".to_owned(),
            figures: Figures {
                positions: 100,
                kl: 0.5,
                agreements: 95,
                nll: 300.0,
                dense_nll: 299.0,
                kv: KvReads {
                    read: 20,
                    dense: 100,
                },
                system_bytes: KvReads {
                    read: 600,
                    dense: 2_000,
                },
                rounds: 20,
                mask_bytes: 8_000,
            },
        };
        let table = markdown(std::slice::from_ref(&row));
        assert!(
            table.contains(
                "| 4096 | this map | 0.9 | 20.0 % | 0.0050 | 0.950 | 20.09 (+1.01 %) | 400 | 30.0 % |"
            ),
            "{table}"
        );
        assert_eq!(csv(&[row]).lines().count(), 2);
    }
}
