use std::time::Duration;

use super::*;

fn model(vocab_size: u32, tokenizer_hash: &str) -> ModelInfo {
    ModelInfo {
        vocab_size,
        max_context: 64,
        tokenizer_hash: tokenizer_hash.to_owned(),
        ..Default::default()
    }
}

fn load(sessions_active: u32) -> WorkerLoad {
    WorkerLoad {
        sessions_active,
        sessions_max: 8,
        ..Default::default()
    }
}

fn registry() -> Arc<Registry> {
    Arc::new(Registry::new("aa".to_owned(), Dialers::default()))
}

fn add(registry: &Registry, role: WorkerRole, port: u16, active: u32) -> WorkerId {
    let endpoint = format!("http://127.0.0.1:{port}");
    registry
        .add(role, endpoint, Some(model(8, "aa")), load(active))
        .expect("a good worker")
}

fn first(registry: &Registry) -> Option<WorkerId> {
    registry
        .verify_candidates(&Prefix::of(&[]))
        .first()
        .map(|w| w.id)
}

#[tokio::test]
async fn the_least_loaded_worker_comes_first() {
    let registry = registry();
    let busy = add(&registry, WorkerRole::Verify, 1, 3);
    let idle = add(&registry, WorkerRole::Verify, 2, 1);
    add(&registry, WorkerRole::Draft, 3, 0);
    assert_eq!(first(&registry), Some(idle));
    // Assignments count before the next heartbeat tells of them.
    let held: Vec<_> = (0..4).map(|_| registry.assign(idle)).collect();
    assert_eq!(first(&registry), Some(busy));
    drop(held);
    assert_eq!(first(&registry), Some(idle));
    let draining = WorkerLoad {
        draining: true,
        ..load(0)
    };
    assert!(registry.report(idle, draining));
    assert_eq!(first(&registry), Some(busy));
    registry.remove(busy, "test");
    assert_eq!(first(&registry), None);
    assert!(!registry.report(busy, load(0)));
}

#[tokio::test]
async fn a_worker_that_comes_back_replaces_itself() {
    let registry = registry();
    let old = add(&registry, WorkerRole::Verify, 1, 0);
    let assignment = registry.assign(old);
    let new = add(&registry, WorkerRole::Verify, 1, 0);
    assert_eq!(registry.status().len(), 1);
    drop(assignment);
    registry.remove(old, "its stream broke at last");
    assert_eq!(first(&registry), Some(new));
    assert_eq!(registry.status()[0].sessions_assigned, 0);
}

#[tokio::test]
async fn misfits_are_refused() {
    let registry = registry();
    let try_add = |role, endpoint: &str, model| {
        registry
            .add(role, endpoint.to_owned(), model, load(0))
            .map_err(|fault| fault.label())
    };
    let good = "http://127.0.0.1:1";
    let verify = WorkerRole::Verify;
    assert_eq!(
        try_add(verify, good, Some(model(8, "bb"))),
        Err("failed_precondition")
    );
    assert_eq!(try_add(verify, good, None), Err("invalid_argument"));
    assert_eq!(
        try_add(verify, "x", Some(model(8, "aa"))),
        Err("invalid_argument")
    );
    let unspecified = WorkerRole::Unspecified;
    assert_eq!(
        try_add(unspecified, good, Some(model(8, "aa"))),
        Err("invalid_argument")
    );
    assert!(try_add(verify, good, Some(model(8, ""))).is_ok());
    assert!(misfit(&model(8, ""), &model(8, "aa")).is_none());
    assert!(misfit(&model(9, "aa"), &model(8, "aa")).is_some());
    assert!(misfit(&model(8, "aa"), &model(8, "bb")).is_some());
}

#[tokio::test]
async fn changes_wake_those_who_wait() {
    let registry = registry();
    let mut changes = registry.changes();
    let id = add(&registry, WorkerRole::Draft, 1, 8);
    assert!(changes.has_changed().expect("the registry lives"));
    changes.mark_unchanged();
    registry.report(id, load(8));
    assert!(!changes.has_changed().expect("the registry lives"));
    registry.report(id, load(7));
    assert!(changes.has_changed().expect("the registry lives"));
}

#[tokio::test]
async fn a_prefix_goes_where_it_was_while_that_is_not_much_fuller() {
    let registry = registry();
    let a = add(&registry, WorkerRole::Verify, 1, 0);
    let b = add(&registry, WorkerRole::Verify, 2, 0);
    let tokens: Vec<u32> = (0..5_000).collect();
    let prefix = Prefix::of(&tokens);
    let best = |registry: &Registry| registry.verify_candidates(&prefix)[0].id;
    registry.served(b, &prefix);
    assert_eq!((best(&registry), first(&registry)), (b, Some(a)));
    let _two = [registry.assign(b), registry.assign(b)];
    assert_eq!(best(&registry), b);
    // A short one is not worth a session more.
    let short = Prefix::of(&tokens[..300]);
    assert_eq!(registry.verify_candidates(&short)[0].id, a);
    let _three = registry.assign(b);
    assert_eq!(best(&registry), a);
}

