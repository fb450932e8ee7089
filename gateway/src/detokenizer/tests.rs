use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;

static BUNDLED: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/target");
    Arc::new(Tokenizer::load(&folder).unwrap())
});

/// A tokenizer of the SentencePiece kind: spaces as U+2581, byte tokens, the text's first space stripped.
static BYTE_FALLBACK: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let mut vocab: Vec<String> = vec!["\"<unk>\":0".to_owned()];
    vocab.extend((0..256).map(|byte| format!("\"<0x{byte:02X}>\":{}", byte + 1)));
    vocab.extend(
        ["▁the", "▁cat", "s", "▁"]
            .iter()
            .zip(257..)
            .map(|(t, id)| format!("\"{t}\":{id}")),
    );
    let json = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":null,"post_processor":null,
        "decoder":{{"type":"Sequence","decoders":[
            {{"type":"Replace","pattern":{{"String":"▁"}},"content":" "}},
            {{"type":"ByteFallback"}},{{"type":"Fuse"}},{{"type":"Strip","content":" ","start":1,"stop":0}}]}},
        "model":{{"type":"BPE","dropout":null,"unk_token":"<unk>","continuing_subword_prefix":null,
        "end_of_word_suffix":null,"fuse_unk":true,"byte_fallback":true,"ignore_merges":false,
        "vocab":{{{}}},"merges":[]}}}}"#,
        vocab.join(",")
    );
    Arc::new(Tokenizer::from_json(json.as_bytes()).unwrap())
});

fn stream(tokenizer: &Arc<Tokenizer>, prompt: &[u32], tokens: &[u32]) -> String {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), prompt).unwrap();
    let mut text = String::new();
    for &token in tokens {
        text.push_str(&detokenizer.push(token).unwrap());
        // A cut at the longest window, the context it waits for, and then a character under way.
        let most = LONGEST_WINDOW + CONTEXT_TOKENS + UNFINISHED;
        assert!(detokenizer.window.len() <= most);
    }
    text + &detokenizer.finish().unwrap()
}

fn byte_tokens(text: &str) -> Vec<u32> {
    text.bytes().map(|byte| u32::from(byte) + 1).collect()
}

#[test]
fn multi_byte_text_comes_out_whole() {
    let text = "Zoë said: “naïve façade” — 東京 🦀👩‍👩‍👧 ok\n\n  two  spaces";
    let tokens = BUNDLED.encode(text).unwrap();
    assert_eq!(stream(&BUNDLED, &[], &tokens), text);
}

#[test]
fn no_piece_shows_half_a_character() {
    let tokens = BUNDLED.encode("🦀 crab 東 end").unwrap();
    let mut detokenizer = Detokenizer::new(Arc::clone(&BUNDLED), &[]).unwrap();
    for token in tokens {
        assert!(!detokenizer.push(token).unwrap().contains(REPLACEMENT));
    }
}

#[test]
fn special_tokens_show_nothing() {
    let mut tokens = BUNDLED.encode("one").unwrap();
    assert_eq!(tokens[0], 0);
    tokens.push(1);
    tokens.extend(&BUNDLED.encode(" two").unwrap()[1..]);
    assert_eq!(stream(&BUNDLED, &[], &tokens), "one two");
}

#[test]
fn a_completion_keeps_its_leading_space() {
    let ids = |text: &str| BUNDLED.encode(text).unwrap();
    assert_eq!(stream(&BUNDLED, &ids("one"), &ids(" two")), " two");
    // SentencePiece decoders strip a text's first space: a completion is not a text's beginning.
    assert_eq!(stream(&BYTE_FALLBACK, &[257], &[258, 259]), " cats");
    assert_eq!(stream(&BYTE_FALLBACK, &[], &[257, 258]), "the cat");
}

#[test]
fn byte_tokens_make_characters() {
    let text = "東京は大きい🦀東京は大きい東京は大きい🦀";
    let mut tokens = byte_tokens(text);
    tokens.push(258);
    assert_eq!(
        stream(&BYTE_FALLBACK, &[257], &tokens),
        format!("{text} cat")
    );
}

#[test]
fn broken_byte_tokens_do_not_stall_the_text() {
    let mut tokens = byte_tokens("é");
    tokens.push(0xE2 + 1);
    tokens.extend([258; 3]);
    let text = stream(&BYTE_FALLBACK, &[257], &tokens);
    assert!(
        text.starts_with('é') && text.ends_with(" cat cat"),
        "{text:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_tokens_equal_decoding_at_once(tokens in prop::collection::vec(0..8_192_u32, 0..200)) {
        let at_once = BUNDLED.decode(&tokens).unwrap();
        prop_assert_eq!(stream(&BUNDLED, &[], &tokens), at_once);
    }

    #[test]
    fn single_bytes_equal_decoding_at_once(tokens in prop::collection::vec(2..258_u32, 0..300)) {
        let at_once = BUNDLED.decode(&tokens).unwrap();
        prop_assert_eq!(stream(&BUNDLED, &[], &tokens), at_once);
    }

    #[test]
    fn byte_fallback_spells_any_text(text in "\\PC{0,60}") {
        // Such decoders show a written U+FFFD and an unfinished character alike.
        let text = text.replace(REPLACEMENT, "?");
        prop_assert_eq!(stream(&BYTE_FALLBACK, &[257], &byte_tokens(&text)), text);
    }

    #[test]
    fn byte_fallback_survives_anything(tokens in prop::collection::vec(0..270_u32, 0..300)) {
        stream(&BYTE_FALLBACK, &[257], &tokens);
    }
}
