"""Training sequences: random crops of the token stream."""
import torch

from recipe import BEGIN_OF_TEXT


class Crops:
    """Short crops begin anywhere in the stream, across books as they come; long ones lie inside one book where some book
    is long enough, so that what is far back is worth attending to.
    """

    def __init__(self, stream, long_sequence, device):
        self.stream = stream.to(device)
        self.long_sequence = long_sequence
        starts = (stream == BEGIN_OF_TEXT).nonzero().squeeze(1)
        ends = torch.cat([starts[1:], torch.tensor([len(stream)])])
        # Points at which a crop of long_sequence + 1 tokens of the book may begin.
        room = ends - starts - long_sequence
        self.starts = starts[room > 0].to(device)
        self.cumulative = room[room > 0].cumsum(0).to(device)

    def batch(self, rows, length, generator):
        """Inputs and next tokens, each `[rows, length]`; `generator` lives on the stream's device."""
        device = self.stream.device
        if length == self.long_sequence and len(self.cumulative):
            point = torch.randint(int(self.cumulative[-1]), (rows,), device=device, generator=generator)
            book = torch.searchsorted(self.cumulative, point, right=True)
            before = torch.where(book > 0, self.cumulative[(book - 1).clamp(min=0)], torch.zeros_like(point))
            start = self.starts[book] + point - before
        else:
            start = torch.randint(len(self.stream) - length, (rows,), device=device, generator=generator)
        crop = self.stream[start[:, None] + torch.arange(length + 1, device=device)]
        return crop[:, :-1].contiguous(), crop[:, 1:].contiguous()
