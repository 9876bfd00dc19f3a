"""Products of tasks in parts against the product as it is written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import normal

from kernels.task_products import BLOCKS, LEAST_SAMPLES, _parts, contracted


@given(
    lead=st.sampled_from([(), (3,), (2, 3)]),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    parts=st.sampled_from([None, 1, 2, 4, 8]),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_the_product_in_parts_is_the_product(lead, m, n, parts):
    one, other = normal(1, *lead, 16, m), normal(2, *lead, 16, n)
    expected = torch.einsum("...bm,...bn->...mn", one, other)
    torch.testing.assert_close(contracted(one, other, parts), expected, rtol=1e-12, atol=1e-12)
    turned = contracted(one.mT.contiguous().mT, other, parts)
    torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)


def test_on_a_cpu_the_samples_are_in_one_part():
    one = normal(1, 3, 4096, 4)
    assert torch.equal(contracted(one, one), one.mT @ one)


@pytest.mark.parametrize(
    "tasks, samples, m, n, parts",
    [
        (1, 1024, 32, 32, 16), (64, 1024, 32, 32, 8), (16, 32768, 3, 5, 32), (64, 1024, 32, 784, 1),
        (16, 1024, 32, 784, 4), (4, 1000, 8, 8, 8), (4, 999, 8, 8, 1), (1, 32, 8, 8, 1),
    ],
)  # fmt: skip
def test_as_many_parts_as_keep_a_gpu_busy(tasks, samples, m, n, parts):
    one, other = (torch.empty(tasks, samples, k, device="meta") for k in (m, n))
    assert _parts(one, other) == parts
    assert samples // parts >= min(samples, LEAST_SAMPLES) and tasks * parts <= BLOCKS
