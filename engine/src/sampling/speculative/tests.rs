//! The statistical tests use Pearson's chi-square on fixed seeds at a significance of 1e-4 per case: a correct rule would
//! fail one of ten thousand seeds, and the seeds here are ones that pass.

use super::*;

/// Upper 1e-4 quantile of the standard normal distribution.
const Z: f64 = 3.719;
const SAMPLES: u64 = 100_000;

fn sparse(ids: &[u32], probs: &[f32]) -> SparseDistribution {
    SparseDistribution {
        ids: ids.to_vec(),
        probs: probs.to_vec(),
    }
}

/// A next-token law: probabilities given the previous token, so that the joint distribution has something to get wrong.
struct Law(Vec<Distribution>);

impl Law {
    fn new(rows: &[&[f32]]) -> Self {
        let row = |row: &&[f32]| Distribution::from_weights(row.to_vec()).unwrap();
        Self(rows.iter().map(row).collect())
    }

    fn after(&self, token: u32) -> &Distribution {
        &self.0[token as usize]
    }

    fn vocab_size(&self) -> usize {
        self.0.len()
    }
}

/// How a round is judged: the rule itself, or a wrong one to show that the test sees it.
type Judge = fn(&[Distribution], &[DraftToken], &CounterRng, &[u32]) -> RoundOutcome;

/// The rule, for a round of draft tokens.
fn judge(
    target: &[Distribution],
    draft: &[DraftToken],
    rng: &CounterRng,
    before: &[u32],
) -> RoundOutcome {
    let candidates: Vec<Candidate<'_>> = draft.iter().map(Candidate::from).collect();
    verify_round(target, &candidates, rng, before)
}

/// A round of `gamma` draft tokens behind a text, whose q keeps `entries` entries, and the distributions that judge it.
fn propose(
    (target, draft): (&Law, &Law),
    (gamma, entries): (usize, usize),
    text: &[u32],
    rng: &CounterRng,
) -> (Vec<Distribution>, Vec<DraftToken>) {
    let mut previous = text[text.len() - 1];
    let mut p = vec![target.after(previous).clone()];
    let mut proposal = Vec::new();
    for step in 0..gamma {
        let position = (text.len() + step) as u64;
        let (token, q) = draft_token(draft.after(previous), entries, rng, position);
        proposal.push(DraftToken { token, q: Some(q) });
        p.push(target.after(token).clone());
        previous = token;
    }
    (p, proposal)
}

/// `length` tokens after token 0, by rounds of `gamma` draft tokens whose q keeps `entries` entries.
fn generate(
    (target, draft): (&Law, &Law),
    (gamma, entries): (usize, usize),
    length: usize,
    seed: u64,
    judge: Judge,
) -> Vec<u32> {
    let rng = CounterRng::new(seed);
    let draft_rng = CounterRng::for_draft(rng.draft_seed());
    let mut tokens = vec![0];
    while tokens.len() <= length {
        let position = tokens.len() as u64;
        let (p, proposal) = propose((target, draft), (gamma, entries), &tokens, &draft_rng);
        check_draft(&proposal, false, target.vocab_size(), &rng, position).unwrap();
        let outcome = judge(&p, &proposal, &rng, &tokens);
        tokens.extend(proposal[..outcome.accepted].iter().map(|d| d.token));
        tokens.push(outcome.next_token);
    }
    tokens[1..=length].to_vec()
}

/// `length` tokens after token 0 by a draft that has a round of two tokens there only now and then: where it guessed the token that the
/// target added before, or, `by_own`, by the numbers that the target's token is drawn with behind the round's own text.
fn generate_when_there(
    (target, draft): (&Law, &Law),
    length: usize,
    seed: u64,
    by_own: bool,
) -> Vec<u32> {
    let rng = CounterRng::new(seed);
    let draft_rng = CounterRng::for_draft(rng.draft_seed());
    let (mut tokens, mut guessed) = (vec![0], true);
    let leader = |text: &[u32]| {
        let noise = draft_rng
            .behind(text.iter().copied())
            .noise(text.len() as u64);
        draft.after(text[text.len() - 1]).contenders(&noise, 1)[0].0
    };
    while tokens.len() <= length {
        let is_there = if by_own { leader(&tokens) > 2 } else { guessed };
        let gamma = if is_there { 2 } else { 0 };
        let (p, proposal) = propose((target, draft), (gamma, 5), &tokens, &draft_rng);
        let outcome = judge(&p, &proposal, &rng, &tokens);
        tokens.extend(proposal[..outcome.accepted].iter().map(|d| d.token));
        guessed = leader(&tokens) == outcome.next_token;
        tokens.push(outcome.next_token);
    }
    tokens[1..=length].to_vec()
}

