"""Accuracies of references that earlier runs on this machine have found, kept on disk.

    kept = KeptReferences(setting, draws=3, steps=250, seed=0)
    accuracies = kept.read("pca")           # None if they must be computed
    kept.write("pca", [0.91, 0.92, 0.91])

They lie below $XDG_CACHE_HOME, by default ~/.cache, in one file for each reference. Its name is a
digest of all that the numbers depend on: images and labels, the setting, draws, steps and seed,
versions of Python and of the packages that compute, the device, processor and number of threads,
and every source file and saved rule of this program. Where sources have changed since they were
loaded, nothing is read or written. A file that is damaged, or holds anything but such numbers, is
as good as none, and so is a folder that can't be read or written.
"""

import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch

from comparison.rule_comparison import Setting
from data_sets.image_data import ImageData
from experiment.files import json_text, write_whole

FOLDER = "hypgraddesc/references"
ROOT = Path(__file__).resolve().parent.parent
WITHOUT_EFFECT = {"tests", "benchmarks", "examples", "docs", "figures"}
PACKAGES = ("torch", "numpy", "numba", "scipy", "scikit-learn")


class KeptReferences:
    """The accuracies of references in one setting, as `beside` returns them.

    setting, draws, steps, seed: as in `beside`.
    given: the names of the references that were read.
    """

    def __init__(self, setting: Setting, *, draws: int, steps: int, seed: int) -> None:
        self.draws, self.given = draws, []
        self.key = [*_of_setting(setting), draws, steps, seed, *_of_machine(setting), SOURCES]

    def path(self, name: str) -> Path:
        """The file of a reference."""
        key = sha256(json.dumps([name, *self.key]).encode()).hexdigest()
        home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        return Path(home) / FOLDER / f"{name}-{key}.json"

    def read(self, name: str) -> list[float] | None:
        """The accuracies, one for each draw that stayed finite; None if there are none."""
        with suppress(OSError, ValueError, RecursionError):
            values = json.loads(self.path(name).read_bytes())
            listed = isinstance(values, list) and len(values) <= self.draws
            if listed and all(map(_is_share, values)) and _sources() == SOURCES:
                self.given.append(name)
                return values
        return None

    def write(self, name: str, accuracies: Sequence[float]) -> None:
        """Keep the accuracies for later runs, if the folder can be written."""
        path = self.path(name)
        with suppress(OSError):
            if _sources() != SOURCES:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json_text(list(accuracies)))


def _is_share(value: object) -> bool:
    return type(value) is float and math.isfinite(value) and 0 <= value <= 1


def _of_setting(setting: Setting) -> Iterator[str]:
    for field in fields(setting):
        value = getattr(setting, field.name)
        told = _of_images(value) if isinstance(value, ImageData) else repr(value)
        if field.name != "dataset":  # a title, without effect on numbers
            yield f"{field.name}: {told}"


def _of_images(data: ImageData) -> str:
    """A digest of all tensors of a data set, with their shapes."""
    digest = sha256()
    for tensor in (data.images, data.labels, data.shift, data.scale):
        if tensor is None:
            digest.update(b"None")
        else:
            digest.update(repr((tensor.dtype, tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _of_machine(setting: Setting) -> list[str]:
    device = setting.train.images.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return [
        *(f"{name} {version(name)}" for name in PACKAGES), torch.__version__,
        platform.python_version(), platform.platform(), _processor(),
        torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads()), device.type, gpu,
        *sorted(f"{n}={v}" for n, v in os.environ.items() if n.startswith(("NUMBA_", "MKL_"))),
    ]  # fmt: skip


def _processor() -> str:
    """The processor's model where the system tells it; on Linux `platform` does not."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line
    return platform.processor()


def _sources() -> str:
    """A digest of the program's files that numbers may depend on, as they are now."""
    digest = sha256()
    for path in sorted((*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("rules/zoo/*.json"))):
        place = path.relative_to(ROOT)
        if place.parts[0] not in WITHOUT_EFFECT and path.is_file():  # no editor's dangling link
            content = path.read_bytes()
            digest.update(f"{place} {len(content)}\n".encode() + content)
    return digest.hexdigest()


SOURCES = _sources()  # as loaded, because a run may last for hours
