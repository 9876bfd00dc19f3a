"""Runs any command of this project many times with searched flags, in many processes or machines.

    python sweep.py --out runs/rates --trials 30 --workers 2 --metric test_accuracy_mean \\
        --direction maximize --search lr=log:1e-6:1e-1 batch_size=choice:64,256 \\
        -- main.py 32 --metasteps 20                         30 random draws
    python sweep.py ... --method tpe --startup 5 -- ...      5 random trials, 25 guided by them
    python sweep.py ... --method asha --watch test_accuracy -- ...    bad ones end early
    python sweep.py ... --variant "ours=-c a.yaml" --variant "random=-c b.yaml" -- ...
    python sweep.py --resume runs/rates                      goes on, or joins in

Each trial is a process that runs the command after `--` with a value for each searched flag,
`--out`, `--quiet` and `--no_figures`. Its value is read from its results.json. See docs/sweeps.md.
"""

import argparse
import itertools
import math
import os
import re
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.command_line import (
    OF_THE_CALL,
    UserError,
    new_directory,
    parse,
    positive_int,
    refuse_idle_flags,
    run_command,
    run_parser,
)
from sweeps.space import MOST_VALUES, SearchedFlag, searched_flag

METHODS = ("random", "tpe", "gp", "population", "asha", "grid")
TRIALS = 30


# ---- flags ----


@dataclass(frozen=True)
class Variant:
    """A variant of the command: a name, and the additional arguments of the command."""

    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}={shlex.join(self.arguments)}"


def variant(text: str) -> Variant:
    """The type of a flag: NAME=ARGUMENTS, with the arguments split as by a shell."""
    name, equals, arguments = text.partition("=")
    try:
        if equals and re.fullmatch(r"\w[\w.-]*", name):
            return Variant(name, tuple(shlex.split(arguments)))
    except ValueError:  # an unclosed quotation
        pass
    raise argparse.ArgumentTypeError(f'must be "NAME=ARGUMENTS...", not {text!r}')


def make_parser():
    """The sweep's own flags, those before `--`."""
    parser = run_parser("Run a command many times over chosen flags.", "sweep")
    parser.usage = "%(prog)s [flags] --search FLAG=RANGE ... --metric KEY -- COMMAND.py [arguments]"
    add = parser.add_argument_group("search").add_argument
    add("--search", type=searched_flag, nargs="+", action="extend", required=True,
        metavar="FLAG=RANGE",
        help="flag=LOW:HIGH, also log:, int: or step:LOW:HIGH:STEP, or choice:A,B,...")  # fmt: skip
    add("--method", choices=METHODS, default="random", help="how values of flags are chosen")
    add("--trials", type=positive_int, metavar="N",
        help=f"draws, each run with all variants (default: {TRIALS}; grid: all)")  # fmt: skip
    add("--variant", type=variant, action="append", metavar='"NAME=ARGUMENTS"',
        help="more arguments; may be given several times, all for the same draws")  # fmt: skip
    add("--startup", type=positive_int, default=5, metavar="N",
        help="first trials: random (tpe, gp), a population, or never ended (--watch)")  # fmt: skip
    add = parser.add_argument_group("value").add_argument
    add("--metric", required=True, metavar="KEY",
        help="value in results.json; a.b is b in a, and a.0 the first entry of a list")  # fmt: skip
    add("--direction", choices=("minimize", "maximize"), default="minimize",
        help="which values are better")  # fmt: skip
    add("--watch", metavar="COLUMN",
        help="end trials early whose values in this column of metrics.csv are bad")  # fmt: skip
    add("--min_steps", type=positive_int, default=1, metavar="STEP",
        help="first step at which a trial may end")  # fmt: skip
    add("--reduction", type=positive_int, default=4, metavar="N",
        help="with asha, one trial in N continues, N times as far")  # fmt: skip
    add = parser.add_argument_group("machines").add_argument
    add("--workers", type=positive_int, default=1, metavar="N",
        help="number of trials that run at once")  # fmt: skip
    add("--storage", metavar="URL", help="database of the study (default: a journal file in DIR)")
    add("--study", metavar="NAME",
        help="name of the study in the database (default: the name of DIR)")  # fmt: skip
    add("--share", type=positive_int, metavar="N",
        help="end after this many trials (default: no limit)")  # fmt: skip
    add("--slurm", type=Path, metavar="FILE", help="write an array job to FILE, and run nothing")
    add("--array_tasks", type=positive_int, default=4, metavar="N",
        help="number of tasks of the array job")  # fmt: skip
    return parser


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before the first `--`, and those after it."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