/// See [`chi_square`]: rounds of so many draft tokens and entries, by this judge.
fn joint_chi_square(laws: (&Law, &Law), round: (usize, usize), seed: u64, judge: Judge) -> f64 {
    chi_square(laws.0, |sample| {
        generate(laws, round, LENGTH, seed << 32 | sample, judge)
    })
}

/// Tokens whose joint distribution is looked at.
const LENGTH: usize = 3;

/// The statistic's distance from its expectation in standard deviations (Wilson and Hilferty's approximation), over the joint
/// distribution of the tokens that `generate` gives. Cells expected fewer than five times are pooled; impossible ones must be empty.
fn chi_square(target: &Law, generate: impl Fn(u64) -> Vec<u32>) -> f64 {
    let vocab = target.vocab_size();
    let mut counts = vec![0_u32; vocab.pow(LENGTH as u32)];
    for sample in 0..SAMPLES {
        let tokens = generate(sample);
        let cell = tokens.iter().fold(0, |cell, &t| cell * vocab + t as usize);
        counts[cell] += 1;
    }
    let (mut statistic, mut cells) = (0.0, 0);
    let mut pool = (0.0, 0.0);
    for (cell, &count) in counts.iter().enumerate() {
        let (mut previous, mut expected) = (0, SAMPLES as f64);
        for place in (0..LENGTH).rev() {
            let token = (cell / vocab.pow(place as u32) % vocab) as u32;
            expected *= f64::from(target.after(previous).prob(token));
            previous = token;
        }
        if expected == 0.0 {
            assert_eq!(count, 0, "impossible tokens were generated");
        } else if expected < 5.0 {
            pool = (pool.0 + expected, pool.1 + f64::from(count));
        } else {
            statistic += (f64::from(count) - expected).powi(2) / expected;
            cells += 1;
        }
    }
    if pool.0 > 0.0 {
        statistic += (pool.1 - pool.0).powi(2) / pool.0;
        cells += 1;
    }
    let freedom = f64::from(cells - 1);
    let spread = 2.0 / (9.0 * freedom);
    ((statistic / freedom).cbrt() - (1.0 - spread)) / spread.sqrt()
}

fn target() -> Law {
    Law::new(&[
        &[0.05, 0.40, 0.30, 0.20, 0.05],
        &[0.25, 0.00, 0.50, 0.05, 0.20],
        &[0.20, 0.20, 0.20, 0.20, 0.20],
        &[0.90, 0.04, 0.03, 0.02, 0.01],
        &[0.10, 0.10, 0.00, 0.00, 0.80],
    ])
}

/// Near the target, as a good draft is.
fn close_draft() -> Law {
    Law::new(&[
        &[0.10, 0.35, 0.30, 0.15, 0.10],
        &[0.20, 0.10, 0.45, 0.05, 0.20],
        &[0.10, 0.30, 0.25, 0.15, 0.20],
        &[0.80, 0.05, 0.05, 0.05, 0.05],
        &[0.15, 0.05, 0.05, 0.05, 0.70],
    ])
}

/// Far from it.
fn far_draft() -> Law {
    Law::new(&[
        &[0.70, 0.05, 0.05, 0.10, 0.10],
        &[0.02, 0.90, 0.02, 0.03, 0.03],
        &[0.01, 0.01, 0.01, 0.01, 0.96],
        &[0.01, 0.09, 0.20, 0.30, 0.40],
        &[0.20, 0.20, 0.20, 0.20, 0.20],
    ])
}

