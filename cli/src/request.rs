//! From the command line to the gateway's request.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use specattn_proto::limits::MAX_PROMPT_BYTES;
use specattn_proto::v1;
use specattn_proto::v1::generate_request::Prompt;
use specattn_proto::validate::{self, CheckedMaskPolicy, Invalid};

use crate::args::{GenerateArgs, Mode, SamplingArgs, SpeculationArgs};
use crate::error::CliError;

/// The request that `args` ask for; reads the prompt file.
///
/// # Errors
/// [`CliError::Read`], or [`CliError::Usage`] for a prompt that is empty, too long or no UTF-8 and for values out of range.
pub fn build(args: &GenerateArgs) -> Result<v1::GenerateRequest, CliError> {
    let text = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => read_prompt(path)?,
        (None, None) => return Err(CliError::Usage("no prompt given".to_owned())),
    };
    if text.is_empty() {
        return Err(CliError::Usage("the prompt is empty".to_owned()));
    }
    if text.len() > MAX_PROMPT_BYTES {
        return Err(prompt_too_long());
    }
    let request = v1::GenerateRequest {
        prompt: Some(Prompt::Text(text)),
        limits: Some(v1::Limits {
            max_tokens: Some(args.max_tokens),
            stop_token_ids: args.stop.stop_token.clone(),
            ignore_eos: args.stop.ignore_eos,
        }),
        stop: args.stop.stop.clone(),
        deadline_ms: args.stop.deadline_ms,
        ..decoding(args.mode, &args.sampling, &args.speculation)
    };
    check_ranges(&request)?;
    Ok(request)
}

/// A request without prompt, limits and stops: how tokens are to be found.
pub(crate) fn decoding(
    mode: Mode,
    sampled: &SamplingArgs,
    speculation: &SpeculationArgs,
) -> v1::GenerateRequest {
    let mode = match mode {
        Mode::Dense => v1::Mode::Dense,
        Mode::Sparse => v1::Mode::Sparse,
        Mode::Exact => v1::Mode::Exact,
    };
    v1::GenerateRequest {
        sampling: Some(sampling(sampled)),
        mode: mode.into(),
        draft: Some(v1::DraftPolicy {
            draft_length: draft_length(speculation),
            capture_every: speculation.capture_every,
            own_p: speculation.own_p,
        }),
        mask: Some(v1::MaskPolicy {
            mask_p: speculation.mask_p,
            sink_tokens: speculation.sink,
            window_tokens: speculation.window,
            granularity: speculation.granularity,
        }),
        check: Some(v1::CheckPolicy {
            confirm_length: speculation.confirm_length,
            refresh_every: speculation.refresh_every,
            max_kl: speculation.max_kl,
        }),
        ..v1::GenerateRequest::default()
    }
}

/// Asks the gateway's own questions before anything is started, but for those that need the model.
pub(crate) fn check_ranges(request: &v1::GenerateRequest) -> Result<(), CliError> {
    const ANY_VOCABULARY: usize = usize::MAX;
    let check = || {
        validate::sampling(request.sampling.as_ref(), ANY_VOCABULARY)?;
        validate::session_limits(request.limits.as_ref(), ANY_VOCABULARY)?;
        validate::mask_policy(request.mask.as_ref(), CheckedMaskPolicy::default())?;
        validate::check_policy(request.check.as_ref())?;
        validate::stop_strings(&request.stop)?;
        validate::draft_policy(request.draft.as_ref())?;
        Ok(())
    };
    check().map_err(|invalid: Invalid| CliError::Usage(invalid.to_string()))
}

/// Whether the request uses a draft at all, as far as the command line says.
pub fn wants_draft(args: &SpeculationArgs) -> bool {
    draft_length(args) != Some(0)
}

fn draft_length(args: &SpeculationArgs) -> Option<u32> {
    if args.no_draft {
        Some(0)
    } else {
        args.draft_length
    }
}

