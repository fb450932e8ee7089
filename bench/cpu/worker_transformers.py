"""transformers as a worker: plain or assisted generation, in bf16 or f32."""

import argparse
import pathlib

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

import worker


class Marks(BaseStreamer):
    """Hands tokens to the run as they come; the first call brings the prompt."""

    def __init__(self, run):
        self.run = run
        self.prompt_seen = False

    def put(self, value):
        if self.prompt_seen:
            self.run.emit(value.flatten().tolist())
        self.prompt_seen = True

    def end(self):
        pass


def main():
    parser = argparse.ArgumentParser(description="transformers worker of run.py.")
    parser.add_argument("--target", type=pathlib.Path, required=True, help="checkpoint folder")
    parser.add_argument("--draft", type=pathlib.Path, help="checkpoint folder; without it, plain generation")
    parser.add_argument("--draft-max", type=int, default=0, help="tokens per round, fixed; 0: transformers' own rule")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).eval()
    target = load(args.target)
    # Nothing of the checkpoint's own sampling defaults may leak into a request.
    target.generation_config = GenerationConfig(bos_token_id=target.config.bos_token_id)
    options = {}
    if args.draft:
        draft = load(args.draft)
        draft.generation_config = GenerationConfig(bos_token_id=draft.config.bos_token_id)
        if args.draft_max:
            draft.generation_config.num_assistant_tokens = args.draft_max
            draft.generation_config.num_assistant_tokens_schedule = "constant"
            draft.generation_config.assistant_confidence_threshold = 0.0
        options["assistant_model"] = draft

    def generate(request, run):
        torch.manual_seed(request["seed"])
        if request["temperature"] > 0:
            rule = dict(do_sample=True, temperature=request["temperature"], top_k=0, top_p=1.0)
        else:
            rule = dict(do_sample=False)
        ids = torch.tensor([request["prompt"]])
        with torch.inference_mode():
            target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request["new_tokens"],
                min_new_tokens=request["new_tokens"],
                eos_token_id=None,
                pad_token_id=0,
                streamer=Marks(run),
                **rule,
                **options,
            )

    worker.serve(generate, {"baseline_rss_bytes": worker.BASELINE_RSS, "transformers": transformers.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
