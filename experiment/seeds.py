"""Random generators that depend on a key of integers alone, not on what was drawn before.

    start = seeded_generator(seed, metastep, task, 0)
    start = seeded_generator(seed, EVALUATION, draw, 0)     # a training after the last meta-step

So a resumed run needs no generator's state, and no process needs to know what others have drawn.
"""

import hashlib
import math

import torch

# These take the place of the meta-step in the keys of draws that belong to no meta-step
EVALUATION = 2**31  # trainings that judge a rule
SELECTION = 2**31 + 1  # trainings that choose a learning rate
TRIAL = 2**31 + 2  # trainings that choose a term or hyperparameters
BELOW = 2**31 + 3  # trainings of the layers below the one whose rule is learned
# These take the place of the number of the run in meta-training an optimiser
VALIDATION = 2**31
TUNING = 2**31 + 1  # of an optimiser's learning rate
TEST = 2**31 + 2


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded with the SHA-256 of a tuple of integers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def log_uniform_integer(low: int, high: int, generator: torch.Generator) -> int:
    """A log-uniform number from low >= 1 to high, rounded to an integer; both ends are included."""
    drawn = torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item()
    return min(high, math.floor(low * (high / low) ** drawn + 0.5))
