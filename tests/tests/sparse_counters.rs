//! Sparse mode reads what its masks say and no more: the session's counters equal a count made from the recorded
//! traffic, mask by mask and head by head, without any of the workers' code but the codec.
#![allow(clippy::unwrap_used)]

use specattn_mask::{Decoder, LayerMap, Limits, RoundMask};
use specattn_proto::v1::{FinishReason, Mode, OpenRequest, Propose, SessionStats};
use specattn_tests::count::{Count, layer_map, layer_map_file};
use specattn_tests::process::{DRAFT, VERIFY};
use specattn_tests::proxy::{Crossed, Proxy};
use specattn_tests::session::open_request;
use specattn_tests::{Process, Session, texts};

/// Masks at p = 0.95 may keep this much of a 3,000-token prompt's KV cache.
const KEPT_MOST: f64 = 0.35;

/// Replays what crossed: every forward after the prompt.
fn recount(crossed: &[Crossed], request: &OpenRequest, limit: usize, map: &LayerMap) -> Count {
    let mut count = Count::default();
    let mut decoder = Decoder::new(Limits::default());
    // Committed tokens; the pending one is not cached.
    let mut n = request.token_ids.len();
    let mut last: Option<(&Propose, Option<RoundMask>)> = None;
    let alone = |count: &mut Count, n: &mut usize, tokens: usize| {
        for _ in 0..tokens {
            count.forward(*n - 1, 1, None, map);
            count.solo += 1;
            *n += 1;
        }
    };
    for event in crossed {
        match event {
            Crossed::Welcome(welcome) => alone(&mut count, &mut n, welcome.token_ids.len()),
            // The first part of a round that comes in two.
            Crossed::Propose(propose) if !propose.last => {}
            Crossed::Propose(propose) => {
                let mask = decoder.decode(&propose.mask).ok().cloned();
                last = Some((propose, mask));
            }
            Crossed::Verdict(verdict) => {
                assert_eq!(verdict.base as usize, n, "verdicts continue each other");
                if !verdict.judged {
                    alone(&mut count, &mut n, verdict.next_tokens.len());
                    continue;
                }
                let (propose, mask) = last.take().expect("a judged proposal was sent");
                assert_eq!(propose.base, verdict.base);
                let gamma = propose.offset as usize + propose.token_ids.len();
                count.forward(n - 1, gamma + 1, mask.as_ref(), map);
                count.proposed += gamma as u64;
                count.accepted += u64::from(verdict.accepted);
                n += verdict.accepted as usize + 1;
            }
            Crossed::Closed => {
                // The last round's answer is the end itself; a single last token needs no round.
                let left = limit - n;
                match last
                    .take()
                    .filter(|(propose, _)| propose.base as usize == n)
                {
                    Some((propose, mask)) if left > 1 => {
                        let gamma = propose.offset as usize + propose.token_ids.len();
                        let gamma = gamma.min(left - 1);
                        count.forward(n - 1, gamma + 1, mask.as_ref(), map);
                        count.proposed += gamma as u64;
                        count.accepted += left as u64 - 1;
                        n = limit;
                    }
                    _ => alone(&mut count, &mut n, left),
                }
            }
        }
    }
    assert_eq!(n, limit, "every token is accounted for");
    count
}

/// KV entries of the bundled draft per position, and bytes of one.
const DRAFT_HEADS: u64 = 3;
const ENTRY_BYTES: u64 = 2 * 64 * 4;