/// After tokens 0, 3 and 4 the target never gives what this proposes.
fn disjoint() -> (Law, Law) {
    let target = Law::new(&[
        &[0.0, 0.6, 0.4, 0.0, 0.0],
        &[0.1, 0.2, 0.3, 0.4, 0.0],
        &[0.5, 0.5, 0.0, 0.0, 0.0],
        &[0.3, 0.7, 0.0, 0.0, 0.0],
        &[1.0, 0.0, 0.0, 0.0, 0.0],
    ]);
    let draft = Law::new(&[
        &[0.5, 0.0, 0.0, 0.3, 0.2],
        &[0.4, 0.3, 0.2, 0.1, 0.0],
        &[0.0, 0.0, 0.0, 0.5, 0.5],
        &[0.0, 0.0, 1.0, 0.0, 0.0],
        &[0.0, 1.0, 0.0, 0.0, 0.0],
    ]);
    (target, draft)
}

#[test]
fn rounds_have_the_targets_joint_distribution() {
    let (disjoint_target, disjoint_draft) = disjoint();
    let cases = [
        ("close", target(), close_draft()),
        ("far", target(), far_draft()),
        ("equal", target(), target()),
        ("disjoint", disjoint_target, disjoint_draft),
    ];
    for (seed, (name, target, draft)) in cases.iter().enumerate() {
        for gamma in 1..=4 {
            // Whole, truncated to the two largest entries, and once to a single one.
            let truncations: &[usize] = if gamma == 3 { &[5, 2, 1] } else { &[5, 2] };
            for &entries in truncations {
                let seed = (seed * 100 + gamma * 10 + entries) as u64;
                let z = joint_chi_square((target, draft), (gamma, entries), seed, judge);
                assert!(z < Z, "{name}, γ = {gamma}, {entries} entries: z = {z:.2}");
            }
        }
    }
}

#[test]
fn steps_without_a_draft_have_the_targets_joint_distribution() {
    let laws = (&target(), &close_draft());
    let z = joint_chi_square(laws, (0, 1), 7, judge);
    assert!(z < Z, "z = {z:.2}");
}

#[test]
fn a_draft_may_guess_what_the_target_adds_but_not_by_whether_it_proposes() {
    let (target, draft) = (target(), close_draft());
    let z = |by_own: bool| {
        chi_square(&target, |sample| {
            generate_when_there((&target, &draft), LENGTH, 9 << 32 | sample, by_own)
        })
    };
    assert!(z(false) < Z, "z = {:.2}", z(false));
    // Were rounds there or not by the numbers behind their own text, what comes out would tell.
    assert!(z(true) > 2.0 * Z, "z = {:.2}", z(true));
}

#[test]
fn the_test_sees_a_wrong_rule() {
    // Recovers from p instead of the residual.
    fn from_p(
        p: &[Distribution],
        d: &[DraftToken],
        rng: &CounterRng,
        before: &[u32],
    ) -> RoundOutcome {
        let mut outcome = judge(p, d, rng, before);
        if outcome.accepted < d.len() {
            let noise = rng.noise((before.len() + outcome.accepted) as u64);
            outcome.next_token = p[outcome.accepted].draw(&noise);
        }
        outcome
    }
    let z = joint_chi_square((&target(), &close_draft()), (2, 5), 1, from_p);
    assert!(z > 2.0 * Z, "z = {z:.2}");
}

