"""Makes a pair of models for SpecAttn: a folder of books in, a target and a draft that share a tokenizer out.

  python models/train pair     --corpus CORPUS --out OUT   everything: OUT/data, OUT/target, OUT/draft, figures
  python models/train prepare  --corpus CORPUS --out OUT   tokenizer and token streams into OUT/data
  python models/train target   --out OUT                   trains OUT/target
  python models/train draft    --out OUT                   distils OUT/draft from OUT/target
  python models/train evaluate --out OUT                   figures of both

CORPUS holds train/*.txt and valid/*.txt, one book a file. Interrupted training goes on where it was last saved. One GPU is
used where there is one.
"""
import argparse
from pathlib import Path

import corpus
import evaluation
import trainer
from recipe import PROFILES

STAGES = ("prepare", "target", "draft", "evaluate")


def main():
    parser = argparse.ArgumentParser(
        prog="models/train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("pair", *STAGES))
    parser.add_argument("--corpus", type=Path, help="folder of books; for pair and prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--profile", choices=PROFILES, default="bundled", help="shapes and schedules [default: %(default)s]")
    args = parser.parse_args()
    profile, out = PROFILES[args.profile](), args.out
    stages = STAGES if args.stage == "pair" else (args.stage,)
    if "prepare" in stages and args.corpus is None:
        parser.error("--corpus is needed")
    data = out / "data"
    if "prepare" in stages:
        corpus.prepare(args.corpus, data, profile.target)
    if "target" in stages:
        trainer.train(profile, "target", data, out / "target")
    if "draft" in stages:
        trainer.train(profile, "draft", data, out / "draft", teacher=out / "target")
    if "evaluate" in stages:
        evaluation.evaluate(out / "target", out / "draft", data, profile.target_schedule)


if __name__ == "__main__":
    main()