fn sampling(args: &SamplingArgs) -> v1::Sampling {
    v1::Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: Some(args.top_p),
        min_p: args.min_p,
        repetition_penalty: Some(args.repetition_penalty),
        presence_penalty: args.presence_penalty,
        frequency_penalty: args.frequency_penalty,
        seed: args.seed,
        ..v1::Sampling::default()
    }
}

fn read_prompt(path: &Path) -> Result<String, CliError> {
    let failed = |source| CliError::Read {
        path: path.to_owned(),
        source,
    };
    let bytes = if path == Path::new("-") {
        read_bounded(io::stdin().lock())
    } else {
        File::open(path).and_then(read_bounded)
    }
    .map_err(failed)?;
    if bytes.len() > MAX_PROMPT_BYTES {
        return Err(prompt_too_long());
    }
    String::from_utf8(bytes).map_err(|error| {
        CliError::Usage(format!("the prompt is not UTF-8: {}", error.utf8_error()))
    })
}

/// Reads one byte more than allowed, so that what is too long is seen as such.
fn read_bounded(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_PROMPT_BYTES as u64 + 1)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn prompt_too_long() -> CliError {
    CliError::Usage(format!(
        "the prompt is longer than {MAX_PROMPT_BYTES} bytes"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn request(line: &[&str]) -> Result<v1::GenerateRequest, CliError> {
        let line = ["specattn", "generate"].iter().chain(line);
        match Cli::try_parse_from(line).unwrap().command {
            Command::Generate(args) => build(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_arrive_in_the_request() {
        let request = request(&[
            "Once",
            "--mode",
            "dense",
            "--top-k",
            "5",
            "--mask-p",
            "0.9",
            "--sink",
            "2",
            "--stop",
            "x",
            "--no-draft",
            "--max-tokens",
            "9",
            "--stop-token",
            "3",
            "--seed",
            "1",
        ])
        .unwrap();
        assert_eq!(request.mode(), v1::Mode::Dense);
        assert_eq!(request.prompt, Some(Prompt::Text("Once".to_owned())));
        assert_eq!(request.draft.unwrap().draft_length, Some(0));
        let sampling = request.sampling.unwrap();
        assert_eq!((sampling.top_k, sampling.seed), (5, Some(1)));
        let mask = request.mask.unwrap();
        assert_eq!((mask.mask_p, mask.sink_tokens), (Some(0.9), Some(2)));
        assert_eq!(mask.window_tokens, None);
        let limits = request.limits.unwrap();
        assert_eq!(
            (limits.max_tokens, limits.stop_token_ids),
            (Some(9), vec![3])
        );
        assert_eq!(request.stop, ["x"]);
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (flag, value, named) in [
            ("--temperature", "NaN", "temperature"),
            ("--top-p", "0", "top_p"),
            ("--max-tokens", "0", "max_tokens"),
            ("--draft-length", "17", "draft_length"),
            ("--mask-p", "1.5", "mask_p"),
            ("--granularity", "0", "granularity"),
            ("--confirm-length", "65", "confirm_length"),
            ("--refresh-every", "0", "refresh_every"),
            ("--max-kl", "0", "max_kl"),
            ("--stop", "", "stop"),
        ] {
            let error = request(&["Once", flag, value]).unwrap_err();
            assert_eq!(error.label(), "usage");
            assert!(error.to_string().contains(named), "{flag}: {error}");
        }
    }

    #[test]
    fn prompts_are_read_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompt.txt");
        let file = path.to_str().unwrap();
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            request(&["--prompt-file", file])
        };
        assert_eq!(
            read("Ein Weg\n".as_bytes()).unwrap().prompt,
            Some(Prompt::Text("Ein Weg\n".to_owned()))
        );
        assert!(read(b"").unwrap_err().to_string().contains("empty"));
        assert!(read(&[0xff]).unwrap_err().to_string().contains("UTF-8"));
        let long = read(&vec![b'a'; MAX_PROMPT_BYTES + 1]).unwrap_err();
        assert_eq!(long.label(), "usage");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(
            request(&["--prompt-file", file]).unwrap_err().label(),
            "read"
        );
    }
}