/// Tokens drawn from one target distribution and confirmed by another, as in the exact mode.
#[test]
fn provisional_tokens_are_confirmed_into_the_confirming_distribution() {
    let laws = [(target(), far_draft()), disjoint()];
    for (case, (dense, sparse)) in laws.iter().enumerate() {
        let mut counts = [0_u32; 25];
        for seed in 0..SAMPLES {
            let rng = CounterRng::new((case as u64) << 32 | seed);
            let mut tokens = vec![0_u32];
            while tokens.len() < 3 {
                let position = tokens.len() as u64;
                let previous = tokens[tokens.len() - 1];
                let q = sparse.after(previous);
                let token = q.draw(&rng.provisional(0).noise(position));
                let candidate = Candidate {
                    token,
                    origin: Origin::Target(q),
                };
                let p = [previous, token].map(|token| dense.after(token).clone());
                let outcome = verify_round(&p, &[candidate], &rng, &tokens);
                tokens.extend((outcome.accepted == 1).then_some(token));
                tokens.push(outcome.next_token);
            }
            counts[(tokens[1] * 5 + tokens[2]) as usize] += 1;
        }
        let (mut statistic, mut cells) = (0.0, 0);
        for (cell, &count) in counts.iter().enumerate() {
            let (first, second) = (cell as u32 / 5, cell as u32 % 5);
            let p = dense.after(0).prob(first) * dense.after(first).prob(second);
            if p == 0.0 {
                assert_eq!(count, 0, "impossible tokens were generated");
                continue;
            }
            let expected = f64::from(p) * SAMPLES as f64;
            statistic += (f64::from(count) - expected).powi(2) / expected;
            cells += 1;
        }
        let freedom = f64::from(cells - 1);
        let spread = 2.0 / (9.0 * freedom);
        let z = ((statistic / freedom).cbrt() - (1.0 - spread)) / spread.sqrt();
        assert!(z < Z, "case {case}: z = {z:.2}");
    }
}

#[test]
fn greedy_rounds_follow_the_argmax() {
    let path = [3, 1, 4, 1];
    let target: Vec<Distribution> = path.iter().map(|&t| Distribution::single(t)).collect();
    let rng = CounterRng::new(0);
    for (wrong, &next_token) in path.iter().enumerate() {
        let mut tokens = [3, 1, 4];
        if let Some(token) = tokens.get_mut(wrong) {
            *token = 9;
        }
        let draft = tokens.map(|token| DraftToken { token, q: None });
        check_draft(&draft, true, 10, &rng, 5).unwrap();
        let expected = RoundOutcome {
            accepted: wrong,
            next_token,
        };
        assert_eq!(judge(&target, &draft, &rng, &[0; 5]), expected);
    }
    let alone = judge(&target[..1], &[], &rng, &[0; 5]);
    assert_eq!((alone.accepted, alone.next_token), (0, 3));
}

#[test]
fn truncation_is_bounded() {
    let wide = Distribution::from_weights((1..5000).map(|w| w as f32).collect()).unwrap();
    let rng = CounterRng::new(1);
    for (asked, got) in [(0, 1), (1, 1), (64, 64), (1024, 1024), (4000, 1024)] {
        let (token, q) = draft_token(&wide, asked, &rng, 3);
        assert_eq!(q.ids.len(), got);
        assert!(q.ids.contains(&token));
        q.validate(4999).unwrap();
    }
}

#[test]
fn replay_rejects_a_lying_draft() {
    let rng = CounterRng::new(11);
    let law = close_draft();
    for position in 0..200 {
        let (token, q) = draft_token(law.after(0), 4, &rng, position);
        let honest = DraftToken { token, q: Some(q) };
        let check =
            |draft: &DraftToken| check_draft(std::slice::from_ref(draft), false, 5, &rng, position);
        check(&honest).unwrap();
        let liars = (0..5).filter(|&t| t != token).map(|token| DraftToken {
            token,
            ..honest.clone()
        });
        for liar in liars {
            assert!(check(&liar).is_err());
        }
        // The right draw for another position.
        let (other, q) = draft_token(law.after(0), 4, &rng, position + 1);
        if other != token {
            assert!(
                check(&DraftToken {
                    token: other,
                    q: Some(q)
                })
                .is_err()
            );
        }
    }
}

#[test]
fn malformed_proposals_are_errors() {
    let rng = CounterRng::new(0);
    let check =
        |greedy, token, q| check_draft(&[DraftToken { token, q }], greedy, 8, &rng, u64::MAX);
    assert!(check(true, 7, None).is_ok());
    assert!(check(true, 8, None).is_err());
    assert!(check(true, 7, Some(sparse(&[7], &[1.0]))).is_err());
    assert!(check(false, 7, None).is_err());
    assert!(check(false, 7, Some(sparse(&[7], &[1.0]))).is_ok());
    assert!(check(false, 7, Some(sparse(&[7], &[f32::NAN]))).is_err());
    assert!(check(false, 7, Some(sparse(&[7, 8], &[0.5, 0.5]))).is_err());
    assert!(check(false, 7, Some(sparse(&[], &[]))).is_err());
}
