//! The bar that shows on a terminal while weights load.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressStyle};

/// What the bar looks like.
const TEMPLATE: &str = "{msg} [{bar:32}] {bytes}/{total_bytes}";

/// A bar named `what`, on standard error; none where that is no terminal, or when not wanted.
pub(crate) fn bar(what: &str, wanted: bool) -> ProgressBar {
    if !wanted || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(TEMPLATE).expect("the template is well-formed");
    ProgressBar::no_length()
        .with_style(style.progress_chars("=> "))
        .with_message(what.to_owned())
}

/// Moves the bar to `done` of `total` bytes.
pub(crate) fn advance(bar: &ProgressBar, done: u64, total: u64) {
    bar.set_length(total);
    bar.set_position(done);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_parses() {
        ProgressStyle::with_template(TEMPLATE).unwrap();
        advance(&bar("x", false), 1, 2);
    }
}
