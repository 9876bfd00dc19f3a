"""Random generators determined by a key alone, independently of what was drawn before."""

import hashlib

import torch


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of these integers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
