"""Greedy continuations as transformers computes them in float32: the truth that greedy decoding is held to.

    python greedy_reference.py --model ../../models/target --out ../fixtures/greedy_bundled.json
    python greedy_reference.py --model DIR --text a.txt b.txt --out books.json

Prompts are sampled from the model itself (temperature 1, seeded, after a short opening sentence), so that the fixture
holds no one's text; or taken from text files, each prompt from a random place. Lengths run geometrically from
--shortest to --longest. Output:

    {"model", "dtype", "transformers", "seed", "new_tokens",
     "prompts": [{"source", "prompt": [ids], "greedy": [ids], "gaps": [f, ...]}]}

`gaps[i]` is the logit of the i-th greedy token less that of the runner-up: where two implementations differ at a gap of
the order of rounding (1e-4), neither is wrong; anywhere else one is. End-of-text tokens do not stop generation.
"""

import argparse
import json
import os
import pathlib
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

OPENINGS = (
    "The ferry was late that evening, and nobody on the quay seemed to mind.",
    "My aunt kept three clocks in the parlour, and no two of them agreed.",
    "Before the snow had melted the stranger asked for the key of the mill.",
    "There is a road behind the chapel which the children will not take.",
    "Mr. Harland folded the letter twice and put it under the sugar bowl.",
    "The garden had been let go, and the house had followed it.",
    "On the morning of the sale it rained as if it never meant to stop.",
    "She had promised herself not to speak of the money again.",
    "A lantern moved along the ridge, went out, and was lit again.",
    "The captain was a small man with a large opinion of his dog.",
    "Nobody in the village could remember who had planted the elms.",
    "They dined at eight, and at nine the first stone came through the window.",
    "I was eleven years old when my father sold the boat.",
    "The doctor looked at the boy, and then for a long time at the floor.",
    "It was said of old Mrs. Pell that she had once refused a bishop.",
    "The train stopped between two stations and did not go on.",
    "All that summer the bells of the town were out of tune.",
    "He counted the steps again, and again there was one too many.",
    "Miss Arden had come to teach music to children who wished for none.",
    "The river had risen in the night and taken the lower field.",
)


def lengths(count, shortest, longest):
    """`count` prompt lengths, geometric from `shortest` to `longest`."""
    ratio = (longest / shortest) ** (1 / max(count - 1, 1))
    return [round(shortest * ratio**i) for i in range(count)]


def generate(model, prompt, new_tokens, **options):
    """Runs transformers' generate over one prompt without stopping early."""
    ids = torch.tensor([prompt])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **options,
    )


def sampled_prompt(model, tokenizer, opening, length):
    """An opening continued by the model itself at temperature 1."""
    prompt = tokenizer(opening)["input_ids"][:length]
    if len(prompt) == length:
        return prompt
    out = generate(model, prompt, length - len(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return out.sequences[0].tolist()


def text_prompt(tokenizer, path, length, generator):
    """`length` tokens from a random place of a text file, with the tokenizer's own beginning."""
    text = path.read_text(encoding="utf-8")
    beginning = tokenizer("")["input_ids"]
    # A token is seldom more than eight characters; cut at a line's start.
    span = min(len(text), length * 8 + 1000)
    start = int(torch.randint(0, len(text) - span + 1, (1,), generator=generator))
    start = text.find("\n", start) + 1
    ids = tokenizer(text[start : start + span].strip(), add_special_tokens=False)["input_ids"]
    prompt = (beginning + ids)[:length]
    if len(prompt) < length:
        sys.exit(f"{path} has fewer than {length} tokens from a random place on")
    return prompt


def greedy(model, prompt, new_tokens):
    """(token ids, gap between the two largest logits of every step)."""
    out = generate(model, prompt, new_tokens, do_sample=False, output_logits=True)
    tokens = out.sequences[0, len(prompt) :].tolist()
    top = torch.cat(out.logits).topk(2, dim=-1).values
    return tokens, [round(float(gap), 5) for gap in top[:, 0] - top[:, 1]]


def main():
    parser = argparse.ArgumentParser(description="Greedy continuations by transformers in float32, as JSON.")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="checkpoint folder")
    parser.add_argument("--text", type=pathlib.Path, nargs="*", default=[], help="take prompts from these files")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--shortest", type=int, default=50, help="tokens of the shortest prompt")
    parser.add_argument("--longest", type=int, default=3000, help="tokens of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's own choice")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    # Only the arguments of this script decide: the checkpoint's own sampling defaults would leak in otherwise.
    model.generation_config = transformers.GenerationConfig(bos_token_id=model.config.bos_token_id)

    prompts = []
    begun = time.monotonic()
    for index, length in enumerate(lengths(args.prompts, args.shortest, args.longest)):
        seed = args.seed * 1000 + index
        torch.manual_seed(seed)
        if args.text:
            path = args.text[index % len(args.text)]
            source = path.name
            prompt = text_prompt(tokenizer, path, length, torch.Generator().manual_seed(seed))
        else:
            source = OPENINGS[index % len(OPENINGS)]
            prompt = sampled_prompt(model, tokenizer, source, length)
        tokens, gaps = greedy(model, prompt, args.new_tokens)
        prompts.append({"source": source, "prompt": prompt, "greedy": tokens, "gaps": gaps})
        print(
            f"{index + 1}/{args.prompts}: {length} tokens, smallest gap {min(gaps):.5f}, {time.monotonic() - begun:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    result = {
        "model": args.model.resolve().name,
        "dtype": "float32",
        "transformers": transformers.__version__,
        "seed": args.seed,
        "new_tokens": args.new_tokens,
    }
    with open(args.out, "w", encoding="utf-8") as file:
        head = json.dumps(result, indent=1)
        rows = ",\n".join("  " + json.dumps(entry, separators=(",", ":")) for entry in prompts)
        file.write(f'{head[:-2]},\n "prompts": [\n{rows}\n ]\n}}\n')
    print(f"{os.path.getsize(args.out)} bytes to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
