"""Random numbers that depend on a name alone, not on what was drawn before.

    start = seeded_generator(seed, metastep, task, 0)
    start = seeded_generator(seed, EVALUATION, draw, 0)     # of a training after the last meta-step

A resumed run needs no generator's state, and no process has to know what others have drawn.
"""

import hashlib
import math

import torch

# Each stands where a meta-step does in the names of draws that belong to none
EVALUATION = 2**31  # of trainings that judge a rule
SELECTION = 2**31 + 1  # of trainings that choose a rate
TRIAL = 2**31 + 2  # of trainings that choose a term, or hyperparameters
BELOW = 2**31 + 3  # of trainings of the layers below the one whose rule is learned
# where a run of meta-training does
VALIDATION = 2**31
TUNING = 2**31 + 1  # of an optimiser's rate
TEST = 2**31 + 2


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator of its own for each tuple of integers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def log_uniform_integer(low: int, high: int, generator: torch.Generator) -> int:
    """An integer from low >= 1 to high, both included: a log-uniform number, rounded."""
    drawn = torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item()
    return min(high, math.floor(low * (high / low) ** drawn + 0.5))
