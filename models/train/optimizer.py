"""Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for the embedding and the norms."""
import math

import torch


@torch.no_grad()
def orthogonalize(gradients, steps=5):
    """Newton-Schulz iteration: takes each matrix U S V^T of `[n, rows, columns]` close to U V^T."""
    x = gradients.bfloat16() if gradients.is_cuda else gradients.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Nesterov momentum, then orthogonalized updates scaled to the size of AdamW's: 0.2 · √max(rows, columns).

    Matrices of one shape are stepped together.
    """

    def __init__(self, parameters, momentum=0.95):
        self.momentum = momentum
        self.groups = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, learning_rate, weight_decay):
        for shape, group in self.groups.items():
            gradients, buffer = torch.stack([p.grad for p in group]), self.buffers[shape]
            buffer.lerp_(gradients, 1 - self.momentum)
            update = orthogonalize(gradients.lerp(buffer, self.momentum)) * (0.2 * math.sqrt(max(shape)))
            torch._foreach_mul_(group, 1 - learning_rate * weight_decay)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-learning_rate)

    def state_dict(self):
        return {"x".join(map(str, shape)): buffer for shape, buffer in self.buffers.items()}

    def load_state_dict(self, state):
        for shape, buffer in self.buffers.items():
            buffer.copy_(state["x".join(map(str, shape))])


class Optimizer:
    """Both of them over a model's parameters, under one learning rate."""

    def __init__(self, model, schedule):
        self.schedule = schedule
        self.muon = Muon(p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
        norms = [p for p in model.parameters() if p.dim() == 1]
        groups = [
            dict(params=[model.embed_tokens.weight], weight_decay=schedule.weight_decay),
            dict(params=norms, weight_decay=0.0)]
        self.adam = torch.optim.AdamW(groups, lr=schedule.peak_learning_rate, betas=(0.9, 0.95), eps=1e-10)

    def step(self, step):
        learning_rate = self.schedule.learning_rate(step)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        self.muon.step(learning_rate, self.schedule.weight_decay)

    def state_dict(self):
        return dict(muon=self.muon.state_dict(), adam=self.adam.state_dict())

    def load_state_dict(self, state):
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
