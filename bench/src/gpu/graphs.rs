//! [`Launching`]: whether passes are replayed as CUDA graphs, launched kernel by kernel, or measured both ways.

use clap::ValueEnum;

/// How passes are launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Launching {
    /// As graphs, where they repeat.
    Graphs,
    /// Kernel by kernel.
    Singly,
    /// One way after the other.
    Both,
}

impl Launching {
    /// Whether graphs are used, for each way to measure.
    pub fn ways(self) -> impl Iterator<Item = bool> {
        let both = [(false, Self::Singly), (true, Self::Graphs)];
        let wanted = move |&(_, way): &(bool, Self)| self == Self::Both || self == way;
        both.into_iter().filter(wanted).map(|(graphs, _)| graphs)
    }
}

/// What tables call it.
pub fn name_of(graphs: bool) -> &'static str {
    if graphs { "as graphs" } else { "singly" }
}
