//! Evaluation on the bundled pair: dense differs from dense by nothing, and every method stands where it must.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use specattn_draft::OwnPolicy;
use specattn_engine::{LoadOptions, Model};
use specattn_mask::{LayerMap, MaskPolicy};
use specattn_quality::Book;
use specattn_quality::eval::{Figures, Method, Plan, ServedMap, Setting, Window, measure};

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
}

fn model(role: &str) -> Model {
    let options = LoadOptions {
        kv_cache_bytes: 64 << 20,
        ..LoadOptions::default()
    };
    Model::load(&models().join(role), &options, &mut |_, _| {}).expect("the bundled pair loads")
}

#[test]
fn methods_stand_where_they_must() {
    // Any English text will do; the repository brings no book.
    let book = Book::read(
        &models().join("target"),
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("../ARCHITECTURE.md"),
    )
    .expect("a text");
    let window = Window {
        tokens: book.windows(1_024, 1).expect("a long text")[0],
        prompt: 900,
    };
    let map = LayerMap::load(&models().join("target/alignment.json")).expect("a map");
    let setting = |method, value| Setting { method, value };
    let plan = Plan {
        settings: vec![
            setting(Method::Dense, 1.0),
            setting(Method::Map(0), 0.9),
            setting(Method::Map(1), 0.9),
            setting(Method::StreamingLlm, 0.2),
            setting(Method::H2o, 0.2),
            setting(Method::Quest, 0.2),
            setting(Method::Previous, 0.9),
            setting(Method::Oracle, 0.99),
        ],
        maps: [(map, 1), (LayerMap::proportional(8, 2, 3, 3), 4)]
            .map(|(map, capture_every)| ServedMap {
                map: Arc::new(map),
                own: OwnPolicy {
                    capture_every,
                    ..OwnPolicy::default()
                },
            })
            .to_vec(),
        policy: MaskPolicy::default(),
    };
    let (mut target, mut draft) = (model("target"), model("draft"));
    let figures = measure(&mut target, &mut draft, &window, &plan, &mut |_, _| {})
        .expect("every method runs");
    let [
        dense,
        ours,
        thrifty,
        streaming,
        h2o,
        quest,
        previous,
        oracle,
    ]: [Figures; 8] = figures.try_into().expect("one for each setting");
    assert!(dense.mean_kl().abs() < 1e-5, "{dense:?}");
    assert_eq!(dense.kept(), 1.0);
    for budgeted in [&streaming, &h2o, &quest] {
        // The round's own entries come on top of the budget.
        assert!((0.15..0.22).contains(&budgeted.kept()), "{budgeted:?}");
        assert!(budgeted.mean_kl() > 0.0);
    }
    assert!(ours.kept() < 1.0 && ours.mask_bytes > 0);
    // A draft that reads everything, and one that does on every fourth step.
    assert!(ours.system_kept() > ours.kept());
    assert!(thrifty.system_kept() < ours.system_kept());
    assert!(ours.mean_kl() < streaming.mean_kl());
    // What mattered a round ago says less than what matters now.
    assert!(previous.kept() < 1.0 && previous.mean_kl() > oracle.mean_kl());
    assert!(oracle.kept() < 1.0 && oracle.mean_kl() < streaming.mean_kl());
}
