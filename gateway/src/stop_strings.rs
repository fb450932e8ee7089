//! [`StopStrings`]: finds stop strings in text that arrives in pieces.
//!
//! Where the text is cut does not depend on how it was split: the match that ends first wins, as if the text had come
//! one character at a time, and of matches that end together the longest.

/// What came of a piece of text.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Scan {
    /// Text that is certain not to belong to a stop string.
    pub(crate) text: String,
    /// The stop string that was completed; nothing after it counts.
    pub(crate) stop: Option<String>,
}

/// The stop strings of a session and the text held back because one of them may have begun in it.
#[derive(Debug)]
pub(crate) struct StopStrings {
    /// None of them empty.
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes the next piece of text.
    pub(crate) fn push(&mut self, text: &str) -> Scan {
        if text.is_empty() {
            return Scan::default();
        }
        self.held.push_str(text);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| {
                let start = self.held.find(stop.as_str())?;
                Some((start + stop.len(), start, stop))
            })
            .min();
        if let Some((_, start, stop)) = first {
            let stop = stop.clone();
            self.held.truncate(start);
            return Scan {
                text: std::mem::take(&mut self.held),
                stop: Some(stop),
            };
        }
        let kept = self
            .stops
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max();
        let certain = self.held.len() - kept.unwrap_or(0);
        let rest = self.held.split_off(certain);
        Scan {
            text: std::mem::replace(&mut self.held, rest),
            stop: None,
        }
    }

    /// No more text comes: what was held back is certain after all.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that a proper beginning of `stop` equals.
///
/// It always falls on a character boundary of both: the bytes are equal and begin where a character of `stop` does.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|&len| text.as_bytes().ends_with(&stop.as_bytes()[..len]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run<'a>(
        stops: &[&str],
        pieces: impl IntoIterator<Item = &'a str>,
    ) -> (String, Option<String>) {
        let mut scanner = StopStrings::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut shown = String::new();
        for piece in pieces {
            let scan = scanner.push(piece);
            shown.push_str(&scan.text);
            if scan.stop.is_some() {
                return (shown, scan.stop);
            }
        }
        shown.push_str(&scanner.finish());
        (shown, None)
    }

    #[test]
    fn a_stop_split_over_pieces_is_found() {
        let got = run(&["</end>"], ["one <", "/e", "nd", "> two"]);
        assert_eq!(got, ("one ".to_owned(), Some("</end>".to_owned())));
    }

    #[test]
    fn a_false_beginning_is_released() {
        let got = run(&["</end>"], ["one <", "/e", "ast> two <"]);
        assert_eq!(got, ("one </east> two <".to_owned(), None));
    }

    #[test]
    fn text_before_a_possible_beginning_is_not_held() {
        let mut scanner = StopStrings::new(vec!["##".to_owned()]);
        assert_eq!(scanner.push("head #").text, "head ");
        assert_eq!(scanner.push("x").text, "#x");
    }

    #[test]
    fn the_match_that_ends_first_wins() {
        assert_eq!(run(&["abcd", "bc"], ["xabcd"]).1.as_deref(), Some("bc"));
        assert_eq!(
            run(&["bc", "abc"], ["xabc"]),
            ("x".to_owned(), Some("abc".to_owned()))
        );
    }

    proptest! {
        #[test]
        fn the_split_does_not_matter(
            text in "[abé]{0,40}",
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            cuts in prop::collection::vec(1..6_usize, 0..40),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let one_by_one: Vec<String> = text.chars().map(String::from).collect();
            let want = run(&stops, one_by_one.iter().map(String::as_str));
            let chars: Vec<char> = text.chars().collect();
            let mut pieces = Vec::new();
            let mut rest = &chars[..];
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece.iter().collect::<String>());
                rest = tail;
            }
            pieces.push(rest.iter().collect());
            prop_assert_eq!(run(&stops, pieces.iter().map(String::as_str)), want);
        }
    }
}
