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
    Arc::new(Registry::new("aa".to_owned()))
}

fn add(registry: &Registry, role: WorkerRole, port: u16, active: u32) -> WorkerId {
    let endpoint = format!("http://127.0.0.1:{port}");
    registry
        .add(role, endpoint, Some(model(8, "aa")), load(active))
        .expect("a good worker")
}

fn first(registry: &Registry) -> Option<WorkerId> {
    registry
        .candidates(WorkerRole::Verify)
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
