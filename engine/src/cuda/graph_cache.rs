//! [`GraphCache`]: which lists of launches are worth a graph, and which graph is whose.
//!
//! Passes of a session are alike: their addresses and shapes stay while what differs (tokens, positions, lists) lies in device memory.
//! Lists are compared whole, launch by launch as they are written; those that differ mostly do so within the first layer, so
//! that no hash is needed to find out early.
//!
//! A graph holds addresses. One that has been given back and out again may appear in a list anew; the list is equal then, and what it
//! asks for is what the graph does. A list that names another address has another graph.

use super::recording::Recording;

/// Lists that are remembered, with a graph or without: a few per shape of a pass.
const CAPACITY: usize = 256;
/// Graphs that may be made before any has been of use.
const FREE_CAPTURES: u64 = 128;
/// Replays that pay for making a graph. Where shapes never settle, graphs are made at this rate at most.
const PAYS_AFTER: u64 = 8;

/// What has become of lists of launches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GraphCounts {
    /// Lists that were launched as a graph.
    pub replayed: u64,
    /// Graphs that were made.
    pub captured: u64,
    /// Lists that were launched one kernel at a time.
    pub singly: u64,
}

impl GraphCounts {
    /// What has been counted since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            replayed: self.replayed - earlier.replayed,
            captured: self.captured - earlier.captured,
            singly: self.singly - earlier.singly,
        }
    }
}

impl std::fmt::Display for GraphCounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            replayed,
            captured,
            singly,
        } = self;
        write!(
            f,
            "{replayed} lists of launches replayed as graphs, {singly} launched singly; {captured} graphs made"
        )
    }
}

struct Entry<G> {
    launches: Recording,
    graph: Option<G>,
}

/// Lists met lately, and the graphs of those that came again.
pub(super) struct GraphCache<G> {
    /// The one met last comes first.
    entries: Vec<Entry<G>>,
    /// The first entry with a graph that begins like the list being written.
    following: Option<usize>,
    counts: GraphCounts,
}

impl<G> GraphCache<G> {
    /// Nothing met yet.
    pub(super) fn new() -> Self {
        Self {
            entries: Vec::new(),
            following: None,
            counts: GraphCounts::default(),
        }
    }

    /// What has been counted.
    pub(super) fn counts(&self) -> GraphCounts {
        self.counts
    }

