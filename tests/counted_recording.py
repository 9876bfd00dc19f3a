"""A recording on the CPU that is counted."""

from kernels.recorded_updates import CalledRecording


class Counted(CalledRecording):
    """Tells how many recordings were made, and how often any was called, since `from_zero`."""

    made, calls = 0, 0

    @classmethod
    def from_zero(cls) -> type["Counted"]:
        """The class itself, whose counts are 0 again."""
        cls.made = cls.calls = 0
        return cls

    def __init__(self, function, examples):
        super().__init__(function, examples)
        Counted.made += 1

    def __call__(self, *tensors):
        Counted.calls += 1
        return super().__call__(*tensors)
