"""Whether what is computed is differentiated forward, which autograd functions here cannot be.

Where it is, formulas are evaluated in operations of torch alone.
"""

from torch.autograd import forward_ad


def runs_forward() -> bool:
    """Whether tensors may carry tangents now, of torch.autograd.forward_ad or torch.func.jvp."""
    return forward_ad._current_level >= 0
