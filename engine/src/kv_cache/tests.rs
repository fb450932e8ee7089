//! The pool against a model of it: whatever sequences do, every block is in exactly one place.

use std::cell::RefCell;
use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

/// What blocks hold, in place of a device: a number per position.
struct Memory(RefCell<Vec<u64>>);

impl Memory {
    fn new(pool: &BlockPool) -> Self {
        Self(RefCell::new(vec![0; pool.total() * BLOCK_TOKENS]))
    }

    fn place(sequence: &Sequence, position: usize) -> usize {
        let block = sequence.blocks()[position / BLOCK_TOKENS] as usize;
        block * BLOCK_TOKENS + position % BLOCK_TOKENS
    }

    /// A pass that appends `entries`.
    fn append(&self, sequence: &mut Sequence, entries: &[u64]) {
        let first = sequence.len();
        sequence.extend(entries.len());
        for (position, entry) in (first..).zip(entries) {
            self.0.borrow_mut()[Self::place(sequence, position)] = *entry;
        }
    }

    fn copy(&self, copies: &[(u32, u32)]) -> Result<(), EngineError> {
        for &(from, to) in copies {
            let from = from as usize * BLOCK_TOKENS;
            let to = to as usize * BLOCK_TOKENS;
            self.0
                .borrow_mut()
                .copy_within(from..from + BLOCK_TOKENS, to);
        }
        Ok(())
    }

    /// The entries of a sequence.
    fn of(&self, sequence: &Sequence) -> Vec<u64> {
        let memory = self.0.borrow();
        let entry = |position| memory[Self::place(sequence, position)];
        (0..sequence.len()).map(entry).collect()
    }
}

/// The entries of a prompt: each follows from all tokens up to its own and from its pass.
fn entries(prompt: &[u32]) -> Vec<u64> {
    let mut hash = 1u64;
    let entry = |(position, &token): (usize, &u32)| {
        let pass_end = prompt
            .len()
            .min((position / CHUNK_TOKENS + 1) * CHUNK_TOKENS);
        hash = hash
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(u64::from(token) + 1);
        hash ^ pass_end as u64
    };
    prompt.iter().enumerate().map(entry).collect()
}

/// Adoption where nothing is to be copied.
fn adopt(sequence: &mut Sequence, prompt: &[u32]) -> usize {
    sequence.adopt(prompt, |_| unreachable!()).unwrap()
}

/// Publication where nothing is to be copied.
fn publish(sequence: &mut Sequence, prompt: &[u32]) {
    sequence.publish(prompt, |_| unreachable!()).unwrap();
}

/// A sequence that may grow to `tokens`, with blocks for all of them.
fn reserved(pool: &Arc<BlockPool>, tokens: usize) -> Result<Sequence, EngineError> {
    let mut sequence = pool.sequence(tokens);
    sequence.reserve(tokens)?;
    Ok(sequence)
}

#[test]
fn budget_is_hard_and_blocks_come_back() {
    let pool = BlockPool::new(4);
    let a = reserved(&pool, 3 * BLOCK_TOKENS - 1).unwrap();
    assert_eq!((pool.used(), pool.total()), (3, 4));
    assert!(matches!(
        reserved(&pool, 2 * BLOCK_TOKENS),
        Err(EngineError::KvExhausted {
            wanted: 2,
            free: 1,
            total: 4
        })
    ));
    drop(a);
    assert_eq!(pool.used(), 0);
    assert_eq!(reserved(&pool, 4 * BLOCK_TOKENS).unwrap().blocks().len(), 4);
}

#[test]
fn truncation_only_shortens() {
    let pool = BlockPool::new(1);
    let mut s = reserved(&pool, 10).unwrap();
    s.extend(7);
    s.truncate(9);
    assert_eq!(s.len(), 7);
    s.truncate(3);
    assert_eq!(s.len(), 3);
}

/// Tokens of a prompt of `chunks` chunks that differs from others from chunk `from` on.
fn prompt(chunks: usize, from: usize, variant: u32) -> Vec<u32> {
    let tokens = 0..chunks * CHUNK_TOKENS;
    tokens
        .map(|i| i as u32 + if i >= from * CHUNK_TOKENS { variant } else { 0 })
        .collect()
}

