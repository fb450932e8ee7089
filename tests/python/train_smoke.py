"""Makes a tiny pair with the recipe in models/train, on a CPU and within seconds, and says what each model of it says greedily.

    python train_smoke.py OUT

OUT/greedy.json holds, for `target` and `draft`, a prompt and its greedy continuation by the exported checkpoint in float32.
Exit status 77: a package is missing.
"""
import dataclasses
import json
import random
import runpy
import sys
from pathlib import Path

try:
    import numpy, safetensors, tokenizers, torch  # noqa: F401
except ImportError as missing:
    print(missing)
    sys.exit(77)

RECIPE = Path(__file__).resolve().parents[2] / "models" / "train"
NEW_TOKENS = 24


def write_corpus(folder):
    """Books of made-up sentences: little to learn, and it can be learnt in a few steps."""
    draw = random.Random(5)
    words = ["".join(draw.choice("aeiou") + draw.choice("bdglmnrst") for _ in range(draw.randint(1, 3))) for _ in range(60)]
    sentence = lambda: " ".join(draw.choices(words, range(60, 0, -1), k=draw.randint(3, 9))).capitalize() + "."
    for split, count in (("train", 2), ("valid", 1)):
        (folder / split).mkdir(parents=True)
        for book in range(count):
            text = "\n\n".join(" ".join(sentence() for _ in range(6)) for _ in range(80))
            (folder / split / f"{book}.txt").write_text(text, encoding="utf-8")


@torch.no_grad()
def greedy(model, prompt):
    """The continuation of `prompt`, and the smallest gap between the two largest logits on the way."""
    ids, gap = list(prompt), float("inf")
    for _ in range(NEW_TOKENS):
        top = model(torch.tensor([ids]))[0, -1].topk(2)
        gap = min(gap, float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    return ids[len(prompt):], gap


def check_resumption(profile, out):
    """A run that goes on from a saved state ends with the weights it would have had."""
    import trainer

    trainer.SAVE_EVERY_SECONDS = -1.0
    schedule = dataclasses.replace(profile.draft_schedule, steps=3)
    run = lambda: trainer.Trainer(profile.draft, schedule, out / "data", out / "resumed").run().state_dict()
    straight = run()
    # The state of the last but one step is there.
    resumed = run()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight), "resumption changes the weights"


def main():
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    write_corpus(out / "corpus")
    sys.path.insert(0, str(RECIPE))
    sys.argv = ["train", "pair", "--corpus", str(out / "corpus"), "--out", str(out), "--profile", "tiny"]
    runpy.run_path(str(RECIPE / "__main__.py"), run_name="__main__")

    import checkpoint
    import corpus
    import evaluation
    from recipe import PROFILES

    profile = PROFILES["tiny"]()
    figures = evaluation.evaluate(out / "target", out / "draft", out / "data", profile.target_schedule)
    for length, figure in figures.items():
        assert figure["target_perplexity"] < profile.target.vocab_size / 8, (length, figure)
        assert figure["acceptance"] > 0.5, (length, figure)
    assert len(figures) == 2, "windows of both lengths are evaluated"
    assert len(list((out / "target").glob("model-*.safetensors"))) > 1, "the target comes in shards"

    check_resumption(profile, out)

    prompt = corpus.load(out / "data", "valid", profile.target.vocab_size)[:40].tolist()
    answers = {}
    for role in ("target", "draft"):
        tokens, gap = greedy(checkpoint.load(out / role, "cpu"), prompt)
        answers[role] = dict(prompt=prompt, greedy=tokens)
        print(f"{role}: smallest gap of logits {gap:.4f}")
    (out / "greedy.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
