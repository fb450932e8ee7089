use super::*;

const VOCAB: usize = 100;

fn rule() -> v1::Sampling {
    v1::Sampling {
        temperature: 0.8,
        top_k: 40,
        top_p: Some(0.9),
        seed: Some(7),
        logit_bias: [(3, -1.5)].into(),
        ..Default::default()
    }
}

#[test]
fn absent_sampling_is_greedy() {
    let checked = sampling(None, VOCAB).unwrap();
    assert!(checked.is_greedy());
    assert_eq!(
        sampling(Some(&v1::Sampling::default()), VOCAB).unwrap(),
        checked
    );
}

#[test]
fn checked_sampling_survives_the_wire() {
    let checked = sampling(Some(&rule()), VOCAB).unwrap();
    let raw = v1::Sampling::from(&checked);
    assert_eq!(sampling(Some(&raw), VOCAB).unwrap(), checked);
}

#[test]
fn every_sampling_field_has_its_range() {
    type Spoil = fn(&mut v1::Sampling);
    let spoilers: [(&str, Spoil); 16] = [
        ("temperature", |s| s.temperature = f32::NAN),
        ("temperature", |s| s.temperature = -0.1),
        ("temperature", |s| s.temperature = f32::INFINITY),
        ("top_p", |s| s.top_p = Some(0.0)),
        ("top_p", |s| s.top_p = Some(f32::NAN)),
        ("top_p", |s| s.top_p = Some(1.1)),
        ("min_p", |s| s.min_p = f32::NAN),
        ("min_p", |s| s.min_p = 1.5),
        ("repetition_penalty", |s| s.repetition_penalty = Some(0.0)),
        ("repetition_penalty", |s| {
            s.repetition_penalty = Some(f32::NAN)
        }),
        ("presence_penalty", |s| s.presence_penalty = f32::NAN),
        ("frequency_penalty", |s| s.frequency_penalty = 11.0),
        ("logit_bias", |s| s.logit_bias = [(1, f32::NAN)].into()),
        ("logit_bias", |s| s.logit_bias = [(100, 0.0)].into()),
        ("logit_bias", |s| {
            s.logit_bias = (0..2_000).map(|t| (t, 0.0)).collect()
        }),
        ("logprobs", |s| s.logprobs = Some(21)),
    ];
    for (field, spoil) in spoilers {
        let mut raw = rule();
        spoil(&mut raw);
        assert_eq!(sampling(Some(&raw), VOCAB).unwrap_err().field, field);
    }
}

#[test]
fn limits_are_sorted_and_bounded() {
    let mut raw = v1::Limits {
        max_tokens: Some(1),
        stop_token_ids: vec![9, 2, 9],
        ignore_eos: true,
    };
    let checked = session_limits(Some(&raw), VOCAB).unwrap();
    assert_eq!(checked.stop_token_ids, [2, 9]);
    raw.max_tokens = Some(0);
    assert_eq!(
        session_limits(Some(&raw), VOCAB).unwrap_err().field,
        "max_tokens"
    );
    raw = v1::Limits {
        stop_token_ids: vec![0; 257],
        ..Default::default()
    };
    assert!(session_limits(Some(&raw), VOCAB).is_err());
    raw.stop_token_ids = vec![100];
    assert!(session_limits(Some(&raw), VOCAB).is_err());
}

#[test]
fn mask_policy_fills_in_defaults() {
    let default = CheckedMaskPolicy::default();
    assert_eq!(mask_policy(None, default).unwrap(), default);
    let mut raw = v1::MaskPolicy {
        mask_p: Some(0.5),
        ..Default::default()
    };
    let checked = mask_policy(Some(&raw), default).unwrap();
    assert_eq!((checked.mask_p, checked.window_tokens), (0.5, 64));
    for bad in [0.0, -1.0, 1.01, f32::NAN] {
        raw.mask_p = Some(bad);
        assert!(mask_policy(Some(&raw), default).is_err(), "{bad}");
    }
    for granularity in [0, 257] {
        let raw = v1::MaskPolicy {
            granularity: Some(granularity),
            ..Default::default()
        };
        assert!(mask_policy(Some(&raw), default).is_err());
    }
}

