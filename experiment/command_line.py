"""The flags and the error handling that all commands share; importing it does not load torch.

    def make_parser():
        parser = common_parser("Meta-learn a rule.", "main")
        parser.add_argument("--metasteps", type=positive_int, default=1000)
        return parser

    if __name__ == "__main__":
        parse(make_parser())  # answers --help and wrong flags before torch is loaded

    from experiment.devices import set_up
    from experiment.opening import open_run

    def main(argv: list[str] | None = None) -> None:
        args = parse(make_parser(), argv)
        device, dtype = set_up(args)
        with open_run(args, "main") as log:
            ...

    if __name__ == "__main__":
        run_command(main, wrong_input=(HypergradientError,))    # errors of libraries it uses

common_parser is for commands on images, computing_parser for those on other data, run_parser for
those that compute nothing. Exit status: 0 done, 1 numbers that are not finite, 2 wrong input,
130 interrupted.
"""

import argparse
import copy
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiment.data_names import DATASETS, OWN, data_name
from experiment.errors import RunLogError, WrongInputError
from experiment.own_code import FLAGS as CODE
from experiment.own_code import is_own_code, own_errors_told
from experiment.run_reader import read_config
from experiment.screen import mute_broken_streams, repair_streams, show

DTYPES = ("float32", "float64")

# Flags that belong to one call, not to the run
OF_THE_CALL = ("out", "resume", "quiet", "no_figures")

# Flags that runs of older versions lack, and their values there
IN_OLDER_RUNS = {
    "random_numbers": "host", "beta": 10.0, "learn": ["eta"],
    "degrees": 25.0, "crop": [0.7, 1.0], "crop_ratio": [0.75, 1.3333], "crop_padding": 2,
    "shift": 0.0, "brightness": 0.5, "contrast": 0.5, "noise": 0.0, "lateral_power": 0.0,
}  # fmt: skip

# Flags that may name something to write outside the run's directory: --resume takes them from
# config.json only if it is inside
OUTSIDE = ("save_state", "to_zoo", "storage")

IMAGES = ("dataset", "datasets")  # flags that may hold paths of images

LARGEST = 1e30  # the largest number a flag takes; sums of many such numbers still fit in float32
LARGEST_WHOLE = 10**9  # the largest whole number; below 2^31, as experiment/seeds.py requires
AT_MOST = {  # limits of single flags, beyond which time or memory would not suffice
    "seed": math.inf,  # experiment/seeds.py takes any; commands with a limit check it themselves
    "threads": math.inf,  # experiment/devices.py compares with the machine's cores
    "degree": 10,
    "draws": 10**6,
    "evaluations": 10**5,
    "inh_steps": 10**5,
    "loss_times": 10**4,
    "pairs": 10**5,
    "sample_outputs": 100,
    "seeds": 10**5,  # evaluate.py's trainings
    "tasks": 10**5,
    "test_runs": 10**5,
    "test_tasks": 10**5,
    "trials": 10**6,
    "tuning_runs": 10**5,
    "validation_runs": 10**5,
}

NEGATIVE_NUMBER = re.compile(r"-((\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|inf|nan)$")

# Messages of torch's allocators that raise a plain RuntimeError instead of OutOfMemoryError
_ALLOCATOR_REFUSES = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|(MPS backend|CUDA error:) out of memory"
)


class UserError(WrongInputError):
    """Wrong input found by a command, such as flags that contradict each other."""


