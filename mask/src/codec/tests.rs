use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    max_context: 2_000,
    max_sources: 4,
};

/// A session's masks: the context grows and now and then shrinks, some positions change each round.
fn session() -> impl Strategy<Value = Vec<RoundMask>> {
    let change = (0usize..4, 0usize..2_000);
    let round = (-3i64..20, prop::collection::vec(change, 0..60));
    (
        1usize..4,
        prop_oneof![Just(1u32), 1u32..20],
        0usize..1_500,
        prop::collection::vec(round, 1..8),
    )
        .prop_map(|(num_sources, granularity, start, rounds)| {
            let mut context_len = start;
            let mut sources = vec![PositionSet::new(start); num_sources];
            rounds
                .into_iter()
                .map(|(growth, changes)| {
                    context_len = context_len.saturating_add_signed(growth as isize);
                    for source in &mut sources {
                        source.resize(context_len);
                    }
                    for (source, position) in changes {
                        sources[source % num_sources].toggle(position);
                    }
                    let mut sources = sources.clone();
                    for source in &mut sources {
                        source.fill_groups(granularity as usize);
                    }
                    RoundMask {
                        context_len,
                        granularity,
                        sources,
                    }
                })
                .collect()
        })
}

fn encode_all(masks: &[RoundMask]) -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new();
    masks.iter().map(|mask| encoder.encode(mask)).collect()
}

proptest! {
    #[test]
    fn sessions_round_trip(masks in session()) {
        let mut decoder = Decoder::new(LIMITS);
        for (mask, bytes) in masks.iter().zip(encode_all(&masks)) {
            prop_assert_eq!(decoder.decode(&bytes).unwrap(), mask);
        }
    }

    #[test]
    fn any_bytes_are_a_mask_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut decoder = Decoder::new(LIMITS);
        if let Ok(mask) = decoder.decode(&bytes) {
            prop_assert!(mask.context_len <= LIMITS.max_context);
            prop_assert!(mask.sources.len() <= LIMITS.max_sources);
        }
    }

    #[test]
    fn damage_is_an_error_and_leaves_the_base(
        masks in session(),
        damages in prop::collection::vec((any::<prop::sample::Index>(), 1u8..=255), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut decoder = Decoder::new(LIMITS);
        for (mask, bytes) in masks.iter().zip(encode_all(&masks)) {
            let mut damaged = bytes.clone();
            for (index, flip) in &damages {
                let index = index.index(damaged.len());
                damaged[index] ^= flip;
            }
            if let Ok(decoded) = decoder.decode(&damaged) {
                // Flips may cancel out, and some bits of the payload's end may not matter; nothing else can pass.
                prop_assert_eq!(decoded, mask);
                decoder.reset();
                return Ok(());
            }
            prop_assert!(decoder.decode(&bytes[..cut.index(bytes.len())]).is_err());
            prop_assert_eq!(decoder.decode(&bytes).unwrap(), mask);
        }
    }

    #[test]
    fn shapes_past_the_limits_are_refused(
        context_len in any::<u64>(),
        granularity in any::<u32>(),
        sources in any::<u32>(),
        payload in prop::collection::vec(any::<u8>(), 0..50),
    ) {
        let kind = Kind::Full { context_len, granularity, sources };
        let bytes = Frame { kind, payload: &payload, checksum: 0 }.to_bytes();
        prop_assert!(Decoder::new(LIMITS).decode(&bytes).is_err());
    }
}

proptest! {
    #[test]
    fn any_payload_of_a_valid_shape_is_harmless(
        payload in prop::collection::vec(any::<u8>(), 0..400),
        growth in -50i64..50,
        context_len in 0u64..2_000,
        sources in 0u32..=4,
    ) {
        let mut decoder = Decoder::new(LIMITS);
        let base = mask(100, &[1, 5, 70]);
        decoder.decode(&Encoder::new().encode(&base)).unwrap();
        let base_tag = frame::tag(decoder.base.as_ref().unwrap().checksum);
        let delta = Kind::Delta { base_tag, growth };
        let full = Kind::Full { context_len, granularity: 1, sources };
        for kind in [delta, full] {
            let bytes = Frame { kind, payload: &payload, checksum: 0 }.to_bytes();
            prop_assert!(decoder.decode(&bytes).is_err());
        }
    }
}

