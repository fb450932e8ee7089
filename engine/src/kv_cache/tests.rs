//! The pool against a model of it: whatever sequences do, every block is in exactly one place.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

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
    assert_eq!(a.adopt(&first), 0);
    a.extend(3 * CHUNK_TOKENS);
    a.publish(&first);
    let mut b = pool.sequence(3 * CHUNK_TOKENS);
    assert_eq!(b.cost(&second, second.len()), CHUNK_BLOCKS);
    assert_eq!(b.adopt(&second), 2 * CHUNK_TOKENS);
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
    assert_eq!(c.adopt(&first), 3 * CHUNK_TOKENS);
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
        sequence.publish(&tokens);
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
    a.publish(&tokens);
    a.truncate(CHUNK_TOKENS + 5);
    assert_eq!((a.len(), a.room()), (CHUNK_TOKENS, CHUNK_TOKENS));
    assert_eq!((pool.used(), pool.cached()), (CHUNK_BLOCKS, CHUNK_BLOCKS));
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
        6 => (0usize..3).prop_map(Act::Prefill),
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
        let capacity = 4 * CHUNK_TOKENS + 100;
        let mut sequences: Vec<Sequence> = Vec::new();
        let prompts: Vec<Vec<u32>> = (0..3).map(|v| prompt(4, v as usize, 7)).collect();
        for (which, act) in acts {
            let at = which % sequences.len().max(1);
            match (act, sequences.get_mut(at)) {
                (Act::Open, _) => sequences.push(pool.sequence(capacity)),
                (Act::Grow(tokens), Some(sequence)) => {
                    let end = (sequence.len() + tokens).min(capacity);
                    if sequence.reserve(end).is_ok() {
                        sequence.extend(end - sequence.len());
                    }
                }
                (Act::Prefill(variant), Some(sequence)) => {
                    sequence.clear();
                    let prompt = &prompts[variant];
                    while sequence.adopt(prompt) < prompt.len() {
                        let end = sequence.len() + CHUNK_TOKENS;
                        if sequence.reserve(end).is_err() {
                            break;
                        }
                        sequence.extend(CHUNK_TOKENS);
                        sequence.publish(prompt);
                    }
                }
                (Act::Truncate(len), Some(sequence)) => sequence.truncate(len),
                (Act::Clear, Some(sequence)) => sequence.clear(),
                (Act::Close, Some(_)) => drop(sequences.remove(at)),
                (_, None) => {}
            }
            check(&pool, &sequences);
        }
        sequences.clear();
        prop_assert_eq!(pool.used(), 0);
        // What is cached can all be had again.
        prop_assert!(reserved(&pool, 24 * BLOCK_TOKENS).is_ok());
    }
}
