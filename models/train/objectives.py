"""What is minimised. Each objective gives (loss to descend, figure to watch), both means per token in nats."""
import torch
import torch.nn.functional as F

# Keeps the softmax's normaliser near 1, so that bf16 logits keep their precision.
Z_LOSS = 1e-5

# Share of plain cross-entropy in the draft's objective: ties the draft to the text where the target is unsure.
CROSS_ENTROPY_SHARE = 0.1


def next_token(logits, targets):
    """Cross-entropy with the next token, and a small penalty on the square of the log-normaliser."""
    logits = logits.float()
    normaliser = torch.logsumexp(logits, -1)
    cross_entropy = (normaliser - logits.gather(-1, targets[..., None]).squeeze(-1)).mean()
    return cross_entropy + Z_LOSS * normaliser.pow(2).mean(), cross_entropy


def distillation(logits, teacher_logits, targets):
    """KL(target || draft) over the whole vocabulary at temperature 1: a draft token's chance of acceptance is the overlap of
    the two distributions, so the draft is to match the target, and not the text.
    """
    draft = F.log_softmax(logits.float(), -1)
    target = F.log_softmax(teacher_logits.float(), -1)
    divergence = (target.exp() * (target - draft)).sum(-1).mean()
    cross_entropy = -draft.gather(-1, targets[..., None]).mean()
    return divergence + CROSS_ENTROPY_SHARE * cross_entropy, divergence