#[test]
fn prompts_share_what_they_have_in_common() {
    let pool = BlockPool::new(20);
    let (first, second) = (prompt(3, 2, 0), prompt(3, 2, 9));
    let mut a = reserved(&pool, 3 * CHUNK_TOKENS).unwrap();
    assert_eq!(adopt(&mut a, &first), 0);
    a.extend(3 * CHUNK_TOKENS);
    publish(&mut a, &first);
    let mut b = pool.sequence(3 * CHUNK_TOKENS);
    assert_eq!(b.cost(&second, second.len()), CHUNK_BLOCKS);
    assert_eq!(adopt(&mut b, &second), 2 * CHUNK_TOKENS);
    assert_eq!(b.blocks(), &a.blocks()[..2 * CHUNK_BLOCKS]);
    b.reserve(3 * CHUNK_TOKENS).unwrap();
    assert_eq!(pool.used(), 4 * CHUNK_BLOCKS);
    drop(a);
    // The third chunk stays for whoever asks next, and goes when blocks are wanted.
    assert_eq!(
        (pool.used(), pool.cached()),
        (3 * CHUNK_BLOCKS, CHUNK_BLOCKS)
    );
    let mut c = pool.sequence(3 * CHUNK_TOKENS);
    assert_eq!(adopt(&mut c, &first), 3 * CHUNK_TOKENS);
    drop(c);
    let d = reserved(&pool, 8 * BLOCK_TOKENS).unwrap();
    assert_eq!((pool.available(), pool.sharing().evicted_blocks), (0, 4));
    drop((b, d));
    assert_eq!((pool.used(), pool.cached()), (0, 2 * CHUNK_BLOCKS));
    assert_eq!(pool.sharing().adopted_tokens as usize, 5 * CHUNK_TOKENS);
}

#[test]
fn two_that_computed_the_same_chunk_keep_one_copy() {
    let pool = BlockPool::new(8);
    let tokens = prompt(1, 0, 0);
    let mut both = [(); 2].map(|()| reserved(&pool, CHUNK_TOKENS).unwrap());
    for sequence in &mut both {
        sequence.extend(CHUNK_TOKENS);
        publish(sequence, &tokens);
    }
    assert_eq!(both[0].blocks(), both[1].blocks());
    assert_eq!(pool.used(), CHUNK_BLOCKS);
}

#[test]
fn truncation_within_a_shared_chunk_leaves_it_alone() {
    let pool = BlockPool::new(12);
    let tokens = prompt(2, 0, 0);
    let mut a = reserved(&pool, 2 * CHUNK_TOKENS + 9).unwrap();
    a.extend(2 * CHUNK_TOKENS);
    publish(&mut a, &tokens);
    a.truncate(CHUNK_TOKENS + 5);
    assert_eq!((a.len(), a.room()), (CHUNK_TOKENS, CHUNK_TOKENS));
    assert_eq!((pool.used(), pool.cached()), (CHUNK_BLOCKS, CHUNK_BLOCKS));
}

#[test]
fn tails_are_copied_to_and_fro() {
    let pool = BlockPool::new(20);
    let memory = Memory::new(&pool);
    let tokens = [&prompt(1, 0, 0)[..], &[5; 100]].concat();
    let entries = entries(&tokens);
    let mut a = reserved(&pool, 2 * CHUNK_TOKENS).unwrap();
    memory.append(&mut a, &entries[..CHUNK_TOKENS]);
    publish(&mut a, &tokens);
    memory.append(&mut a, &entries[CHUNK_TOKENS..]);
    // What could not be copied is not there.
    let failed = a.publish(&tokens, |_| Err(EngineError::Unsupported(String::new())));
    assert!(failed.is_err());
    assert_eq!((pool.used(), pool.cached()), (2 * CHUNK_BLOCKS, 0));
    a.publish(&tokens, |copies| memory.copy(copies)).unwrap();
    assert_eq!((pool.used(), pool.cached()), (2 * CHUNK_BLOCKS, 2));
    // Once is enough, and only what ends with the prompt.
    publish(&mut a, &tokens);
    memory.append(&mut a, &[7]);
    publish(&mut a, &tokens);

    let mut b = pool.sequence(2 * CHUNK_TOKENS);
    assert_eq!(adopt(&mut b, &tokens), CHUNK_TOKENS, "there is no room yet");
    b.reserve(CHUNK_TOKENS + 101).unwrap();
    assert_eq!(adopt(&mut b, &tokens[..tokens.len() - 1]), CHUNK_TOKENS);
    let failed = b.adopt(&tokens, |_| Err(EngineError::Unsupported(String::new())));
    assert!(failed.is_err() && b.len() == CHUNK_TOKENS);
    let length = b.adopt(&tokens, |copies| memory.copy(copies)).unwrap();
    assert_eq!(length, tokens.len());
    assert_eq!(adopt(&mut b, &tokens), tokens.len());
    assert_eq!(pool.sharing().adopted_tokens as usize, tokens.len());
    // Each goes on writing behind it, in a block of its own.
    memory.append(&mut b, &[8]);
    assert_eq!(memory.of(&a), [&entries[..], &[7]].concat());
    assert_eq!(memory.of(&b), [&entries[..], &[8]].concat());
    check(&pool, &[a, b]);
    assert_eq!((pool.used(), pool.cached()), (0, CHUNK_BLOCKS + 2));
}

