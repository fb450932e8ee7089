//! Choosers: what they choose is what is read, and it reads as lists do.

mod fixture;

use fixture::{Fixture, TAIL};
use specattn_engine::{
    HeadLists, KeyChooser, LayerKeys, LogitRows, Model, PositionSet, Step, StepOutput,
};

/// Reads the lists of a fixture.
struct Given<'a>(&'a HeadLists);

impl KeyChooser for Given<'_> {
    fn choose(&mut self, layer: usize, keys: &LayerKeys<'_>) -> Vec<PositionSet> {
        let cached = keys.keys.len() / (keys.num_kv_heads * keys.width);
        assert_eq!(keys.q.len(), TAIL * keys.num_heads * keys.width);
        assert!(cached > 0);
        let heads = layer * keys.num_kv_heads..(layer + 1) * keys.num_kv_heads;
        heads
            .map(|head| self.0.lists[self.0.of_head[head] as usize].clone())
            .collect()
    }
}

fn run(model: &mut Model, tokens: &[u32], lists: &HeadLists, choosing: bool) -> StepOutput {
    let mut sequence = model.new_sequence(tokens.len()).expect("room");
    let cached = tokens.len() - TAIL;
    for (tokens, last) in [(&tokens[..cached], false), (&tokens[cached..], true)] {
        let mut step = Step {
            lists: (last && !choosing).then_some(lists),
            logits: LogitRows::All,
            ..Step::new(&mut sequence, tokens)
        };
        if !last {
            model.forward(&mut [step]).expect("a valid step");
        } else if choosing {
            return model
                .forward_choosing(&mut step, &mut Given(lists))
                .expect("a valid step");
        } else {
            return model.forward(&mut [step]).expect("a valid step").remove(0);
        }
    }
    unreachable!("the last step returns")
}

#[test]
fn a_chosen_step_has_the_bits_of_a_listed_one() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("long_tokens");
        let (lists, _) = fixture.lists(15);
        let listed = run(&mut model, &tokens, &lists, false);
        let chosen = run(&mut model, &tokens, &lists, true);
        assert_eq!(chosen.kv, listed.kv, "{}", fixture.name);
        assert!(chosen.logits == listed.logits, "{}", fixture.name);
    }
}
