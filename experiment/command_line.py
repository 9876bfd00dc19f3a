"""What all commands share, without torch: the common flags, one line for wrong input.

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

A command on data of another kind takes computing_parser, one that computes nothing run_parser.
Exit status: 0 done, 1 not finite, 2 wrong input, 130 interrupted.
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

from experiment.errors import RunLogError, WrongInputError
from experiment.run_reader import read_config
from experiment.screen import mute_broken_streams, repair_streams, show

DATASETS = ("mnist", "fashion", "cifar10", "mnist5k")
DTYPES = ("float32", "float64")

# flags that belong to one call, not to the run
OF_THE_CALL = ("out", "resume", "quiet", "no_figures")

# flags that name what is written outside the run's directory: --resume takes none from config.json
OUTSIDE = ("save_state", "to_zoo", "storage")

LARGEST = 1e30  # number that a flag takes: float32 holds it, and the sum of many
LARGEST_WHOLE = 10**9  # that a flag takes; experiment/seeds.py needs it to be below 2^31
AT_MOST = {  # whole numbers by flag, where fewer are more than anyone has time or memory for
    "seed": math.inf,  # experiment/seeds.py takes any, other commands say what theirs take
    "threads": math.inf,  # experiment/devices.py knows how many there are
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

# what torch's allocators say where they raise a RuntimeError that is no torch.OutOfMemoryError
_ALLOCATOR_REFUSES = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|(MPS backend|CUDA error:) out of memory"
)


class UserError(WrongInputError):
    """Wrong input that a command notices."""


def run_parser(description: str, command: str) -> argparse.ArgumentParser:
    """A parser with the flags of any run; `command` names the run directories."""
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
    again = "go on with the run in DIR, with its flags"
    where.add_argument("--resume", type=Path, metavar="DIR", help=again)
    add = group.add_argument
    add("--seed", type=nonnegative_int, default=0, metavar="N", help="seed of all random numbers")
    add("--quiet", action="store_true", help="print errors only")
    later = "draw no figures; plot.py run DIR can do it later"
    add("--no_figures", "--no-figures", action="store_true", help=later)
    return parser


def computing_parser(description: str, command: str) -> argparse.ArgumentParser:
    """A parser with the flags of a run that computes with tensors, on data of any kind."""
    parser = run_parser(description, command)
    add = parser.add_argument_group("computation").add_argument
    device = "auto, cpu, cuda, cuda:N or mps"
    add("--device", type=device_name, default="auto", metavar="NAME", help=device)
    add("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's own)")
    add("--dtype", choices=DTYPES, default="float32", help="floating-point type")
    return parser


class OneOrMore(argparse.Action):
    """The value of a flag that is given once; the list of its values where it is given again.

    Its default is to be None, and to be filled in after parsing.
    """

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest, None)
        if before is not None:
            before = before if isinstance(before, list) else [before]
            if values in before:
                parser.error(f"argument {option_string}: {values} is given twice")
            values = [*before, values]
        setattr(namespace, self.dest, values)


class SwitchWithNumber(argparse.Action):
    """A switch that may be followed by the number of another flag: --sparsify, --sparsify 100.

    number: where that is kept. The number counts only where the positional arguments are given
    beside it, or with an equals sign; else `parse` refuses it, as it may be one of them.
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
    """A parser with the flags that every command on images has.

    several_datasets: --dataset may be given again; args.dataset is None where it is not given.
    """
    parser = computing_parser(description, command)
    add = parser.add_argument_group("images").add_argument
    if several_datasets:
        add("--dataset", choices=DATASETS, action=OneOrMore,
            help="images (default: mnist; mnist5k needs no network); may be repeated")  # fmt: skip
    else:
        add("--dataset", choices=DATASETS, default="mnist", help="images; mnist5k needs no network")
    add("--data-dir", "--data_dir", type=Path, default="data", metavar="DIR", help="data sets")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse `argv` (default: sys.argv[1:]).

    With --resume, flags that aren't given take the values that they have in that run. As that may
    be a stranger's, what it has written outside its directory has to be asked for again, and a
    --data-dir that is not there is not made.
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
    args = _relaxed(parser, without_defaults=False).parse_args(argv)
    known = {action.dest for action in parser._actions}
    for name in known.intersection(OUTSIDE) - {*explicit}:
        if config.get(name) is not None and not _is_within(directory, name, config[name]):
            parser.error(f"argument --resume: {directory} was run with --{name} {config[name]}, "
                         "which is not inside it: give that again")  # fmt: skip
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


def _is_within(directory: str, name: str, value: Any) -> bool:
    """Whether what a flag names is a file inside the directory."""
    is_path = name == "save_state" and isinstance(value, str)
    return is_path and Path(value).resolve().is_relative_to(Path(directory).resolve())


def refuse_idle_flags(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    needs: Sequence[tuple[str, bool, str]],
) -> None:
    """UserError where a flag was given that would do nothing.

    needs: names of flags, whether they matter in this run, and what else they need.
    """
    for names, matter, needed in needs:
        for name in names.split():
            if not matter and getattr(args, name) != parser.get_default(name):
                raise UserError(f"--{name} needs {needed}")


def refuse_large_seed(args: argparse.Namespace, bits: int) -> None:
    """UserError where --seed is larger than the generators of this command take."""
    if args.seed >> bits:
        raise UserError(f"--seed {args.seed}: must be below 2^{bits} here")