if __name__ == "__main__":
    # answers --help and wrong flags before torch is loaded
    parse(make_parser(), split_at_dashes(sys.argv[1:])[0])

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.study import Study
from optuna.trial import Trial

from experiment.files import NEW, displayable, json_text, plain, remove_leftovers, write_whole
from experiment.loop import finish_on_interrupt
from experiment.own_code import is_own_code
from experiment.run_log import RunLog
from experiment.run_reader import read_config, refuse_links
from experiment.screen import show
from sweeps.points import GUIDED, make_sampler
from sweeps.report import (
    AFTER_FLAGS,
    BEFORE_FLAGS,
    Report,
    write_report,
    write_table,
)
from sweeps.study import (
    HEARTBEAT,
    HERE,
    JOURNAL,
    StudyError,
    Watch,
    claim,
    finish,
    open_storage,
    open_study,
    run_again,
    say_alive,
    state_of,
    storage_errors,
)
from sweeps.trial import GRACE, RefusedCommand, Rungs, Worker, outcome_of, start

POLL = 0.1  # seconds between checks of the workers
LEFT_AFTER = 600.0  # seconds after which a half-written file is taken to be abandoned

GIVEN_BY_THE_SWEEP = ("out", "resume")
HOME = Path(__file__).resolve().parent
RESUMABLE = (  # commands that --resume may take from a config.json
    "main.py", "find_oja.py", "baseline_mlp.py", "baseline_pca.py", "baseline_vicreg.py",
    "evaluate.py", "prune_rule.py", "tune_one_pass.py", "train_krotov_hopfield.py",
    "learn_to_optimize.py", "examples/equilibrium_network.py", "examples/imaml.py",
    "examples/logistic_regression.py", "examples/tune_competition.py",
)  # fmt: skip
WRITING = ("-S", "--save_state", "--to_zoo")  # their flags that name files to write elsewhere
OF_THIS_PROCESS = (*OF_THE_CALL, "share", "slurm", "array_tasks")
ENDED = ("done", "pruned", "diverged", "failed")


def complete(args, command: list[str]) -> None:
    """Add the command of a trial and the defaults to `args`; raises UserError for wrong flags."""
    if args.resume is not None:
        command = command or saved_command(args.resume)
        of_variants = [a for v in args.variant or () for a in v.arguments]
        searched = [text for flag in args.search or () for text in flag.choices]
        _refuse_harm(args.resume, [*of_variants, *searched])
    if not command:
        raise UserError("no command: write it behind --, as in  sweep.py ... -- main.py 32")
    if not Path(command[0]).is_file():
        raise UserError(f"no file {command[0]}: behind -- comes a script, as in  -- main.py 32")
    args.trial_command = command
    _refuse_flags_given_twice(args)
    _refuse_flags_of_another_method(args)
    if args.method == "grid":
        _refuse_a_continuum(args.search)
        points = math.prod(len(flag.values()) for flag in args.search)
        if points > MOST_VALUES:
            raise UserError(f"the grid has {points:,} points; at most {MOST_VALUES:,} are made")
        args.trials = min(args.trials or points, points)
    args.trials = args.trials or TRIALS


def saved_command(directory: Path) -> list[str]:
    """The command of a sweep to be resumed; raises UserError if running it might do harm.

    A config.json may come from somebody else. So it can only start commands of this project that
    write in the trials' directories; any other command must be given again after --.
    """
    words = read_config(directory).get("trial_command")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise UserError(f"{directory}/config.json is damaged: trial_command is no list of words")
    if Path(words[0]).resolve() not in [HOME / name for name in RESUMABLE]:
        raise UserError(f"{directory} runs {words[0]}, which is no command of this project: to "
                        "have it run, write it with its arguments behind --")  # fmt: skip
    _refuse_harm(directory, words)
    return words


def _refuse_harm(directory: Path, arguments: Sequence[str]) -> None:
    """Raise UserError if arguments from a config.json let a trial write outside its directory.

    Or run a program, as --rule FILE.py:CLASS does.
    """
    for argument, following in itertools.pairwise([*arguments, ""]):
        flag, equals, value = argument.partition("=")
        folder = Path(value if equals else following)
        is_made = flag in ("--data-dir", "--data_dir") and not folder.is_dir()
        if is_made or flag in WRITING or argument.startswith("-S"):
            raise UserError(f"{directory} runs its command with {argument}, which writes outside "
                            "of it: to have that, write the command behind --")  # fmt: skip
        if is_own_code(argument):
            raise UserError(f"{directory} runs its command with {argument}, which is a program: to "
                            "have that, write the command behind --")  # fmt: skip


