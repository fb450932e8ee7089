"""What is trained and how: model shapes, schedules, and the profiles that bring them together."""
from dataclasses import dataclass

# Token ids that every tokenizer of the recipe reserves.
BEGIN_OF_TEXT, END_OF_TEXT = 0, 1


@dataclass(frozen=True)
class ModelShape:
    """A Llama: pre-norm blocks, rotary positions, grouped-query attention, gated SiLU MLP, tied embeddings."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5


@dataclass(frozen=True)
class Schedule:
    """One training run. The learning rate rises linearly over the warm-up and then falls linearly to zero."""
    steps: int
    peak_learning_rate: float
    warmup_steps: int
    # Tokens of one optimizer step, and of one forward pass within it.
    batch_tokens: int
    micro_batch_tokens: int
    # Tokens per sequence, and the share of the steps after which the long ones begin: most is learnt on short
    # sequences, which are cheaper, and the reach over the whole context at the end.
    short_sequence: int
    long_sequence: int
    long_from: float = 0.85
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0

    def sequence_length(self, step):
        return self.long_sequence if step >= self.long_from * self.steps else self.short_sequence

    def learning_rate(self, step):
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.peak_learning_rate * warmup * (1 - step / self.steps)


@dataclass(frozen=True)
class Profile:
    """A pair to make. Target and draft share a tokenizer, hence a vocabulary and a context."""
    target: ModelShape
    draft: ModelShape
    target_schedule: Schedule
    draft_schedule: Schedule
    # Most bytes of a safetensors file.
    shard_bytes: int


def _bundled():
    shared = dict(vocab_size=8192, head_dim=64, max_context=8192)
    schedule = dict(warmup_steps=100, batch_tokens=262_144, micro_batch_tokens=65_536, short_sequence=2048, long_sequence=8192)
    return Profile(
        target=ModelShape(hidden_size=384, intermediate_size=896, num_layers=8, num_heads=6, num_kv_heads=2, **shared),
        draft=ModelShape(hidden_size=192, intermediate_size=512, num_layers=3, num_heads=3, num_kv_heads=1, **shared),
        target_schedule=Schedule(steps=6024, peak_learning_rate=4e-3, **schedule),
        draft_schedule=Schedule(steps=4046, peak_learning_rate=6e-3, **schedule),
        shard_bytes=15_000_000)


def _tiny():
    shared = dict(vocab_size=384, head_dim=16, max_context=128)
    schedule = dict(warmup_steps=4, batch_tokens=512, micro_batch_tokens=256, short_sequence=64, long_sequence=128)
    return Profile(
        target=ModelShape(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, **shared),
        draft=ModelShape(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1, **shared),
        target_schedule=Schedule(steps=40, peak_learning_rate=2e-2, **schedule),
        draft_schedule=Schedule(steps=40, peak_learning_rate=2e-2, **schedule),
        shard_bytes=100_000)


# `bundled` is the pair of this repository; `tiny` goes through every stage on a CPU in seconds.
PROFILES = {"bundled": _bundled, "tiny": _tiny}