    /// Drops all graphs and lists.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.following = None;
    }

    fn next_like(&self, from: usize, launches: &Recording) -> Option<usize> {
        let like = |entry: &Entry<G>| entry.graph.is_some() && entry.launches.begins_like(launches);
        let found = self.entries.iter().skip(from).position(like);
        found.map(|at| from + at)
    }

    /// A new list begins.
    pub(super) fn begin(&mut self) {
        self.following = self.next_like(0, &Recording::default());
    }

    /// A launch was added to the list: whether it may still become one that has a graph.
    pub(super) fn follow(&mut self, launches: &Recording) -> bool {
        let Some(at) = self.following else {
            return false;
        };
        let last = launches.len() - 1;
        if !self.entries[at].launches.same_launch(launches, last) {
            self.following = self.next_like(at + 1, launches);
        }
        self.following.is_some()
    }

    /// The list that was followed has ended: its graph, if it has one.
    pub(super) fn graph(&mut self, launches: &Recording) -> Option<&G> {
        let first = self.following?;
        // Every launch was compared; what may be missing are launches at the end.
        let whole = |entry: &Entry<G>| {
            entry.graph.is_some()
                && entry.launches.len() == launches.len()
                && entry.launches.begins_like(launches)
        };
        let at = if self.entries[first].launches.len() == launches.len() {
            first
        } else {
            first + self.entries[first..].iter().position(whole)?
        };
        self.entries[..=at].rotate_right(1);
        self.counts.replayed += 1;
        self.entries[0].graph.as_ref()
    }

    /// A list was launched singly. It is taken in if it is new; true where a graph of it should be made and
    /// [kept](Self::keep).
    pub(super) fn remember(&mut self, launches: &mut Recording) -> bool {
        self.counts.singly += 1;
        let known = |entry: &Entry<G>| entry.launches == *launches;
        if let Some(at) = self.entries.iter().position(known) {
            self.entries[..=at].rotate_right(1);
            let allowed = FREE_CAPTURES + self.counts.replayed / PAYS_AFTER;
            return self.entries[0].graph.is_none() && self.counts.captured < allowed;
        }
        self.entries.truncate(CAPACITY - 1);
        let entry = Entry {
            launches: std::mem::take(launches),
            graph: None,
        };
        self.entries.insert(0, entry);
        false
    }

    /// Keeps the graph of the list that was remembered last.
    pub(super) fn keep(&mut self, graph: G) {
        if let Some(entry) = self.entries.first_mut() {
            entry.graph = Some(graph);
            self.counts.captured += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::recording::LaunchShape;
    use super::*;

    /// Graphs are named by the list they were made of.
    type Cache = GraphCache<Vec<u32>>;

    /// Runs a list of one launch per argument; whether it was replayed, and how many launches were held back until that was known.
    fn run(cache: &mut Cache, list: &[u32]) -> (bool, usize) {
        let shape = LaunchShape {
            grid: (1, 1, 1),
            threads: 32,
            shared_bytes: 0,
        };
        let (mut launches, mut held) = (Recording::default(), 0);
        cache.begin();
        for value in list {
            launches.write(std::ptr::null_mut(), shape, |l| {
                l.arg(value);
            });
            held += usize::from(cache.follow(&launches));
        }
        if let Some(graph) = cache.graph(&launches) {
            assert_eq!(graph, list, "a list is replayed by its own graph alone");
            assert_eq!(held, list.len(), "nothing was launched before");
            return (true, held);
        }
        if cache.remember(&mut launches) {
            cache.keep(list.to_vec());
        }
        (false, held)
    }

    fn replays(cache: &mut Cache, list: &[u32]) -> bool {
        run(cache, list).0
    }

    #[test]
    fn a_list_that_comes_again_gets_a_graph() {
        let mut cache = Cache::new();
        assert!(!replays(&mut cache, &[1, 2, 3]));
        assert!(!replays(&mut cache, &[1, 2, 3]));
        assert!(replays(&mut cache, &[1, 2, 3]));
        assert!(replays(&mut cache, &[1, 2, 3]));
        let counts = cache.counts();
        assert_eq!((counts.replayed, counts.captured, counts.singly), (2, 1, 2));
    }

    #[test]
    fn lists_that_differ_anywhere_are_others() {
        let mut cache = Cache::new();
        let lists: [&[u32]; 5] = [&[1, 2, 3], &[1, 2], &[1, 2, 3, 4], &[9, 2, 3], &[1, 2, 9]];
        for _ in 0..2 {
            for list in lists {
                assert!(!replays(&mut cache, list));
            }
        }
        for list in lists.iter().rev().chain(&lists) {
            assert!(replays(&mut cache, list));
        }
        assert!(!replays(&mut cache, &[1]));
        assert!(!replays(&mut cache, &[1, 9, 3]));
    }

    #[test]
    fn launches_are_held_back_only_while_a_graph_begins_like_them() {
        let mut cache = Cache::new();
        assert_eq!(run(&mut cache, &[1, 2, 3]), (false, 0));
        assert_eq!(run(&mut cache, &[1, 2, 3]), (false, 0));
        assert_eq!(run(&mut cache, &[1, 2, 4, 5]), (false, 2));
        assert_eq!(run(&mut cache, &[7, 2, 3]), (false, 0));
        assert_eq!(run(&mut cache, &[1, 2]), (false, 2));
        assert_eq!(run(&mut cache, &[1, 2, 3]), (true, 3));
    }

    #[test]
    fn what_was_met_longest_ago_is_forgotten() {
        let mut cache = Cache::new();
        let list = |i: usize| [i as u32, 1];
        for _ in 0..2 {
            replays(&mut cache, &list(0));
            replays(&mut cache, &list(1));
        }
        for i in 2..=CAPACITY {
            assert!(replays(&mut cache, &list(0)));
            replays(&mut cache, &list(i));
        }
        assert!(replays(&mut cache, &list(0)));
        assert!(!replays(&mut cache, &list(1)));
        assert_eq!(cache.entries.len(), CAPACITY);
    }

    #[test]
    fn graphs_that_are_of_no_use_are_made_no_more() {
        let mut cache = Cache::new();
        let mut next = 0;
        let mut twice = |cache: &mut Cache| {
            next += 1;
            replays(cache, &[next]);
            replays(cache, &[next]);
            next
        };
        for _ in 0..2 * FREE_CAPTURES {
            twice(&mut cache);
        }
        assert_eq!(cache.counts().captured, FREE_CAPTURES);
        // One that has a graph still.
        for _ in 0..PAYS_AFTER {
            assert!(replays(&mut cache, &[FREE_CAPTURES as u32]));
        }
        let last = twice(&mut cache);
        assert!(replays(&mut cache, &[last]));
        assert_eq!(cache.counts().captured, FREE_CAPTURES + 1);
    }
}
