"""Tools for downloading data: silent commands with a time limit, and the import of torchvision.

pooch is not used, because it needs the addresses, mirrors and formats that torchvision already has,
and because the checksums here are those of uncompressed files.
"""

import importlib.util
import lzma
import subprocess
import sys
import tarfile
import time
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from torch import library

from data_sets.image_data import DataError


def import_torchvision():
    """The module torchvision, even if its compiled operators can't be loaded.

    torchvision's wheel is built against one build of torch. With another, such as a CPU build, its
    library does not load, and the import fails because two operators, nms and qnms, have no schema.
    Nothing here uses them, so the bare schemas are enough; they are defined only if they are still
    missing after an attempt to load the library. Raises DataError if torchvision is not installed.
    """
    if "torchvision" not in sys.modules:
        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None:
            raise DataError("torchvision is not installed; see requirements.txt")
        for extension in Path(spec.origin).parent.glob("_C.*"):
            with suppress(OSError):
                torch.ops.load_library(extension)
        missing = [name for name in ("nms", "qnms") if not hasattr(torch.ops.torchvision, name)]
        if missing:
            schemas = library.Library("torchvision", "FRAGMENT")
            for name in missing:
                schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT_ALIVE.append(schemas)  # the schemas vanish with this object
    import torchvision

    return torchvision


_KEPT_ALIVE: list = []


def run_with_torchvision(statement: str, arguments: list[str], directory: Path) -> None:
    """Run a Python statement that downloads into `directory`; its arguments are sys.argv[2:].

    It runs in a process of its own, so that it is silent and can be ended even if a name server
    never answers. Raises DataError if it fails.
    """
    code = (
        "import socket, sys; sys.path.insert(0, sys.argv[1]); socket.setdefaulttimeout(10);"
        "from data_sets.fetching import import_torchvision; torchvision = import_torchvision(); "
        f"{statement}"
    )
    here = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-c", code, here, *arguments]
    run_silently(command, directory, seconds=600, silence=30)


def run_silently(
    command: list[str], directory: Path, seconds: float, silence: float | None = None
) -> None:
    """Run a command in `directory` without showing its output.

    It is killed after `seconds`, or when the files in `directory` have not changed in size for
    `silence` seconds. Raises DataError, with the last line of stderr, if it fails or is killed.
    """
    program = Path(command[0]).name
    errors = directory / "errors.txt"  # not a pipe, which grandchildren could keep open
    began = grew = time.monotonic()
    size = 0
    try:
        with (
            errors.open("wb") as stream,
            subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
            ) as process,
        ):
            try:
                while (status := process.poll()) is None:
                    time.sleep(0.05)
                    now, size_before, size = time.monotonic(), size, _bytes_under(directory)
                    if size != size_before:
                        grew = now
                    if now - began > seconds:
                        raise DataError(f"{program} had not finished after {seconds:g} s")
                    if silence is not None and now - grew > silence:
                        raise DataError(f"{program} received nothing for {silence:g} s")
            finally:
                process.kill()
    except FileNotFoundError:
        raise DataError(f"there is no {program} here") from None
    if status:
        words = errors.read_text(errors="replace").strip().splitlines()
        raise DataError(f"{program} failed: {words[-1].strip() if words else f'status {status}'}")


def _bytes_under(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # the command may be renaming its files
            total += path.stat().st_size
    return total


# The errors, besides OSError, of reading a damaged archive
ARCHIVE_ERRORS = (tarfile.TarError, KeyError, EOFError, zlib.error, lzma.LZMAError)


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of a file in an archive; raises KeyError if there is no such file."""
    entry = archive.getmember(name)
    if not entry.isfile():
        raise KeyError(f"{name} is no file in it")
    return archive.extractfile(entry).read()


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
