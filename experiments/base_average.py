"""The running mean of weights that train (EMA), and the best of these means so far.

Pictures by mean weights are better than by the last ones, whose last steps are noise. And the last
is not always the best: thousands of photos can be learned by heart. Both are buffers, so the
checkpoint of a stage holds them, and --resume goes on exactly.
"""

from contextlib import contextmanager

import torch
from torch import nn


class Average(nn.Module):
    """A network that trains, the mean of its weights, and the best mean that `keep` was told of."""

    def __init__(self, network, decay=0.999):
        super().__init__()
        self.network = network
        self.decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("best_score", torch.tensor(-torch.inf, dtype=torch.float64))
        for k, weight in enumerate(self.weights()):
            self.register_buffer(f"mean_{k}", weight.detach().clone())
            self.register_buffer(f"best_{k}", weight.detach().clone())

    def weights(self):
        return list(self.network.parameters())

    def copies(self, kind):
        """The buffers of one kind, "mean" or "best", in the order of the weights."""
        return [getattr(self, f"{kind}_{k}") for k in range(len(self.weights()))]

    @torch.no_grad()
    def update(self):
        """mean ← d·mean + (1−d)·weight, once a batch; at first d is smaller: the start is random."""
        count = int(self.updates)
        decay = min(self.decay, (1 + count) / (10 + count))
        for mean, weight in zip(self.copies("mean"), self.weights()):
            mean.lerp_(weight.detach(), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self):
        """Inside, the network has its mean weights."""
        own = [weight.detach().clone() for weight in self.weights()]
        self.write(self.copies("mean"))
        try:
            yield
        finally:
            self.write(own)

    @torch.no_grad()
    def write(self, values):
        for weight, value in zip(self.weights(), values):
            weight.copy_(value)

    @torch.no_grad()
    def keep(self, score):
        """Keep the mean if its score is the best so far. Returns whether it is."""
        is_best = score > float(self.best_score)
        if is_best:
            self.best_score.fill_(score)
            for best, mean in zip(self.copies("best"), self.copies("mean")):
                best.copy_(mean)
        return is_best

    def settle(self):
        """The network gets the best mean, for good."""
        self.write(self.copies("best"))


def average_task(task, average):
    """The task with the mean of its weights: these are validated, and the best is kept.

    Less is better of `validation`; of `identity`, if it is measured, more, and then it decides.
    """

    def loss(batch, generator):
        average.update()
        return task.loss(batch, generator)

    def validate():
        with average.applied():
            values = task.validate()
        average.keep(values.get("identity", -values["validation"]))
        return values

    return type(task)(task.name, average, loss, validate)