/// What the session says of the draft's reads is what crossed with the proposals, and that is what dense steps over the
/// proposed tokens would have read. Gives the share that was read.
fn check_draft(crossed: &[Crossed], stats: &SessionStats) -> f64 {
    let (mut read, mut dense, mut least) = (0, 0, 0);
    let mut solo = false;
    for event in crossed {
        match event {
            Crossed::Propose(propose) => {
                read += propose.kv_entries_read;
                dense += propose.kv_entries_dense;
                let steps = u64::from(propose.offset)..;
                let steps = steps.take(propose.token_ids.len());
                // A step's input is cached behind the base and the round's tokens before.
                least += DRAFT_HEADS * steps.map(|step| propose.base + step).sum::<u64>();
            }
            Crossed::Verdict(verdict) => solo |= !verdict.judged,
            _ => {}
        }
    }
    let told = (stats.draft_kv_entries_read, stats.draft_kv_entries_dense);
    assert_eq!(told, (read, dense));
    let bytes = (stats.draft_kv_bytes_read, stats.draft_kv_bytes_dense);
    assert_eq!(bytes, (read * ENTRY_BYTES, dense * ENTRY_BYTES));
    // Rounds that were given up while the verify worker went on alone cost steps that nobody was sent.
    assert!(
        dense == least || (solo && dense > least),
        "{dense}, {least}"
    );
    let target = (stats.kv_bytes_read, stats.kv_bytes_dense);
    let entries = (stats.kv_entries_read, stats.kv_entries_dense);
    assert_eq!(target, (entries.0 * ENTRY_BYTES, entries.1 * ENTRY_BYTES));
    read as f64 / dense as f64
}

/// Runs a session with a draft worker started with `drafting` arguments; gives the target's count, the stats, the share of
/// its KV entries that the draft read, and the text.
async fn run(
    request: OpenRequest,
    tokens: u32,
    drafting: &[&str],
) -> (Count, SessionStats, f64, String) {
    let (_folder, file) = layer_map_file();
    let verify = Process::worker(VERIFY, &["--alignment", &file]).await;
    // One round at a time: what answers what is then plain from the messages.
    let drafting = [&["--lookahead", "off"], drafting].concat();
    let draft = Process::worker(DRAFT, &drafting).await;
    let proxy = Proxy::start(verify.channel().await).await;
    let limit = request.token_ids.len() + tokens as usize;
    let mut session = Session::open(verify.channel().await, request.clone())
        .await
        .unwrap();
    let attachment = session
        .attach(draft.channel().await, proxy.uri())
        .await
        .unwrap();
    let (reason, stats) = session.finish().await.unwrap();
    assert_eq!(reason, FinishReason::Length);
    assert!(attachment.detached().await.contains("over"));
    let crossed = proxy.crossed();
    let map = layer_map();
    let count = recount(&crossed, &request, limit, &map);
    let Some(Crossed::Welcome(welcome)) = crossed.first() else {
        panic!("no welcome but {:?}", crossed.first());
    };
    assert_eq!(
        welcome.sources.len(),
        if request.mode() == Mode::Sparse {
            map.sources.len()
        } else {
            0
        }
    );
    verify.is_idle().await;
    draft.is_idle().await;
    let text = texts::tokenizer().decode(&session.tokens, true).unwrap();
    let draft_kept = check_draft(&crossed, &stats);
    (count, stats, draft_kept, text)
}

fn check(count: &Count, stats: &SessionStats) -> f64 {
    let told = Count::told(stats);
    assert_eq!(&told, count);
    count.read as f64 / count.dense as f64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_long_prompt_is_read_sparsely_and_counted_right() {
    let prompt = texts::book(3_000);
    for (name, temperature) in [("greedy", 0.0), ("sampled", 0.8)] {
        let mut request = open_request(&prompt, 250);
        request.mode = Mode::Sparse.into();
        let sampling = request.sampling.as_mut().unwrap();
        (sampling.temperature, sampling.seed) = (temperature, Some(5));
        let (count, stats, draft_kept, text) = run(request, 250, &[]).await;
        assert!(draft_kept < 0.5, "{name}: the draft reads {draft_kept}");
        let kept = check(&count, &stats);
        let bytes = stats.mask_bytes as f64 / stats.mask_rounds as f64;
        println!("{name}: kept {kept:.3}, {bytes:.0} mask bytes a round, {count:?}\n{text}\n");
        assert!(kept <= KEPT_MOST, "{name}: {kept}");
        assert!(stats.mask_rounds > 0 && count.accepted > 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn dense_rounds_read_everything() {
    let every_step = ["--capture-every", "1"];
    let request = open_request(&texts::book(500), 120);
    let (count, stats, draft_kept, _) = run(request, 120, &every_step).await;
    assert_eq!(draft_kept, 1.0);
    assert_eq!(check(&count, &stats), 1.0);
    assert_eq!((stats.mask_bytes, stats.mask_rounds), (0, 0));
}