def run_parser(description: str, command: str) -> argparse.ArgumentParser:
    """A parser with the flags of any run.

    command: the name of the script without .py, after which run directories are named.
    """
    parser = OneLineParser(
        prog=f"{command}.py",
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    group = parser.add_argument_group("run")
    where = group.add_mutually_exclusive_group()
    new = f"directory of the run (default: runs/{command}-<time>)"
    where.add_argument("--out", type=Path, metavar="DIR", help=new)
    again = "continue the run in DIR, with its flags"
    where.add_argument("--resume", type=Path, metavar="DIR", help=again)
    add = group.add_argument
    add("--seed", type=nonnegative_int, default=0, metavar="N", help="seed of all random numbers")
    add("--quiet", action="store_true", help="print errors only")
    later = "draw no figures; plot.py run DIR can do it later"
    add("--no_figures", "--no-figures", action="store_true", help=later)
    return parser


def computing_parser(description: str, command: str) -> argparse.ArgumentParser:
    """A parser with the flags of any run that computes with tensors; see `run_parser`."""
    parser = run_parser(description, command)
    add = parser.add_argument_group("computation").add_argument
    device = "device to compute on: auto, cpu, cuda, cuda:N or mps"
    add("--device", type=device_name, default="auto", metavar="NAME", help=device)
    add("--threads", type=positive_int, metavar="N",
        help="number of CPU threads (default: torch's)")  # fmt: skip
    add("--dtype", choices=DTYPES, default="float32", help="floating-point type")
    return parser


class OneOrMore(argparse.Action):
    """An action that stores one value, or a list of values if the flag is given several times.

    The flag's default must be None; a command fills in the real one after parsing.
    """

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest, None)
        if before is not None:
            before = before if isinstance(before, list) else [before]
            if values in before:
                parser.error(f"argument {option_string}: {values} is given twice")
            values = [*before, values]
        setattr(namespace, self.dest, values)


class Once(argparse.Action):
    """An action that stores its value, and refuses to be given a second time.

    The parser must be a OneLineParser.
    """

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if self.dest in parser.given_once:
            several = ", give all values after one" if self.nargs == "+" else ""
            parser.error(f"argument {option_string}: taken once here, but given twice{several}")
        parser.given_once.add(self.dest)
        setattr(namespace, self.dest, values)


class SwitchWithNumber(argparse.Action):
    """A switch that may be followed by the number of another flag: --sparsify, --sparsify 100.

    `parse` refuses a number after the switch if there are no other positional arguments, because
    it may have been meant as one of them; --sparsify=100 is always clear.

    number: the attribute of the namespace that the number is stored in.
    """

    def __init__(self, option_strings, dest, *, number: str, **form) -> None:
        super().__init__(option_strings, dest, nargs="?", default=False, **form)
        self.number = number

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, True)
        if values is not None:
            setattr(namespace, self.number, values)


def common_parser(
    description: str, command: str, *, several_datasets: bool = False
) -> argparse.ArgumentParser:
    """A parser with the flags of any command on images; see `run_parser`.

    several_datasets: allow several --dataset; args.dataset is then None if there is none.
    """
    parser = computing_parser(description, command)
    add = parser.add_argument_group("images").add_argument
    images = f"images: {', '.join(DATASETS)} (needs no network), {OWN}"
    if several_datasets:
        add("--dataset", type=data_name, action=OneOrMore, metavar="DATA",
            help=f"{images} (default: mnist); may be repeated")  # fmt: skip
    else:
        add("--dataset", type=data_name, action=Once, default="mnist", metavar="DATA", help=images)
    add("--data-dir", "--data_dir", type=Path, default="data", metavar="DIR",
        help="folder of the data sets")  # fmt: skip
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse `argv` (default: sys.argv[1:]).

    With --resume, flags that aren't given take the values that they have in that run. The run may
    come from somebody else: flags that write outside its directory must therefore be given again,
    and a data_dir that doesn't exist here is not taken over.
    """
    repair_streams()
    explicit = vars(_relaxed(parser, without_defaults=True).parse_args(argv))
    directory = explicit.get("resume")
    if directory is None:
        args = parser.parse_args(argv)
        _refuse_doubtful_numbers(parser, args, sys.argv[1:] if argv is None else argv)
        return args
    try:
        config = read_config(directory)
    except RunLogError as error:
        parser.error(f"argument --resume: {error}")
    if (command := f"{config.get('command')}.py") != parser.prog:
        parser.error(f"argument --resume: {directory} is a run of {command}, not of {parser.prog}")
    config = IN_OLDER_RUNS | config
    args = _relaxed(parser, without_defaults=False).parse_args(argv)
    known = {action.dest for action in parser._actions}
    for name in known.intersection(OUTSIDE) - {*explicit}:
        if config.get(name) is not None and not _is_within(directory, name, config[name]):
            parser.error(f"argument --resume: {directory} was run with --{name} {config[name]}, "
                         "which is not inside it: give that again")  # fmt: skip
    for name in known.intersection(CODE) - {*explicit}:
        if is_own_code(config.get(name)):
            parser.error(f"argument --resume: {directory} was run with --{name} {config[name]}, "
                         "which is a program: give that again to have it run")  # fmt: skip
    for name in known.intersection(IMAGES) - {*explicit}:
        for path in _lost(config.get(name)):
            parser.error(f"argument --resume: {directory} was run on --dataset {path}, which is "
                         "not there any more: give --dataset with its new place")  # fmt: skip
    taken = {*config} - {*explicit, *OF_THE_CALL}
    if not Path(str(config.get("data_dir"))).is_dir():
        taken.discard("data_dir")
    for action in parser._actions:
        name = action.dest
        if name in taken:
            try:
                setattr(args, name, _from_saved(action, config[name]))
            except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
                parser.error(f"argument --resume: {directory}/config.json is damaged: "
                             f"{name} {error}")  # fmt: skip
    return args


def _lost(names: Any) -> list[str]:
    """Of the data sets in a saved flag, the folders and files that don't exist any more."""
    names = names if isinstance(names, list) else [names]
    paths = [name for name in names if isinstance(name, str) and Path(name).is_absolute()]
    return [path for path in paths if not Path(path).exists()]