#[derive(Debug, Clone)]
enum Act {
    Open,
    Grow(usize),
    Prefill(usize),
    Truncate(usize),
    Clear,
    Close,
}

fn acts() -> impl Strategy<Value = Vec<(usize, Act)>> {
    let act = prop_oneof![
        3 => Just(Act::Open),
        4 => (1usize..200).prop_map(Act::Grow),
        6 => (0usize..5).prop_map(Act::Prefill),
        2 => (0usize..1_200).prop_map(Act::Truncate),
        1 => Just(Act::Clear),
        2 => Just(Act::Close),
    ];
    prop::collection::vec((0usize..5, act), 1..80)
}

/// Every block is free, or in the tree, or in exactly one sequence, and sequences share only what they may.
fn check(pool: &Arc<BlockPool>, sequences: &[Sequence]) {
    let mut owned = HashSet::new();
    let mut shared = HashSet::new();
    for sequence in sequences {
        let own = sequence.shared.len() * CHUNK_BLOCKS;
        shared.extend(&sequence.blocks[..own]);
        for block in &sequence.blocks[own..] {
            assert!(owned.insert(*block), "block {block} belongs to two");
        }
        assert!(sequence.len <= sequence.room());
        assert!(sequence.len >= sequence.shared.len() * CHUNK_TOKENS);
    }
    assert!(owned.is_disjoint(&shared));
    let free: Vec<u32> = pool.state().free.clone();
    let distinct: HashSet<u32> = free.iter().copied().collect();
    assert_eq!(distinct.len(), free.len(), "a block is free twice");
    assert!(distinct.is_disjoint(&owned) && distinct.is_disjoint(&shared));
    assert_eq!(owned.len() + shared.len(), pool.used());
    assert_eq!(free.len() + pool.cached() + pool.used(), pool.total());
}

proptest! {
    #[test]
    fn no_block_is_lost_or_used_twice(acts in acts()) {
        let pool = BlockPool::new(24);
        let memory = Memory::new(&pool);
        let capacity = 4 * CHUNK_TOKENS + 100;
        let (mut sequences, mut expected): (Vec<Sequence>, Vec<Vec<u64>>) = Default::default();
        let prompts = [
            prompt(4, 0, 7),
            [prompt(3, 1, 7), vec![1; 90]].concat(),
            [prompt(3, 2, 7), vec![2; 180]].concat(),
            [prompt(3, 2, 7), vec![3; 64]].concat(),
            vec![4; 30],
        ];
        let mut generated = 0;
        for (which, act) in acts {
            let at = which % sequences.len().max(1);
            match (act, sequences.get_mut(at)) {
                (Act::Open, _) => {
                    sequences.push(pool.sequence(capacity));
                    expected.push(Vec::new());
                }
                (Act::Grow(tokens), Some(sequence)) => {
                    let end = (sequence.len() + tokens).min(capacity);
                    if sequence.reserve(end).is_ok() {
                        let more = end - sequence.len();
                        let new: Vec<u64> = (generated..).take(more).collect();
                        generated += more as u64;
                        memory.append(sequence, &new);
                        expected[at].extend(new);
                    }
                }
                (Act::Prefill(which), Some(sequence)) => {
                    sequence.clear();
                    let (prompt, entries) = (&prompts[which], entries(&prompts[which]));
                    loop {
                        let copy = |copies: &[(u32, u32)]| memory.copy(copies);
                        let first = sequence.adopt(prompt, copy).unwrap();
                        let end = prompt.len().min((first / CHUNK_TOKENS + 1) * CHUNK_TOKENS);
                        if first == end || sequence.reserve(end).is_err() {
                            break;
                        }
                        // There may be room for a tail now.
                        if sequence.adopt(prompt, copy).unwrap() == first {
                            memory.append(sequence, &entries[first..end]);
                            sequence.publish(prompt, copy).unwrap();
                        }
                    }
                    expected[at] = entries[..sequence.len()].to_vec();
                }
                (Act::Truncate(len), Some(sequence)) => {
                    sequence.truncate(len);
                    expected[at].truncate(sequence.len());
                }
                (Act::Clear, Some(sequence)) => {
                    sequence.clear();
                    expected[at].clear();
                }
                (Act::Close, Some(_)) => {
                    drop(sequences.remove(at));
                    expected.remove(at);
                }
                (_, None) => {}
            }
            check(&pool, &sequences);
            for (sequence, expected) in sequences.iter().zip(&expected) {
                prop_assert_eq!(&memory.of(sequence), expected);
            }
        }
        sequences.clear();
        prop_assert_eq!(pool.used(), 0);
        // What is cached can all be had again.
        prop_assert!(reserved(&pool, 24 * BLOCK_TOKENS).is_ok());
    }
}