#[test]
fn modes_are_known_and_given() {
    assert_eq!(mode(1).unwrap(), v1::Mode::Dense);
    assert_eq!(mode(2).unwrap(), v1::Mode::Sparse);
    assert_eq!(mode(3).unwrap(), v1::Mode::Exact);
    for bad in [0, 4, -1, i32::MAX] {
        assert!(mode(bad).is_err(), "{bad}");
    }
}

#[test]
fn session_tokens_fit_the_context() {
    assert!(session_tokens(&[0; 9], VOCAB, 10).is_ok());
    assert!(session_tokens(&[], VOCAB, 10).is_err());
    assert!(session_tokens(&[0; 10], VOCAB, 10).is_err());
    assert!(session_tokens(&[100], VOCAB, 10).is_err());
    assert!(session_tokens(&[0], VOCAB, 0).is_err());
}

#[test]
fn stop_strings_are_few_and_short() {
    assert!(stop_strings(&[]).is_ok());
    assert!(stop_strings(&["\n\n".to_owned()]).is_ok());
    assert!(stop_strings(&[String::new()]).is_err());
    assert!(stop_strings(&["x".repeat(1_025)]).is_err());
    assert!(stop_strings(&vec!["x".to_owned(); 17]).is_err());
}

#[test]
fn endpoints_are_http_uris() {
    for good in ["http://127.0.0.1:7000", "https://worker.example:443/"] {
        assert!(endpoint("endpoint", good).is_ok(), "{good}");
    }
    for bad in ["", "host:80", "ftp://host", "/path", "http://", "http:// x"] {
        assert!(endpoint("endpoint", bad).is_err(), "{bad}");
    }
}

#[test]
fn models_say_what_they_are() {
    let model = v1::ModelInfo {
        vocab_size: 8,
        max_context: 16,
        ..Default::default()
    };
    assert!(model_info(Some(model.clone())).is_ok());
    assert!(model_info(None).is_err());
    let long = v1::ModelInfo {
        name: "x".repeat(2_000),
        ..model.clone()
    };
    assert!(model_info(Some(long)).is_err());
    let device = |name: &str| v1::Device {
        name: name.to_owned(),
        ..Default::default()
    };
    for devices in [vec![device(&"x".repeat(2_000))], vec![device(""); 65]] {
        let odd = v1::ModelInfo {
            devices,
            ..model.clone()
        };
        assert!(model_info(Some(odd)).is_err());
    }
    let empty = v1::ModelInfo {
        vocab_size: 0,
        ..model
    };
    assert!(model_info(Some(empty)).is_err());
}

#[test]
fn check_policies_have_ranges_and_survive_the_wire() {
    assert_eq!(check_policy(None).unwrap(), CheckedCheckPolicy::default());
    let full = v1::CheckPolicy {
        confirm_length: Some(64),
        refresh_every: Some(1),
        max_kl: Some(0.01),
    };
    let checked = check_policy(Some(&full)).unwrap();
    assert_eq!(v1::CheckPolicy::from(checked), full);
    type Spoil = fn(&mut v1::CheckPolicy);
    let spoilers: [(&str, Spoil); 6] = [
        ("confirm_length", |c| c.confirm_length = Some(0)),
        ("confirm_length", |c| c.confirm_length = Some(65)),
        ("refresh_every", |c| c.refresh_every = Some(0)),
        ("max_kl", |c| c.max_kl = Some(0.0)),
        ("max_kl", |c| c.max_kl = Some(f32::NAN)),
        ("max_kl", |c| c.max_kl = Some(11.0)),
    ];
    for (field, spoil) in spoilers {
        let mut raw = full;
        spoil(&mut raw);
        assert_eq!(check_policy(Some(&raw)).unwrap_err().field, field);
    }
}