def save_whole_paths(args: argparse.Namespace, name: str) -> None:
    """Makes the path or the paths of this flag absolute in a new run, to be resumed from anywhere.

    Those of a run that is resumed stay as they were saved.
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
    """Run a command's `main(argv)` and turn what ends it early into an exit status.

    Wrong input: one line on stderr and 2. Numbers that are not finite: one line and 1. Ctrl-C: 130.
    A pipe closed by its reader: silent, 1. Every other error keeps its traceback.

    wrong_input: what the libraries that the command uses raise for it, beside WrongInputError.
    """
    repair_streams()
    try:
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
        mute_broken_streams()  # Python flushes them once more at exit


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
    """A line as this process says it; "" where the first one of its team says the same.

    Until its processes have met, all of them do the same, and end alike; then each says its own.
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
    """The rank of this process and the number of all, as torchrun says; else 0 and 1.

    What is left of a torchrun that is over counts for nothing where WORLD_SIZE is not. Raises
    UserError where it is above 1 and the rest is not as torchrun sets it.
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


# ---- types of arguments: text to value, or a message that says what is expected ----


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _number(int, text, lambda value: value >= 1, "a whole number of at least 1")


def nonnegative_int(text: str) -> int:
    """A whole number of at least 0."""
    return _number(int, text, lambda value: value >= 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    """A number above 0, up to LARGEST."""
    return _number(float, text, lambda value: value > 0, "a number above 0")


def nonnegative_float(text: str) -> float:
    """A number of at least 0, up to LARGEST."""
    return _number(float, text, lambda value: value >= 0, "a number of at least 0")


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    return _number(float, text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def device_name(text: str) -> str:
    """The name of a device, whether it is there or not."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda, cuda:N or mps, not {text!r}")
    return text


def fraction_below_1(text: str) -> float:
    """A number from 0 to below 1."""
    return _number(float, text, lambda value: 0 <= value < 1, "a number from 0 to below 1")


NUMBERS = (
    positive_int, nonnegative_int, positive_float, nonnegative_float, fraction, fraction_below_1,
)  # fmt: skip


def _number(kind: type, text: str, accepted: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not accepted(value):  # nan never is
        raise argparse.ArgumentTypeError(f"must be {expected}, not {text!r}")
    if kind is float and value > LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST:g}, not {text!r}")
    return value


def check_whole(name: str, value: Any) -> None:
    """ArgumentTypeError where the value of this flag is a whole number above its limit."""
    most = AT_MOST.get(name, LARGEST_WHOLE)
    if type(value) is int and value > most:
        shown = value if value < 10**30 else "one of more than 30 digits"
        raise argparse.ArgumentTypeError(f"must be at most {most}, not {shown}")


# ---- parsing ----


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage; whole numbers have limits."""

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
        """As argparse's; says so where a flag may have taken what stands behind its values."""
        if action.option_strings and arg_strings == ["--"]:  # of --seed=--, else taken for []
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
    """Shows a default only where it tells something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _relaxed(parser: argparse.ArgumentParser, without_defaults: bool) -> argparse.ArgumentParser:
    """A copy of `parser` that requires nothing.

    Without defaults, what it returns holds the flags that were given and no more.
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
            # else the default is converted
            action.default, action.type, action.choices = argparse.SUPPRESS, None, None
    return relaxed


def _refuse_doubtful_numbers(parser, args, argv: Sequence[str]) -> None:
    """The error of a switch's number that may be a positional argument, where there is none."""
    for positional in parser._get_positional_actions():
        for flag, number in reversed([*itertools.pairwise(argv)]):
            switch = isinstance(parser._option_string_actions.get(flag), SwitchWithNumber)
            if switch and not getattr(args, positional.dest) and _takes(positional, number):
                parser.error(
                    f"argument {flag}: {number} may be its number or one of {positional.dest}, "
                    f"and no other follows: write {number} {flag}, or {flag}=5 {number}"
                )


def _takes(action: argparse.Action, text: str) -> bool:
    """Whether a text is a value of a flag or argument that has a type."""
    try:
        action.type(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return True


def _from_saved(action: argparse.Action, value: Any) -> Any:
    """A value of config.json as `action` would have made it from the command line.

    Raises ArgumentTypeError, or what the flag's type raises, for what it would have refused.
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
    """`value`, lists of lists to this depth, with each element through the flag's type again."""
    if depth:
        if not isinstance(value, list):
            raise argparse.ArgumentTypeError(f"must be a list, not {value!r}")
        return [_converted(action, element, depth - 1) for element in value]
    if action.type is None and action.choices is None and not isinstance(value, str):
        raise argparse.ArgumentTypeError(f"must be a text, not {value!r}")
    # a type that makes several values of a text, such as 16x5, takes them too
    made = isinstance(value, list) and action.type not in NUMBERS
    text = json.dumps(value) if isinstance(value, dict) else value if made else str(value)
    converted = text if action.type is None else action.type(text)
    check_whole(action.dest, converted)
    if action.choices is not None and converted not in action.choices:
        known = ", ".join(map(str, action.choices))
        raise argparse.ArgumentTypeError(f"must be one of {known}, not {value!r}")
    return converted


def new_directory(command: str, folder: Path = Path("runs")) -> Path:
    """Makes <folder>/<command>-<time>, numbered where two runs start within a second."""
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
