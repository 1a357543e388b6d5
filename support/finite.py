"""Numbers that are none: NaN and infinity, found where they begin."""

import torch


def find_largest(x):
    """The largest |number| of a tensor in one pass; NaN if any number is."""
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low, high).item()


def check_finite(**answers):
    """ValueError unless the answers of networks, in the order in which they come, are finite.

    answers: tensors by the name of who answers, None: nothing was asked.
    """
    for name, x in answers.items():
        if x is not None and not find_largest(x) < float("inf"):
            who = f"the {name.replace('_', ' ')} answers with NaN or infinity"
            advice = "its weights are damaged, or need --precision fp32"
            raise ValueError(f"{who}: {advice}")
