"""Updates that are replayed from recordings, on the CPU: results, gradients, buffers."""

import itertools
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from oracles import normal

from kernels.recorded_updates import (
    CalledRecording,
    CudaRecording,
    RecordedUpdates,
    RecordingError,
)


def update(psi, theta, batch):
    """Of two tensors, one of which remembers."""
    (a, b), (w, v), (x, y) = psi, theta, batch
    return [w + a * torch.tanh(x @ w) - b * v, 0.5 * v + w.sin() * y]


def parts(steps):
    """psi, theta and batches, leaves."""
    psi = [normal(1, 4), normal(2, 4)]
    theta = [normal(3, 4, 4), normal(4, 4, 4)]
    return psi, theta, [[normal(5 + k, 4, 4).detach(), normal(50 + k, 4).detach()]
                        for k in range(steps)]  # fmt: skip


def one_by_one(psi, theta, batches, hold=None):
    """The same without recordings; `hold` by a hook on every theta."""
    for batch in batches:
        theta = update(psi, theta, batch)
        if hold is not None:
            for k, t in enumerate(theta):
                t.register_hook(lambda g, k=k: hold(g, k))
    return theta


class Counted(CalledRecording):
    made, calls = [], 0

    def __init__(self, function, examples):
        super().__init__(function, examples)
        Counted.made.append(function.__name__)

    def __call__(self, *tensors):
        Counted.calls += 1
        return super().__call__(*tensors)


def gradients(theta, leaves):
    return torch.autograd.grad(sum((t * t.cos()).sum() for t in theta), leaves)


@pytest.mark.parametrize("steps, length", [(1, 1), (6, 3), (7, 3), (2, 5), (8, 1), (5, 5)])
def test_replays_are_the_updates_and_their_gradients(steps, length):
    psi, theta, batches = parts(steps)
    updates = RecordedUpdates(update, length)
    for _ in range(2):  # again with the same recordings, and other numbers
        found = updates(psi, theta, batches, [])
        expected = one_by_one(psi, theta, batches)
        pairs = zip(
            [*found, *gradients(found, [*psi, *theta])],
            [*expected, *gradients(expected, [*psi, *theta])],
            strict=True,
        )
        for one, other in pairs:
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
        psi = [(0.7 * p).detach().requires_grad_() for p in psi]
        theta = [t.detach().requires_grad_() for t in found]


def test_two_recordings_serve_all_updates_and_what_is_left_over_has_two_more():
    Counted.made, Counted.calls = [], 0
    updates = RecordedUpdates(update, 4, record=Counted)
    for steps in (12, 8):
        psi, theta, batches = parts(steps)
        gradients(updates(psi, theta, batches, []), [*psi, *theta])
    assert Counted.made == ["forward", "backward"] and Counted.calls == 2 * (3 + 2)
    psi, theta, batches = parts(6)
    gradients(updates(psi, theta, batches, []), [*psi, *theta])
    assert Counted.made == ["forward", "backward"] * 2 and Counted.calls == 10 + 2 * 3


def test_results_outlive_the_next_replay():
    psi, theta, batches = parts(4)
    updates = RecordedUpdates(update, 2)
    first = updates(psi, theta, batches, [])
    copies = [t.detach().clone() for t in first]
    updates([2 * p for p in psi], theta, batches, [])
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(first, copies))
    wanted = gradients(one_by_one(psi, theta, batches), psi)
    for one, other in zip(gradients(first, psi), wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_adjoints_are_held_from_the_last_to_the_first_with_a_state(length):
    def hold(adjoints, state):
        """Each divided by the number of updates that it has come through."""
        (count,) = state
        return [a / (1 + count) for a in adjoints], [count + 1]

    psi, theta, batches = parts(7)
    state = [torch.zeros((), dtype=torch.float64)]
    found = RecordedUpdates(update, length, hold)(psi, theta, batches, state)
    counts = [0, 0]

    def hook(g, k):
        counts[k] += 1
        return g / counts[k]

    expected = one_by_one(psi, theta, batches, hook)
    leaves = [*psi, *theta]
    for one, other in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
    assert state[0] == 7


class Workspaces:
    """torch's workspace of products on the stream that all graphs are captured on, as a tensor.

    A graph that is deleted frees it, as in torch 2.13, and what is free is nan.
    """

    def __init__(self):
        self.kept, self.capturing = None, False

    def product(self, x):
        """x, by way of the workspace that a graph under capture refers to from then on."""
        if not self.capturing:
            return x
        self.kept = torch.zeros(()) if self.kept is None else self.kept
        return x + self.kept

    def free(self):
        """Free the workspace, which stays as it is: only a graph writes to its own pool."""
        self.kept = None

    @contextmanager
    def graph(self, graph):
        self.capturing, graph.used = True, None
        try:
            yield
            graph.used = self.kept
        finally:
            self.capturing = False

    def deleted(self):
        if self.kept is not None:
            self.kept.fill_(torch.nan)
        self.free()


def test_a_graph_outlives_others_that_are_deleted(monkeypatch):
    torch_s = Workspaces()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "graph": torch_s.graph,
        "stream": lambda stream: nullcontext(), "CUDAGraph": SimpleNamespace,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", torch_s.free, raising=False)
    one, _ = (CudaRecording(lambda x: [torch_s.product(x)], [torch.ones(2)]) for _ in range(2))
    torch_s.deleted()  # the other one
    assert one.graph.used is not None and one.graph.used.isfinite()
    with pytest.raises(RecordingError, match="no"):
        CudaRecording(_refused(torch_s), [torch.ones(2)])
    assert torch_s.kept is None


def _refused(torch_s):
    def function(x):
        torch_s.product(x)
        if torch_s.capturing:
            raise RuntimeError("no")
        return [x]

    return function