def _refuse_flags_given_twice(args) -> None:
    names, flags = [flag.name for flag in args.search], {flag.flag for flag in args.search}
    groups = [each.name for each in args.variant or ()]
    for kind, given in (("--search", names), ("--variant", groups)):
        if twice := [name for name in given if given.count(name) > 1]:
            raise UserError(f"{kind}: {twice[0]} comes twice")
    for name in flags:
        places = sorted(p for each in args.search if each.flag == name for p in each.places)
        if not places or places != [*range(1, len(places) + 1)]:
            raise UserError(f"--search: the values of {name} must be those from 1 on, each once, "
                            f"as in {name}.1-4=... {name}.5=...")  # fmt: skip
    if taken := {*names, *flags} & {*BEFORE_FLAGS, *AFTER_FLAGS, *GIVEN_BY_THE_SWEEP}:
        raise UserError(f"--search: {taken.pop()} is a column of the table, or the sweep gives it")
    if places := flags & {"save_state", "to_zoo", "data_dir", "data-dir"}:
        raise UserError(f"--search: {places.pop()} says where to write: it is nothing to search")
    arguments = [a for each in args.variant or () for a in each.arguments] + args.trial_command
    for argument in arguments:
        flag = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and flag in (*flags, *GIVEN_BY_THE_SWEEP):
            raise UserError(f"--{flag} is given by the sweep: leave it out of the command")


def _refuse_flags_of_another_method(args) -> None:
    if args.method == "asha" and args.watch is None:
        raise UserError("--method asha needs --watch COLUMN (of metrics.csv)")
    if args.method == "population" and args.startup < 2:
        raise UserError("--method population needs --startup of at least 2, the population")
    if args.reduction < 2:
        raise UserError(f"--reduction: must be at least 2, not {args.reduction}")
    asha, watched = args.method == "asha", args.watch is not None
    refuse_idle_flags(
        args,
        make_parser(),
        [
            ("startup", args.method in GUIDED or (watched and not asha),
             "--method tpe, gp or population, or --watch without asha"),
            ("reduction", asha, "--method asha"),
            ("min_steps", watched, "--watch COLUMN"),
            ("array_tasks", args.slurm is not None, "--slurm FILE"),
        ],
    )  # fmt: skip


def _refuse_a_continuum(flags: Sequence[SearchedFlag]) -> None:
    for flag in flags:
        if flag.values() is None:
            raise UserError(f"--search {flag}: a grid needs choice, int or step")


def definition(args, variant: Variant) -> dict[str, Any]:
    """Everything that the value of a variant's trials depends on."""
    names = ["method", "metric", "direction", "seed"]
    names += ["startup"] if args.method in GUIDED else []
    names += ["reduction"] if args.method == "asha" else []
    names += ["watch", "min_steps"] if args.watch else []
    return {
        "command": [*args.trial_command, *variant.arguments],
        "search": [str(flag) for flag in args.search],
        **{name: getattr(args, name) for name in names},
    }


def make_pruner(args) -> BasePruner:
    """The rule that ends bad trials, if --watch is given.

    For asha it is successive halving in its asynchronous, stopping form (Li et al., arXiv
    1810.05934), for other methods the median rule (Golovin et al. 2017).
    """
    if args.watch is None:
        return NopPruner()
    if args.method != "asha":
        return MedianPruner(n_startup_trials=args.startup, n_warmup_steps=args.min_steps - 1)
    return SuccessiveHalvingPruner(args.min_steps, reduction_factor=args.reduction)


def make_rungs(args) -> Rungs | None:
    """The steps at which trials are compared; None without --watch."""
    if args.watch is None:
        return None
    return Rungs(args.watch, args.min_steps, args.reduction if args.method == "asha" else 1)


# ---- the sweep ----


