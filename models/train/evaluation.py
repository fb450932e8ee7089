"""What a pair is worth: perplexities on validation text, and how well the draft foresees the target."""
import math

import torch
import torch.nn.functional as F

import checkpoint
import corpus


@torch.no_grad()
def evaluate(target, draft, data, schedule):
    """Prints and returns figures over windows of the short and the long sequence length.

    Of long windows only the second half counts: tokens with much behind them. *Acceptance* is the mean overlap
    Σ min(p, q): the chance that a token sampled from the draft is accepted. *Agreement* is the share of positions at
    which both would say the same greedily.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target, draft = checkpoint.load(target, device), checkpoint.load(draft, device)
    stream = corpus.load(data, "valid", target.shape.vocab_size).to(device)
    results = {}
    for length, first in ((schedule.short_sequence, 0), (schedule.long_sequence, schedule.long_sequence // 2)):
        sums, count = torch.zeros(4, dtype=torch.float64, device=device), 0
        for start in range(0, len(stream) - length, length):
            window = stream[start:start + length + 1]
            answers = window[first + 1:, None]
            p = F.log_softmax(target(window[None, :-1])[0, first:].float(), -1)
            q = F.log_softmax(draft(window[None, :-1])[0, first:].float(), -1)
            sums += torch.stack([
                -p.gather(-1, answers).sum(), -q.gather(-1, answers).sum(),
                (p.argmax(-1) == q.argmax(-1)).sum(), torch.minimum(p, q).exp().sum()]).double()
            count += len(answers)
        if count == 0:
            print(f"windows of {length}: the validation text is shorter", flush=True)
            continue
        target_loss, draft_loss, agreement, acceptance = (sums / count).tolist()
        results[length] = dict(
            target_perplexity=math.exp(target_loss), draft_perplexity=math.exp(draft_loss), agreement=agreement,
            acceptance=acceptance)
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in results[length].items())
        print(f"windows of {length}, {count} tokens: {figures}", flush=True)
    return results
