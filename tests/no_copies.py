"""A check for what a CUDA graph cannot record: copies from the host, on tensors without numbers."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoCopies(TorchDispatchMode):
    """Refuses copies between devices."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        found = tree_leaves((arguments, options, result))
        devices = {t.device.type for t in found if isinstance(t, torch.Tensor)}
        assert len(devices) < 2, f"{function} of tensors on {devices}"
        return result
