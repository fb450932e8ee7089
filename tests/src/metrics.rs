//! [`Page`]: what a service shows at `/metrics`, read.

use std::collections::BTreeMap;

use crate::{Process, http};

/// The samples of a page, by name; those of one name are summed over labels.
#[derive(Debug, Default)]
pub struct Page(BTreeMap<String, f64>);

impl Page {
    /// Asks `service`.
    pub async fn of(service: &Process) -> Self {
        Self::parse(&http::get(service.uri(), "/metrics").await)
    }

    fn parse(text: &str) -> Self {
        let mut samples = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').expect("a sample has a value");
            let name = series.split('{').next().unwrap_or(series);
            let value: f64 = value.parse().expect("a value is a number");
            *samples.entry(name.to_owned()).or_default() += value;
        }
        assert!(text.ends_with("# EOF\n"), "the page is whole");
        Self(samples)
    }

    /// Whether there is a sample of this name.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A sample's value.
    pub fn value(&self, name: &str) -> f64 {
        *self
            .0
            .get(name)
            .unwrap_or_else(|| panic!("no {name} in {:?}", self.0.keys()))
    }
}