def _is_within(directory: str, name: str, value: Any) -> bool:
    """Whether the value of the flag `name` is the path of a file inside the directory."""
    is_path = name == "save_state" and isinstance(value, str)
    return is_path and Path(value).resolve().is_relative_to(Path(directory).resolve())


def refuse_idle_flags(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    needs: Sequence[tuple[str, bool, str]],
) -> None:
    """Raise UserError if a flag that has no effect in this run differs from its default.

    needs: for each group of flags: their names, separated by blanks; whether they have an effect in
        this run; what they need to have one, for the message.
    """
    for names, matter, needed in needs:
        for name in names.split():
            if not matter and getattr(args, name) != parser.get_default(name):
                raise UserError(f"--{name} needs {needed}")


def refuse_large_seed(args: argparse.Namespace, bits: int) -> None:
    """Raise UserError if --seed is not below 2^bits, the limit of this command's generators."""
    if args.seed >> bits:
        raise UserError(f"--seed {args.seed}: must be below 2^{bits} here")


def save_whole_paths(args: argparse.Namespace, name: str) -> None:
    """Make the path or paths of this flag absolute, so that the run can be resumed from anywhere.

    With --resume they stay as they were saved.
    """
    value = getattr(args, name)
    if args.resume is None and value is not None:
        whole = [path.resolve() for path in value] if isinstance(value, list) else value.resolve()
        setattr(args, name, whole)


