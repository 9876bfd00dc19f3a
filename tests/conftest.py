"""What makes all tests quick: one thread, no waiting for the disk, digits that are read once."""

import functools
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # their tensors are small, the second core is busy
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # numba's would become torch's number too

import pytest

import mnist_datasets
from comparison import kept_references


@pytest.fixture(autouse=True, scope="session")
def quick(tmp_path_factory):
    """Nothing here is meant to outlive a loss of power; tests of a full disk patch fsync again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        # neither read what runs of this user have kept nor add to it
        patch.setattr(kept_references, "FOLDER", tmp_path_factory.mktemp("kept"))
        digits = functools.cache(mnist_datasets._embedded_digits)
        patch.setattr(mnist_datasets, "_embedded_digits", digits)
        yield


def pytest_collection_finish():
    """What all modules have loaded stays: the garbage collector need not look through it again."""
    gc.collect()
    gc.freeze()