class Sweep:
    """This process's part of a sweep: takes trials, runs them, records how they ended.

    studies: the study of each variant, by its name; without variants, the only name is "".
    """

    def __init__(self, args, studies: Mapping[str, Study], directory: Path, log: RunLog) -> None:
        self.args, self.studies, self.directory, self.log = args, studies, directory, log
        self.arguments = {each.name: each.arguments for each in variants(args)}
        self.rungs = make_rungs(args)
        self.threads = max(1, cores() // args.workers)
        self.workers: list[Worker] = []
        self.taken = 0
        self._nothing_left_until = -math.inf
        self._seen_at = -math.inf
        self.watches = {name: Watch() for name in studies}

    def run(self) -> bool:
        """Work until no trial is left for this process; return False if Ctrl-C ended that."""
        total = self.args.trials * len(self.studies)
        with (
            finish_on_interrupt() as interrupt,
            self.log.progress(total, self._ended(), "trials") as progress,
        ):
            try:
                while True:
                    self._heartbeat()
                    if not interrupt.requested:
                        self._fill()
                    if not self.workers and (interrupt.requested or not self._may_get_more()):
                        return not interrupt.requested
                    time.sleep(POLL)
                    if interrupt.requested:
                        self._end_all("interrupted")
                    if self._collect():
                        for _ in range(self._ended() - progress.done):
                            progress.advance(self._numbers())
            except KeyboardInterrupt:
                for worker in self.workers:
                    worker.kill()
                raise
            finally:
                self._wait_for_the_end()

    def report(self) -> Report:
        """The trials of all processes so far."""
        return Report.of(self.studies, self.args.search, self.args.metric)

    def _heartbeat(self) -> None:
        now = time.monotonic()
        if now - self._seen_at < HEARTBEAT:
            return
        self._seen_at = now
        for worker in self.workers:
            if not say_alive(worker.trial):
                worker.end("interrupted")
        for name, study in self.studies.items():
            for number in self.watches[name].take_back_lost(study):
                self._nothing_left_until = -math.inf
                self.log.say(f"{_label(name, number)} was interrupted; its values are queued again")

    def _fill(self) -> None:
        """Give every free worker a trial of the variant with the fewest trials so far."""
        while len(self.workers) < self.args.workers and self._may_take():
            for name in sorted(self.studies, key=lambda name: len(self._trials(name))):
                trial = claim(self.studies[name], self.args.trials)
                if trial is not None:
                    break
            else:
                self._nothing_left_until = time.monotonic() + HEARTBEAT
                return
            self.taken += 1
            arguments = self.arguments[name]
            command = [
                *self.args.trial_command,
                *arguments,
                *flags_of(trial, self.args.search),
            ]
            directory = self.directory / name / f"trial-{trial.number:05d}"
            self.workers.append(start(trial, command, directory, self.threads))

    def _may_take(self) -> bool:
        return time.monotonic() >= self._nothing_left_until and self._has_share_left()

    def _may_get_more(self) -> bool:
        """Whether a silent trial of another process may turn out to be lost."""
        return self._has_share_left() and any(watch.suspects for watch in self.watches.values())

    def _has_share_left(self) -> bool:
        return self.args.share is None or self.taken < self.args.share

    def _collect(self) -> bool:
        """Watch the workers and record those that have ended; return whether there were any."""
        ended = [worker for worker in self.workers if worker.process.poll() is not None]
        if self.rungs is not None:
            self._prune()
        for worker in ended:
            self.workers.remove(worker)
            self._record(worker)
        for worker in self.workers:
            if worker.ending is not None:
                worker.end(worker.ending)
        if ended:
            write_table(self.report(), self.directory)
        return bool(ended)

    def _prune(self) -> None:
        """End the trials that are bad at a rung; a trial that has ended is only compared."""
        for worker in self.workers:
            if worker.ending is None and self.rungs.compare(worker) and worker.runs():
                worker.end("pruned")

    def _record(self, worker: Worker) -> None:
        outcome = outcome_of(worker, self.args.metric)
        worker.stderr.close()
        trial = worker.trial
        if outcome.state == "interrupted":
            run_again(trial, outcome)
            return
        if not finish(trial, outcome):
            self.log.warn(f"{worker.directory} came too late: its values are queued again")
            return
        status = outcome.exit_status
        if status == 2 and self._none_has_run(trial.study):
            raise RefusedCommand(f"the command refuses its first trial: {outcome.error}")
        if outcome.state == "failed" and status == 0 and not self._has_values(trial.study):
            raise RefusedCommand(f"the first trial has no value: {outcome.error}")
        if outcome.state == "failed":
            self.log.say(f"{worker.directory} failed: {outcome.error}")

    def _none_has_run(self, study: Study) -> bool:
        statuses = {t.user_attrs.get("exit_status") for t in study.get_trials(deepcopy=False)}
        return statuses <= {None, 2}

    def _has_values(self, study: Study) -> bool:
        states = {state_of(trial) for trial in study.get_trials(deepcopy=False)}
        return bool(states & {"done", "diverged"})

    def _end_all(self, state: str) -> None:
        for worker in self.workers:
            worker.end(state)

    def _wait_for_the_end(self) -> None:
        """After an error, ask running trials to end, and kill them after GRACE seconds."""
        while self.workers:
            self._end_all("interrupted")
            self.workers = [each for each in self.workers if each.process.poll() is None]
            time.sleep(POLL)

    def _trials(self, name: str) -> Sequence:
        return self.studies[name].get_trials(deepcopy=False)

    def _ended(self) -> int:
        counts = [self.report().counts(name) for name in self.studies]
        return sum(count.get(state, 0) for count in counts for state in ENDED)

    def _numbers(self) -> dict[str, float]:
        report = self.report()
        best = {name: report.best(name) for name in self.studies}
        return {
            f"best {name}".strip(): trial.value for name, trial in best.items() if trial is not None
        }


def flags_of(trial: Trial, searched: Sequence[SearchedFlag]) -> list[str]:
    """The values of a trial as arguments of the command."""
    texts: dict[str, list[str]] = {}
    for flag in sorted(searched, key=lambda flag: flag.places[0]):
        text = str(flag.exact(trial.params[flag.name]))
        texts.setdefault(flag.flag, []).extend([text] * len(flag.places))
    arguments = []
    for name in dict.fromkeys(flag.flag for flag in searched):
        first, *others = texts[name]
        # argparse takes -1e-05 for a flag unless it is joined with = to its own flag
        arguments += [f"--{name}={first}"] if first.startswith("-") else [f"--{name}", first]
        arguments += others
    return arguments


def cores() -> int:
    """The number of cores that this process may use or, if unknown, of the machine."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def variants(args) -> list[Variant]:
    """The variants asked for, or a single one without a name and arguments."""
    return args.variant or [Variant("", ())]


def _label(variant: str, number: int) -> str:
    return f"{variant} trial {number}".strip()


# ---- the command ----


def open_directory(args) -> Path:
    """The sweep's directory, new or of an earlier sweep; UserError if it holds something else."""
    directory = args.resume or args.out or new_directory("sweep")
    known = directory / "config.json"
    if known.exists():
        if read_config(directory).get("command") != "sweep":
            raise UserError(f"{directory} is no sweep's directory: choose another --out")
    elif directory.is_dir():
        # another process may be starting the same sweep
        ours = (JOURNAL, NEW)
        if any(not entry.name.startswith(ours) for entry in directory.iterdir()):
            raise UserError(f"{directory} is not empty: choose another --out")
    refuse_links(directory)
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory, seconds=LEFT_AFTER)
    return directory