fn mask(context_len: usize, positions: &[usize]) -> RoundMask {
    RoundMask {
        context_len,
        granularity: 1,
        sources: vec![PositionSet::from_positions(
            context_len,
            positions.iter().copied(),
        )],
    }
}

#[test]
fn lengths_of_two_to_the_forty_are_refused_at_once() {
    let huge = 1u64 << 40;
    let kind = Kind::Full {
        context_len: huge,
        granularity: 1,
        sources: 1,
    };
    let frame = Frame {
        kind,
        payload: &[],
        checksum: 0,
    };
    let error = Decoder::new(LIMITS).decode(&frame.to_bytes()).unwrap_err();
    assert!(
        matches!(error, MaskError::LimitExceeded { what: "context", value, .. } if value == huge)
    );

    let mut encoder = Encoder::new();
    let mut decoder = Decoder::new(LIMITS);
    decoder.decode(&encoder.encode(&mask(100, &[1]))).unwrap();
    let base_tag = frame::tag(decoder.base.as_ref().unwrap().checksum);
    for growth in [1 << 40, -(1 << 40), i64::MAX, i64::MIN] {
        let kind = Kind::Delta { base_tag, growth };
        let bytes = Frame {
            kind,
            payload: &[],
            checksum: 0,
        }
        .to_bytes();
        assert!(decoder.decode(&bytes).is_err());
    }

    // A payload length that the bytes do not have.
    let lying = [1, 0, 10, 1, 1, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20, 0, 0];
    assert_eq!(decoder.decode(&lying).unwrap_err().label(), "malformed");
}

#[test]
fn a_delta_needs_its_base() {
    let mut encoder = Encoder::new();
    let frames: Vec<Vec<u8>> = [&[1, 5][..], &[1, 6], &[2, 6]]
        .into_iter()
        .map(|positions| encoder.encode(&mask(100, positions)))
        .collect();
    let mut decoder = Decoder::new(LIMITS);
    assert!(matches!(
        decoder.decode(&frames[1]),
        Err(MaskError::MissingBase)
    ));
    decoder.decode(&frames[0]).unwrap();
    assert!(matches!(
        decoder.decode(&frames[2]),
        Err(MaskError::MissingBase)
    ));
    assert_eq!(decoder.decode(&frames[1]).unwrap(), &mask(100, &[1, 6]));
    decoder.reset();
    assert!(matches!(
        decoder.decode(&frames[2]),
        Err(MaskError::MissingBase)
    ));

    encoder.reset();
    let full = encoder.encode(&mask(101, &[3]));
    assert_eq!(decoder.decode(&full).unwrap(), &mask(101, &[3]));
}

#[test]
fn a_change_of_sources_or_granularity_sends_a_full_mask() {
    let mut encoder = Encoder::new();
    let mut decoder = Decoder::new(LIMITS);
    let one = mask(100, &[1]);
    let two = RoundMask {
        sources: vec![one.sources[0].clone(); 2],
        ..one.clone()
    };
    let coarse = RoundMask {
        granularity: 2,
        sources: vec![PositionSet::from_positions(100, [0, 1])],
        ..one.clone()
    };
    for mask in [&one, &two, &coarse, &one] {
        assert_eq!(decoder.decode(&encoder.encode(mask)).unwrap(), mask);
    }
}

#[test]
fn empty_masks_are_masks() {
    for sources in [vec![], vec![PositionSet::new(0)]] {
        let empty = RoundMask {
            context_len: 0,
            granularity: 1,
            sources,
        };
        let mut encoder = Encoder::new();
        let mut decoder = Decoder::new(LIMITS);
        for _ in 0..2 {
            assert_eq!(decoder.decode(&encoder.encode(&empty)).unwrap(), &empty);
        }
    }
}
