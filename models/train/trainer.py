"""One training run: the target on the text, or the draft on the target's distributions."""
import time
from pathlib import Path

import torch

import checkpoint
import corpus
import objectives
from llama import Llama
from optimizer import Optimizer
from packing import Crops

SEED = 1234
SAVE_EVERY_SECONDS = 120
PRINT_EVERY_SECONDS = 15
# Steps with gradients that are not finite are skipped; so many mean that something is wrong.
MOST_SKIPPED_STEPS = 50


class Trainer:
    """A model, its data and its optimizer. With a teacher it learns the teacher's distributions."""

    def __init__(self, shape, schedule, data, out, teacher=None):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(SEED)
        self.schedule, self.out = schedule, Path(out)
        self.crops = Crops(corpus.load(data, "train", shape.vocab_size), schedule.long_sequence, self.device)
        self.model = Llama(shape).to(self.device)
        self.teacher = teacher and checkpoint.load(teacher, self.device)
        self.optimizer = Optimizer(self.model, schedule)
        # On a CPU compiling would take longer than the tiny run.
        self.objective = torch.compile(self._objective) if self.device.type == "cuda" else self._objective
        parameters = sum(p.numel() for p in self.model.parameters())
        print(f"{parameters:,} parameters, {len(self.crops.stream):,} training tokens, {self.device}", flush=True)

    def _objective(self, inputs, targets):
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(inputs)
            if self.teacher is None:
                return objectives.next_token(logits, targets)
            with torch.no_grad():
                teacher_logits = self.teacher(inputs)
            return objectives.distillation(logits, teacher_logits, targets)

    def run(self):
        """Trains to the end of the schedule, from where an interrupted run in the same folder stopped."""
        self.out.mkdir(parents=True, exist_ok=True)
        first = self._resume()
        saved = printed = time.monotonic()
        skipped = 0
        for step in range(first, self.schedule.steps):
            figure, norm = self._gradients(step)
            if torch.isfinite(norm):
                self.optimizer.step(step)
            else:
                skipped += 1
                if skipped > MOST_SKIPPED_STEPS:
                    raise SystemExit("gradients are not finite")
            self.model.zero_grad(set_to_none=True)
            now, last = time.monotonic(), step + 1 == self.schedule.steps
            if last or step == first or now - printed > PRINT_EVERY_SECONDS:
                name = "next-token loss" if self.teacher is None else "KL to the target"
                print(f"step {step + 1} of {self.schedule.steps}: {name} {float(figure):.4f}", flush=True)
                printed = now
            if not last and now - saved > SAVE_EVERY_SECONDS:
                state = dict(step=step + 1, model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
                checkpoint.save_state(self.out, state)
                saved = now
        return self.model

    def _gradients(self, step):
        """Accumulates a step's gradients; gives the figure to watch and the norm before clipping."""
        # Each step has random numbers of its own, so that a resumed run sees the crops it would have seen.
        generator = torch.Generator(self.device).manual_seed(SEED + step)
        length = self.schedule.sequence_length(step)
        parts = self.schedule.batch_tokens // self.schedule.micro_batch_tokens
        total = torch.zeros((), device=self.device)
        for _ in range(parts):
            batch = self.crops.batch(self.schedule.micro_batch_tokens // length, length, generator)
            loss, figure = self.objective(*batch)
            (loss / parts).backward()
            total += figure.detach() / parts
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.max_gradient_norm)
        return total, norm

    def _resume(self):
        state = checkpoint.load_state(self.out, self.device)
        if state is None:
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        print(f"resumed after step {state['step']}", flush=True)
        return state["step"]


def train(profile, role, data, out, teacher=None):
    """Trains the profile's target or draft into the model folder `out`."""
    shape, schedule = getattr(profile, role), getattr(profile, f"{role}_schedule")
    model = Trainer(shape, schedule, data, out, teacher).run()
    checkpoint.export(model, out, Path(data) / "tokenizer", profile.shard_bytes)
    (Path(out) / checkpoint.STATE).unlink(missing_ok=True)
    print(f"wrote {out}", flush=True)