def open_studies(args, directory: Path) -> dict[str, Study]:
    """The study of each variant, created if necessary.

    Raises StudyError if a study lacks trials for which there are directories.
    """
    seen = {each.name: trial_directories(directory / each.name) for each in variants(args)}
    storage = open_storage(args.storage, directory)
    args.study = args.study or directory.resolve().name  # saved, so that DIR may be moved
    studies = {
        each.name: open_study(
            storage,
            f"{args.study}/{each.name}" if each.name else args.study,
            args.direction,
            plain(definition(args, each)),
            make_sampler(args.search, args.seed, args.method, args.startup),
            make_pruner(args),
        )
        for each in variants(args)
    }
    for name, study in studies.items():
        missing = [path for number, path in seen[name].items() if number >= len(study.trials)]
        if missing:
            raise StudyError(f"{args.storage or JOURNAL} is damaged: the study does not know "
                             f"{missing[0]}; put the study's own file back, or start anew with "
                             "another --out")  # fmt: skip
    return studies


def trial_directories(folder: Path) -> dict[int, Path]:
    """The directories of trials in a folder, by number; each trial is in its study before that."""
    paths = sorted(folder.glob("trial-[0-9]*"))
    return {int(path.name.removeprefix("trial-")): path for path in paths}


def save_config(args, directory: Path) -> dict[str, Any]:
    """Write config.json, which --resume reads, and return its content."""
    config = {name: value for name, value in vars(args).items() if name not in OF_THIS_PROCESS}
    config = plain(config | {"command": "sweep"})
    write_whole(directory / "config.json", json_text(config))
    return config


