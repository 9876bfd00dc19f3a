"""Opens the run directory that a command's flags ask for: a new one, or one to be resumed.

with open_run(args, "main", data) as log:
    ...
"""

import argparse
import os
from pathlib import Path
from typing import Any, Protocol

import torch

from experiment.checkpoints import MAY_DIFFER
from experiment.command_line import (
    IMAGES,
    IN_OLDER_RUNS,
    OF_THE_CALL,
    UserError,
    new_directory,
)
from experiment.devices import find_device
from experiment.files import plain
from experiment.own_code import is_own_code
from experiment.processes import ALONE, Team
from experiment.run_log import RunLog, SilentLog
from experiment.run_reader import read_config

NOTED_BY_CONTENT = {  # digests, the flags that name what they are of, and what that is
    "data_found": (IMAGES, "data"),
    "code_found": (("rule", "objective"), "code of your own"),
}
NOTED_LATER = ("run_found", "start_found")  # digests that older runs do not have


class Data(Protocol):
    """A data set with a fingerprint, so that a run isn't resumed on other data."""

    def fingerprint(self) -> str:
        """A line with the number of samples and a digest of them."""


def open_run(
    args: argparse.Namespace, command: str, data: Data | None = None, team: Team = ALONE
) -> RunLog | SilentLog:
    """Open the run that `args` ask for: a new one, or with --resume one that has the same flags.

    Only the first process of a team opens it; the others get a SilentLog. If torchrun has restarted
    the team after the loss of a worker, the run in --out is resumed.

    config.json holds the device and the number of threads actually used, because the last bits of
    a result depend on them, and the fingerprint of the data.

    Raises UserError if the flags differ from those of the run to be resumed.
    """
    if not team.first:
        return SilentLog()
    config = {name: value for name, value in vars(args).items() if name not in OF_THE_CALL}
    config["command"] = command
    config["device"] = str(find_device(args.device))
    config["threads"] = args.threads or torch.get_num_threads()
    config["data_found"] = None if data is None else data.fingerprint()
    existing = args.resume or _run_before_the_restart(args)
    if existing is None:
        directory = args.out or new_directory(command)
        return RunLog.create(directory, config, args.quiet, not args.no_figures)
    _refuse_other_configuration(existing, read_config(existing), plain(config))
    return RunLog.reopen(existing, args.quiet, not args.no_figures)


def _run_before_the_restart(args: argparse.Namespace) -> Path | None:
    """The run directory of a team that torchrun has restarted; None if there is none yet."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    if args.out is None:
        raise UserError("a run that torchrun may restart needs --out DIR, to be found again")
    return args.out if (args.out / "config.json").exists() else None


def _without_places(value: Any) -> Any:
    """The value of a flag without the paths in it, and of code the name that the file defines."""
    if isinstance(value, list):
        return [_without_places(element) for element in value]
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    return f":{value.rpartition(':')[2]}" if is_own_code(value) else "a path"


def _refuse_other_configuration(
    directory: Path, saved: dict[str, Any], given: dict[str, Any]
) -> None:
    """Raise UserError if a run with flags `saved` can't be resumed with flags `given`."""
    saved = {name: value for name, value in IN_OLDER_RUNS.items() if name in given} | saved
    names = [name for name in {**saved, **given} if name not in MAY_DIFFER]
    names = [name for name in names if name in saved or name not in NOTED_LATER]
    # older versions lacked some flags, which nobody has given now
    names = [name for name in names if name in saved or given[name] is not None]
    for noted, (flags, what) in NOTED_BY_CONTENT.items():
        there, now = saved.get(noted), given.get(noted)
        if there is not None and there != now:
            raise UserError(f"{directory} was run with other {what}: {there} there, {now} now")
        for name in flags if there is not None else ():  # the same, wherever it is by now
            if _without_places(saved.get(name)) == _without_places(given.get(name)):
                names = [other for other in names if other != name]
    differing = [
        f"{name} {saved.get(name, 'unset')!r} there, {given.get(name, 'unset')!r} now"
        for name in names
        if saved.get(name, "unset") != given.get(name, "unset")
    ]
    if differing:
        raise UserError(
            f"{directory} was run with other flags: {'; '.join(differing)}; "
            "leave those out to resume it"
        )
