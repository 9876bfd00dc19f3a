"""Code of your own, named on the command line: --rule my_file.py:Class, --objective my_file.py:f.

    name = own_code_name("my_file.py:Class")     # the flag's type; nothing is run yet
    code = load_own_code(name)
    rule = code.value()

Such a file is a program. It is run only where it is given on the command line of this call, never
because the directory of a run names it.
"""

import argparse
import hashlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import TracebackType
from typing import Any

from experiment.errors import WrongInputError
from experiment.screen import show

FLAGS = ("rule", "objective")  # that may name such code
FORM = "FILE.py:NAME"
MODULE = "own_code_"  # begins the names of the modules that are made of such files


class OwnCodeError(WrongInputError):
    """A file of your own that cannot be run or lacks what was asked for; one line."""


@dataclass(frozen=True)
class OwnCode:
    """What a file defines by a name, and the SHA-256 of the file."""

    value: Any
    digest: str


def is_own_code(name: Any) -> bool:
    """Whether the value of a flag names such code."""
    return isinstance(name, str) and ".py:" in name


def own_code_name(text: str) -> str:
    """The type of a flag that takes FILE.py:NAME: the same with an absolute path.

    Raises ArgumentTypeError for another form, and for a file that is not there.
    """
    file, _, name = text.rpartition(":")
    path = Path(file).expanduser()
    if path.suffix != ".py" or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be {FORM}, such as my_file.py:MyRule, not {text!r}")
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{file} is not there")
    return f"{path.resolve()}:{name}"


def load_own_code(text: str) -> OwnCode:
    """Run a file, and return what it defines by a name; text as `own_code_name` returns it.

    The file may import what lies beside it. Raises OwnCodeError if it does not run to its end, or
    does not define the name.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    content = path.read_bytes()
    spec = spec_from_file_location(f"{MODULE}{path.stem}", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for a class's module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # stays, for imports that happen later
    try:
        exec(compile(content, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise OwnCodeError(f"{path}{_line_of(error, path)}: {_said(error)}") from error
    if not hasattr(module, name):
        raise OwnCodeError(f"{path} defines no {name}")
    return OwnCode(getattr(module, name), hashlib.sha256(content).hexdigest())


def refuse_own_rule(directory: Path, config: Mapping[str, Any], done: str) -> None:
    """Raise OwnCodeError if a run's rule is of the user's own: such a rule can't be `done`.

    config: that of the run, with its --rule.
    """
    if is_own_code(name := config.get("rule")):
        raise OwnCodeError(f"the rule of {directory} is a class of your own, {Path(name).name}: "
                           f"only rules of the families here can be {done}")  # fmt: skip


@contextmanager
def own_errors_told() -> Iterator[None]:
    """Show the traceback of an error that arises in such code, from there on, and end in one line.

    Raises OwnCodeError, which names the file, the function and the error. Wrong input, numbers that
    are not finite and closed pipes pass: commands know how to end with them.
    """
    try:
        yield
    except (WrongInputError, FloatingPointError, BrokenPipeError):
        raise
    except Exception as error:
        own = _frames_of_own_code(error)
        if not own:
            raise
        code = own[-1].tb_frame.f_code
        show("".join(traceback.format_exception(type(error), error, own[0])).rstrip(), sys.stderr)
        place = f"{code.co_filename}, line {own[-1].tb_lineno}, in {code.co_qualname}"
        raise OwnCodeError(f"{place}: {_said(error)}") from error


def _frames_of_own_code(error: BaseException) -> list[TracebackType]:
    """The frames of an error's traceback that run such code, the outermost first."""
    frames, step = [], error.__traceback__
    while step is not None:
        if step.tb_frame.f_globals.get("__name__", "").startswith(MODULE):
            frames.append(step)
        step = step.tb_next
    return frames


def _line_of(error: BaseException, path: Path) -> str:
    """Where in the file an error arose, as in ", line 3"."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _said(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"