def say_summary(report: Report, log: RunLog) -> None:
    """Show the number of trials in each state, each variant's best trial, and its first failure."""
    for name in report.trials:
        counts = ", ".join(f"{count} {state}" for state, count in report.counts(name).items())
        log.say(f"{name + ': ' if name else ''}{counts}")
        best = report.best(name)
        if best is not None:
            log.say(f"  best {report.metric} {best.value:.6g}, trial {best.number}")
            log.say(f"  {best.user_attrs['command']}")
        failed = [row for row in report.rows(name) if row["state"] == "failed"]
        if failed:
            first = _label(name, failed[0]["number"])
            log.warn(f"{len(failed)} failed; {first} with: {failed[0]['error']}")


def nothing_came_of(report: Report) -> bool:
    """Whether the trials of all variants have ended, and none has a value."""
    states = {state for name in report.trials for state in report.counts(name)}
    return not states & {"done", "running", "waiting"}


def write_slurm(args, sweep_flags: Sequence[str]) -> None:
    """Write a Slurm job array whose tasks share the study, each with its part of the trials."""
    if args.out is None:
        raise UserError("--slurm needs --out DIR, on a file system that all machines share")
    total = args.trials * len(variants(args))
    tasks = min(args.array_tasks, total)
    flags = _without(sweep_flags, ("--slurm", "--array_tasks", "--share"))
    flags += ["--share", str(math.ceil(total / tasks))]
    script = str(HOME / "sweep.py")  # absolute, because the job runs wherever sbatch is called
    command = shlex.join([sys.executable, script, *flags, "--", *args.trial_command])
    lines = (
        "#!/bin/bash\n"
        f"#SBATCH --job-name={args.study or args.out.name}\n"
        f"#SBATCH --array=0-{tasks - 1}\n"
        f"#SBATCH --cpus-per-task={args.workers}\n"
        "#SBATCH --time=24:00:00\n"
        "# a task that runs out of time ends its trials cleanly and queues them again\n"
        f"#SBATCH --signal=B:TERM@{2 * int(GRACE)}\n"
        f"\nexec {command}\n"
    )
    # surrogateescape keeps the bytes of paths that are not UTF-8
    args.slurm.write_text(lines, encoding="utf-8", errors="surrogateescape")
    if not args.quiet:
        show(f"submit it: sbatch {shlex.quote(displayable(str(args.slurm)))}", sys.stdout)


def _without(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The arguments without these flags and the single value of each."""
    kept, skip = [], False
    for argument in argv:
        if not skip and argument.partition("=")[0] not in flags:
            kept.append(argument)
        skip = not skip and argument in flags
    return kept


def main(argv: list[str] | None = None) -> None:
    """Parse, open the study, run trials, report."""
    sweep_flags, command = split_at_dashes(sys.argv[1:] if argv is None else argv)
    args = parse(make_parser(), sweep_flags)
    complete(args, command)
    if args.slurm is not None:
        write_slurm(args, sweep_flags)
        return
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with storage_errors(args.storage):
        finished = run(args)
    if not finished:
        raise KeyboardInterrupt


def run(args) -> bool:
    """Take part in the sweep; return False if Ctrl-C ended that."""
    directory = open_directory(args)
    new = not (directory / "config.json").exists()
    studies: dict[str, Study] = {}
    try:
        studies = open_studies(args, directory)
        config = save_config(args, directory)
        with RunLog.create(directory / "processes" / log_name(), config, args.quiet) as log:
            sweep = Sweep(args, studies, directory, log)
            try:
                finished = sweep.run()
            finally:
                write_report(sweep.report(), directory, figures=not args.no_figures)
            report = sweep.report()
            say_summary(report, log)
            log.say(f"everything is in {directory}")
            if finished and nothing_came_of(report):
                sys.exit(f"error: no trial is done, of all that are in {directory}")
            return finished
    except RefusedCommand:
        if new:
            forget(studies, directory)
        raise
    except StudyError:
        if new:
            with suppress(OSError):  # raised if it is not empty
                directory.rmdir()
        raise


def log_name() -> str:
    """A unique name for the directory of this process's log."""
    return f"{HERE['host']}-{HERE['process']}-{uuid.uuid4().hex[:6]}"


def forget(studies: Mapping[str, Study], directory: Path) -> None:
    """Remove a sweep whose command was refused.

    It is kept if other processes take part in it, or a trial of another variant has a value.
    """
    for study in studies.values():
        if any(state_of(trial) == "done" for trial in study.trials):
            return
        owners = {trial.user_attrs.get("owner", HERE)["session"] for trial in study.trials}
        if owners - {HERE["session"]}:
            return
    for study in studies.values():
        optuna.delete_study(study_name=study.study_name, storage=study._storage)
    shutil.rmtree(directory)


if __name__ == "__main__":
    run_command(main)