def run_command(
    main: Callable[[list[str] | None], None],
    argv: list[str] | None = None,
    *,
    wrong_input: tuple[type[Exception], ...] = (),
) -> None:
    """Run a command's `main(argv)` and turn the errors that end it early into an exit status.

    One line on stderr and status 2: wrong input, a file that can't be read or written, too little
    memory; below its traceback, an error in code of your own (experiment/own_code.py). One line and
    1: numbers that are not finite, the loss of another process of the team.
    Nothing and 1: a pipe closed by its reader. One line and 130: Ctrl-C. Every other error keeps
    its traceback.

    wrong_input: the errors that libraries of the command raise for wrong input, in addition to
        WrongInputError.
    """
    repair_streams()
    try:
        with own_errors_told():
            main(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.exit(1)
    except FloatingPointError as error:
        _exit_with_line(error, status=1)
    except (WrongInputError, *wrong_input) as error:
        _exit_with_line(error, status=2)
    except OSError as error:
        _exit_with_line(f"cannot read or write: {error}", status=2)
    except (MemoryError, RuntimeError) as error:
        if _has_lost_its_team(error):
            _exit_with_line("another process of the team has ended", status=1)
        if not _is_out_of_memory(error):
            raise
        _exit_with_line("not enough memory: take smaller layers or batches", status=2)
    except KeyboardInterrupt:
        show("interrupted", sys.stderr)
        sys.exit(130)
    finally:
        mute_broken_streams()  # because Python flushes them again at exit


def _has_lost_its_team(error: Exception) -> bool:
    in_team = os.environ.get("WORLD_SIZE", "1") != "1"
    return in_team and re.search("(?i)gloo|connection (closed|reset)", str(error)) is not None


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return known or _ALLOCATOR_REFUSES.search(str(error)) is not None


def _exit_with_line(error: Exception | str, status: int) -> NoReturn:
    line = " ".join(str(error).split())
    if said := _as_said_here(f"error: {line}"):
        show(said, sys.stderr)
    sys.exit(status)


def _as_said_here(line: str) -> str:
    """The line this process prints for an error; "" if the team's first process prints the same.

    Until the processes have met, all of them do the same and fail alike, so only the first reports;
    after that, each reports its own error with its rank.
    """
    try:
        rank, count = place_in_team()
    except UserError:
        return line
    if rank == 0:
        return line
    torch = sys.modules.get("torch")
    met = torch is not None and torch.distributed.is_initialized()
    return f"process {rank} of {count}: {line}" if met else ""


def place_in_team() -> tuple[int, int]:
    """The rank of this process and the number of processes, from torchrun's variables; else (0, 1).

    Other variables of torchrun are ignored if WORLD_SIZE is unset or 1. Raises UserError if it is
    anything else and they are not as torchrun sets them.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 0, 1
    rank, port = os.environ.get("RANK", ""), os.environ.get("MASTER_PORT", "")
    whole = size.isdecimal() and rank.isdecimal() and port.isdecimal()
    if not whole or not int(rank) < int(size) or "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {size}, but RANK, MASTER_ADDR and MASTER_PORT are not as torchrun sets "
            f"them: start with torchrun, or unset WORLD_SIZE"
        )
    return int(rank), int(size)


# ---- types of arguments: each turns text into a value or says what is expected ----


def positive_int(text: str) -> int:
    """The type of a flag: a whole number of at least 1."""
    return _number(int, text, lambda value: value >= 1, "a whole number of at least 1")


def nonnegative_int(text: str) -> int:
    """The type of a flag: a whole number of at least 0."""
    return _number(int, text, lambda value: value >= 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    """The type of a flag: a number above 0, at most LARGEST."""
    return _number(float, text, lambda value: value > 0, "a number above 0")


def nonnegative_float(text: str) -> float:
    """The type of a flag: a number of at least 0, at most LARGEST."""
    return _number(float, text, lambda value: value >= 0, "a number of at least 0")


def any_float(text: str) -> float:
    """The type of a flag: a number from -LARGEST to LARGEST."""
    return _number(float, text, lambda value: value >= -LARGEST, "a number")


def fraction(text: str) -> float:
    """The type of a flag: a number from 0 to 1."""
    return _number(float, text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def device_name(text: str) -> str:
    """The type of a flag: the name of a device, present or not."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda, cuda:N or mps, not {text!r}")
    return text


def fraction_below_1(text: str) -> float:
    """The type of a flag: a number in [0, 1)."""
    return _number(float, text, lambda value: 0 <= value < 1, "a number from 0 to below 1")


NUMBERS = (
    positive_int, nonnegative_int, positive_float, nonnegative_float, any_float, fraction,
    fraction_below_1,
)  # fmt: skip


def _number(kind: type, text: str, accepted: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not accepted(value):  # nan fails every comparison
        raise argparse.ArgumentTypeError(f"must be {expected}, not {text!r}")
    if kind is float and value > LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST:g}, not {text!r}")
    return value


def check_whole(name: str, value: Any) -> None:
    """Raise ArgumentTypeError if the value of this flag is a whole number above its limit."""
    most = AT_MOST.get(name, LARGEST_WHOLE)
    if type(value) is int and value > most:
        shown = value if value < 10**30 else "one of more than 30 digits"
        raise argparse.ArgumentTypeError(f"must be at most {most}, not {shown}")