#[tokio::test]
async fn who_does_not_answer_comes_last_until_it_is_heard_of() {
    let registry = registry();
    let a = add(&registry, WorkerRole::Verify, 1, 0);
    let b = add(&registry, WorkerRole::Verify, 2, 7);
    registry.suspect(a);
    assert_eq!(first(&registry), Some(b));
    registry.report(a, load(0));
    assert_eq!(first(&registry), Some(a));
}

#[tokio::test]
async fn places_are_those_of_the_verify_workers_that_take_sessions() {
    let registry = registry();
    assert_eq!(registry.places(), usize::MAX);
    let a = add(&registry, WorkerRole::Verify, 1, 0);
    add(&registry, WorkerRole::Verify, 2, 0);
    add(&registry, WorkerRole::Draft, 3, 0);
    assert_eq!(registry.places(), 16);
    let draining = WorkerLoad {
        draining: true,
        ..load(0)
    };
    registry.report(a, draining);
    assert_eq!(registry.places(), 8);
}

#[tokio::test]
async fn a_draft_that_once_seemed_far_is_tried_again() {
    let registry = registry();
    add(&registry, WorkerRole::Verify, 1, 0);
    let verify = registry.verify_candidates(&Prefix::of(&[])).remove(0);
    let once_far = add(&registry, WorkerRole::Draft, 2, 0);
    add(&registry, WorkerRole::Draft, 3, 0);
    let far = Duration::from_millis(100);
    registry.heard_round_trip(once_far, &verify, far);
    // Sessions come one after another.
    let until_tried = |registry: &Arc<Registry>| {
        let chosen = || {
            registry
                .assign_draft(&verify, |_| true)
                .expect("a draft")
                .0
                .id
        };
        (0..1_000).position(|_| chosen() == once_far)
    };
    let tried = until_tried(&registry).expect("it is tried again");
    assert!((20..60).contains(&tried), "{tried}");
    // It is as far as it was: as many sessions go elsewhere before the next one.
    registry.heard_round_trip(once_far, &verify, far);
    assert_eq!(until_tried(&registry), Some(tried));
    // The long way was a bad moment: it counts as the others do.
    registry.heard_round_trip(once_far, &verify, Duration::from_millis(1));
    assert!(until_tried(&registry) <= Some(1));
}

#[tokio::test]
async fn drafts_are_chosen_by_load_and_distance_and_left_for_better_ones() {
    let registry = registry();
    add(&registry, WorkerRole::Verify, 1, 0);
    let verify = registry.verify_candidates(&Prefix::of(&[])).remove(0);
    let far = add(&registry, WorkerRole::Draft, 2, 0);
    let near = add(&registry, WorkerRole::Draft, 3, 0);
    registry.heard_round_trip(far, &verify, Duration::from_millis(50));
    registry.heard_round_trip(near, &verify, Duration::from_micros(500));
    let any = |_: WorkerId| true;
    let mut held = Vec::new();
    let mut take = |registry: &Arc<Registry>| {
        let (worker, assignment) = registry.assign_draft(&verify, any).expect("a draft");
        held.push(assignment);
        worker.id
    };
    // 50 ms weigh as much as a fifth of a worker: 1.6 of eight sessions.
    let taken: Vec<_> = (0..4).map(|_| take(&registry)).collect();
    assert_eq!(taken, [near, near, far, near]);
    // The session there has told the way again.
    registry.heard_round_trip(far, &verify, Duration::from_millis(50));

    // One joins: sessions move there one by one until none gains by it.
    let fresh = add(&registry, WorkerRole::Draft, 4, 0);
    let mut settled = Vec::new();
    let mut moved = 0;
    for assignment in held.drain(..) {
        match registry.better_draft(&verify, assignment) {
            Ok((worker, assignment)) => {
                assert_eq!(worker.id, fresh);
                moved += 1;
                settled.push(assignment);
            }
            Err(assignment) => settled.push(assignment),
        }
    }
    assert_eq!(moved, 2);

    // One that drains is left by all, where there is another.
    let (worker, assignment) = registry.assign_draft(&verify, |id| id == far).expect("far");
    assert_eq!(worker.id, far);
    let draining = WorkerLoad {
        draining: true,
        ..load(0)
    };
    registry.report(far, draining);
    assert!(registry.better_draft(&verify, assignment).is_ok());
}
