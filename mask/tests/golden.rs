//! Golden bytes of the wire format: a change here is a change of version.

use specattn_mask::{Decoder, Encoder, Limits, PositionSet, RoundMask};

/// A session whose masks exercise what version 1 can say: several sources, positions that come and go, all history
/// classes, groups, a growing and a shrinking context.
fn session(granularity: u32) -> Vec<RoundMask> {
    [70, 71, 75, 80, 80, 84, 90, 95, 99, 98]
        .into_iter()
        .enumerate()
        .map(|(round, context_len)| {
            let often = move |p: &usize| (p * p + 3 * p) % 7 < 1 + (p + round) % 5 / 3;
            let rarely = move |p: &usize| (p * 31 + round * 17).is_multiple_of(29);
            let mut sources = vec![
                PositionSet::from_positions(context_len, (0..context_len).filter(often)),
                PositionSet::from_positions(context_len, (0..context_len).filter(rarely)),
                PositionSet::from_positions(context_len, (0..context_len).step_by(3)),
            ];
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
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |c: u8| (c as char).to_digit(16).expect("a hex digit") as u8;
    text.as_bytes()
        .as_chunks::<2>()
        .0
        .iter()
        .map(|&[high, low]| digit(high) << 4 | digit(low))
        .collect()
}

fn check(golden: &[&str], granularity: u32) {
    let masks = session(granularity);
    let mut encoder = Encoder::new();
    let encoded: Vec<String> = masks
        .iter()
        .map(|mask| hex(&encoder.encode(mask)))
        .collect();
    assert_eq!(encoded, golden, "{encoded:#?}");
    let mut decoder = Decoder::new(Limits::default());
    for (mask, bytes) in masks.iter().zip(golden) {
        assert_eq!(
            decoder.decode(&unhex(bytes)).expect("golden bytes decode"),
            mask
        );
    }
}

#[test]
fn version_1() {
    check(&VERSION_1, 1);
}

#[test]
fn version_1_in_groups() {
    check(&VERSION_1_IN_GROUPS, 4);
}

const VERSION_1: [&str; 10] = [
    "01004601031622cbb22ccbb22ccb4241962f48922449922449922401531ba455",
    "0101531b02084af9cde270edfd07cd50879a",
    "0101cd50080acafa3faaaa9abc12161f69c138c2",
    "010169c10a0cca5bfc8fbe691e8f50caf81fb64202df",
    "0101b6420009feff8f2451f3feff0f2471175d",
    "01012471080c4a5dfc8f82e7595e698bff01dd58550f",
    "0101dd580c0e08f98cff3f4a9aa6798458caff1fdcf8725b",
    "0101dcf80a0f8ae1f8ff7f142d4bf308b98cffff07bda53c6e",
    "0101bda5080e0852f9ff7fb42dcbf28aa0f8ff7fba9a2335",
    "0101ba9a010bfeffff916269ddfbffff07dda85ee4",
];
const VERSION_1_IN_GROUPS: [&str; 10] = [
    "010046040305872151fd072be014c5",
    "01012be00205ff8b18ed3f09a33adf",
    "010109a30806ff7f31d1fe7f4391ad09",
    "010143910a07ff7fb1c9ffff0109d563fa",
    "010109d50007ff7f21c9ffff0142f12f46",
    "010142f10807ff7f2f22f2ff1f3b355aa2",
    "01013b350c0affff4faa222c0ffaff077a136a42",
    "01017a130a0afeffffbd88b4ffffff0f53976f86",
    "01015397080affff4fea62ecffffff03b73d8f8e",
    "0101b73d010aa0ff7f622244f2ffff0f816704ef",
];