# ---- parsing ----


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors in one line and limits whole numbers (AT_MOST).

    -1e-3 is a number, as in Python 3.14; before, argparse takes it for a flag.
    """

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._negative_number_matcher = NEGATIVE_NUMBER

    def parse_known_args(self, args=None, namespace=None):
        """Like argparse's; `given_once` begins empty."""
        self.given_once: set[str] = set()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        if said := _as_said_here(f"{self.prog}: error: {line} (see --help)"):
            show(said, sys.stderr)
        sys.exit(2)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        value = super()._get_value(action, arg_string)
        try:
            check_whole(action.dest, value)
        except argparse.ArgumentTypeError as problem:
            raise argparse.ArgumentError(action, str(problem)) from None
        return value

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Like argparse's, with a hint if a flag may have swallowed a positional argument."""
        if action.option_strings and arg_strings == ["--"]:  # from --seed=--, which would give []
            raise argparse.ArgumentError(action, "expected a value, not '--'")
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            several = action.option_strings and action.nargs in ("+", "*")
            for positional in self._get_positional_actions() if several else ():
                if positional.type in NUMBERS and _takes(positional, arg_strings[-1]):
                    flag = action.option_strings[0]
                    error.message += f"; {positional.dest} stand before {flag}"
            raise


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default unless it is None or False, or that of a switch which turns it off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        off = isinstance(action, argparse._StoreFalseAction)  # its default is another flag's
        if action.default is None or action.default is False or off:
            return action.help
        return super()._get_help_string(action)


def _relaxed(parser: argparse.ArgumentParser, without_defaults: bool) -> argparse.ArgumentParser:
    """A copy of `parser` in which no argument is required.

    Without defaults, the namespace that it returns holds only the flags that were given.
    """
    relaxed = copy.deepcopy(parser)
    relaxed.format_help = parser.format_help
    if without_defaults:
        relaxed._defaults.clear()
    for action in relaxed._actions:
        action.required = False
        if not action.option_strings:
            action.nargs = {None: "?", "+": "*"}.get(action.nargs, action.nargs)
        if without_defaults:
            # otherwise argparse would convert the default SUPPRESS
            action.default, action.type, action.choices = argparse.SUPPRESS, None, None
    return relaxed


def _refuse_doubtful_numbers(parser, args, argv: Sequence[str]) -> None:
    """Report an error if a switch took a number that may be the missing positional argument."""
    for positional in parser._get_positional_actions():
        for flag, number in reversed([*itertools.pairwise(argv)]):
            switch = isinstance(parser._option_string_actions.get(flag), SwitchWithNumber)
            if switch and not getattr(args, positional.dest) and _takes(positional, number):
                parser.error(
                    f"argument {flag}: {number} may be its number or one of {positional.dest}, "
                    f"and no other follows: write {number} {flag}, or {flag}=5 {number}"
                )


def _takes(action: argparse.Action, text: str) -> bool:
    """Whether the type of a flag or argument accepts a text."""
    try:
        action.type(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return True


def _from_saved(action: argparse.Action, value: Any) -> Any:
    """A value of config.json, converted as `action` would have converted it from the command line.

    Raises ArgumentTypeError, or whatever the flag's type raises, for a value it would have refused.
    """
    if value is None and action.default is None and not action.required:
        return None
    if action.nargs == 0 or isinstance(action, SwitchWithNumber):
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"must be true or false, not {value!r}")
        return value
    depth = int(action.nargs is not None and action.nargs != "?")
    depth += type(action) is argparse._AppendAction
    depth += isinstance(action, OneOrMore) and isinstance(value, list)
    return _converted(action, value, depth)


def _converted(action: argparse.Action, value: Any, depth: int) -> Any:
    """`value`, nested lists of this depth, with each element converted by the flag's type."""
    if depth:
        if not isinstance(value, list):
            raise argparse.ArgumentTypeError(f"must be a list, not {value!r}")
        return [_converted(action, element, depth - 1) for element in value]
    if action.type is None and action.choices is None and not isinstance(value, str):
        raise argparse.ArgumentTypeError(f"must be a text, not {value!r}")
    # a type that makes several values of one text, such as 16x5, also takes the list of them
    made = isinstance(value, list) and action.type not in NUMBERS
    text = json.dumps(value) if isinstance(value, dict) else value if made else str(value)
    converted = text if action.type is None else action.type(text)
    check_whole(action.dest, converted)
    if action.choices is not None and converted not in action.choices:
        known = ", ".join(map(str, action.choices))
        raise argparse.ArgumentTypeError(f"must be one of {known}, not {value!r}")
    return converted


def new_directory(command: str, folder: Path = Path("runs")) -> Path:
    """Make <folder>/<command>-<time>, with a number if runs start within the same second."""
    first = folder / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = first, 1
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = first.with_name(f"{first.name}-{number}")
