"""The four libraries as packages: what is installed, what loads, that they need nothing else."""

import ast
import importlib
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from commands import ROOT
from forked import Command
from test_house import LIBRARIES

import experiment.compiling
import experiment.files
import experiment.seeds
import experiment.settings
import learned_optimizer.files

HEAVY = ("torch", "numpy", "numba", "scipy", "sklearn")
HOSTILE = ("train.py", "errors.py", "evaluate.py", "files.py", "seeds.py", "settings.py",
           "data_sets/__init__.py", "experiment/__init__.py")  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what packages are made of, beside files that must not get into them."""
    folder = tmp_path_factory.mktemp("sources")
    for name in LIBRARIES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    write_hostile_files(folder)
    return folder


def write_hostile_files(folder: Path) -> None:
    """Modules of the names that this program has beside its libraries; to import them is wrong."""
    for name in HOSTILE:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise ImportError({name!r})\n")


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> zipfile.ZipFile:
    """What `pip install .` would install."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet",
               "--no-build-isolation", "--no-deps", "--wheel-dir", out, sources]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


def example(library: str) -> str:
    """The first block of Python on the library's page."""
    text = (ROOT / f"docs/{library}.md").read_text()
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


# ---- the wheel ----


def test_the_wheel_holds_the_four_libraries_typed_and_nothing_else(wheel):
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {f"{lib}/{path.name}" for lib in LIBRARIES for path in (ROOT / lib).glob("*.py")}
    others = {"learned_optimizer/trained/relu20.json"}
    assert found == modules | {f"{library}/py.typed" for library in LIBRARIES} | others


def test_the_wheel_says_its_version_and_lower_bounds_of_what_it_needs(wheel):
    (path,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    metadata = message_from_bytes(wheel.read(path))
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["Version"])
    needed = dict(text.split(">=") for text in metadata.get_all("Requires-Dist"))
    assert {*needed} == set().union(*LIBRARIES.values()) - {*LIBRARIES}
    assert all(re.fullmatch(r"[\d.]+", bound) for bound in needed.values())


def test_the_editable_install_too_finds_the_four_libraries_and_nothing_else(sources, tmp_path):
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=sources, check=True, capture_output=True)
    (path,) = tmp_path.iterdir()
    files = zipfile.ZipFile(path)
    (finder,) = [name for name in files.namelist() if name.endswith("_finder.py")]
    (mapping,) = re.findall(r"^MAPPING.* = (\{.*\})$", files.read(finder).decode(), re.M)
    assert ast.literal_eval(mapping) == {name: str(sources / name) for name in LIBRARIES}
    (link,) = [files.read(name).decode() for name in files.namelist() if name.endswith(".pth")]
    assert link.startswith("import ") and "\n" not in link.strip()  # no folder goes on the path


def test_the_examples_run_beside_a_strangers_own_modules(wheel, tmp_path):
    installed, folder = tmp_path / "installed", tmp_path / "work"
    wheel.extractall(installed)
    folder.mkdir()
    write_hostile_files(folder)
    program = (
        "import sys\n"
        "sys.path.insert(0, '')\n"
        f"for library in {[*LIBRARIES]}:\n"
        "    __import__(library)\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert not loaded, f'importing the packages alone loads {loaded}'\n"
        f"for block in {[example(library) for library in LIBRARIES]}:\n"
        "    exec(block, {})\n"
        f"for library in {[*LIBRARIES]}:\n"
        f"    assert sys.modules[library].__file__.startswith({str(installed)!r})\n"
    )
    # loops as plain Python: to compile them takes longer than to run them on so little
    environment = os.environ | {"PYTHONPATH": str(installed), "NUMBA_DISABLE_JIT": "1"}
    result = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_example_of_a_library_is_at_most_ten_lines(library):
    block = example(library)
    assert f"from {library} import" in block
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 10


# ---- the public faces ----


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_face_shows_type_checkers_the_names_that_it_loads(library):
    face = importlib.import_module(library)
    tree = ast.parse((ROOT / library / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names if alias.asname}
    assert {*seen} == {*face.__all__} <= {*dir(face)}
    for name, module in seen.items():
        assert getattr(face, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = face.absent


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_name_of_a_face_is_a_modules_too(library):
    modules = {path.stem for path in (ROOT / library).glob("*.py")}
    assert not modules & {*importlib.import_module(library).__all__}


def test_choices_and_settings_load_nothing_heavy():
    program = (
        "import sys\n"
        "from krotov_hopfield import GATES, RECIPES, CompetitionError, gate_needs\n"
        "from learned_optimizer import NETWORK_KINDS, MetaTrainingSettings, OptimizerError\n"
        "from one_pass import METHODS, OnePassError, Settings\n"
        "from hypergradients import DivergenceError\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_errors_are_kinds_of_the_built_in_ones(library):
    errors = vars(importlib.import_module(f"{library}.errors"))
    own = [e for e in errors.values() if isinstance(e, type) and e.__module__.startswith(library)]
    kinds = ValueError | RuntimeError | FloatingPointError | RuntimeWarning
    assert own and all(issubclass(e, kinds) for e in own)


WITHOUT_FORWARD_MODE = """
import torch
from learning_rules import LearningRule

class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w / 2

    @staticmethod
    def backward(ctx, grad):
        return grad / 2

class Rule(LearningRule):
    def update_layer(self, layer, old, x, s, y):
        return old | {"w": Halved.apply(old["w"])}
"""


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        (
            "main",
            "8 --dataset mnist5k --method forward --inhibition none --rule {file}:Rule "
            "--initial_inner_steps 2",
            "in forward mode",
        ),
        (
            "train_krotov_hopfield",
            "--dataset mnist5k --depth 1 --units 2 --ranking_param 5 --train_images 50",
            "ranking_param is 5",
        ),
        ("learn_to_optimize", "gru20 --dataset mnist5k", "unknown optimizee 'gru20'"),
        (
            "tune_one_pass",
            "--dataset quadratic --method look_back --optimised_hyperparameters momentum "
            "--momentum 0",
            "momentum begins with the raw value -inf",
        ),
    ],
)
def test_a_librarys_error_ends_its_command_with_one_line_and_status_2(
    command, flags, said, tmp_path, monkeypatch, capsys
):
    (tmp_path / "own.py").write_text(WITHOUT_FORWARD_MODE)
    flags = flags.format(file=tmp_path / "own.py")
    program = str(ROOT / f"{command}.py")
    run = ["--quiet", "--threads", "1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [program, *flags.split(), *run])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(program, run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and said in line


# ---- copies of small shared things ----


def test_the_libraries_generators_are_those_of_the_program():
    draw = random.Random(0)
    keys = [tuple(draw.randrange(2**40) for _ in range(draw.randrange(1, 5))) for _ in range(50)]
    for library in ("krotov_hopfield", "learned_optimizer", "one_pass"):
        copy = importlib.import_module(f"{library}.seeds").seeded_generator
        for key in keys:
            expected = experiment.seeds.seeded_generator(*key).initial_seed()
            assert copy(*key).initial_seed() == expected


def test_the_runs_for_validation_have_the_number_that_the_program_keeps_free_for_them():
    meta_training = importlib.import_module("learned_optimizer.meta_training")
    others = {experiment.seeds.TUNING, experiment.seeds.TEST}
    assert meta_training.VALIDATION == experiment.seeds.VALIDATION not in others


def test_all_copies_of_the_compilers_decorator_agree():
    ours = Path(experiment.compiling.__file__).read_text()
    for library in ("krotov_hopfield", "learned_optimizer", "one_pass"):
        assert (ROOT / library / "compiling.py").read_text() == ours


def test_both_copies_of_recorded_calls_agree():
    one, other = (
        (ROOT / name / "recorded.py").read_text() for name in ("one_pass", "learned_optimizer")
    )
    assert one == other


def test_loops_are_compiled_also_where_no_cache_can_be_written(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
import numpy as np
import data_sets.view_loops, kernels.unit_statistics_loops, krotov_hopfield.competition_kernels
from learned_optimizer.compiled_lstm import _sigmoid
from one_pass.compiled_mlp import _gradient_loops
_gradient_loops(2, 3)
assert _sigmoid(np.float32(0)) == 0.5
""")
    assert Command(script).wait(120) == 0


@pytest.mark.parametrize("module", [experiment.files, learned_optimizer.files])
def test_both_copies_write_a_file_whole_or_leave_the_old_one(module, tmp_path, monkeypatch):
    path = tmp_path / "file"
    module.write_whole(path, "old\r\nß\n")
    assert path.read_bytes() == "old\r\nß\n".encode()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        module.write_whole(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == "old\r\nß\n".encode()


@pytest.mark.parametrize(
    "name", ["krotov_hopfield.recipes", "learned_optimizer.settings", "one_pass.settings"]
)
def test_the_libraries_describe_settings_as_the_program_does(name):
    given = (1, "how many", "positive"), {"choices": (1, 2)}
    described = importlib.import_module(name)._setting(*given[0], **given[1])
    expected = experiment.settings.setting(*given[0], **given[1])
    assert (described.default, described.metadata) == (expected.default, expected.metadata)


def test_parameters_are_of_the_same_type_here_and_there():
    here, there = (importlib.import_module(name).Params
                   for name in ("models_fully_local", "learned_optimizer.optimizees"))  # fmt: skip
    assert here == there


def test_lists_of_choices_name_what_there_is():
    assert (*importlib.import_module("learned_optimizer.networks").NETWORKS,) == (
        importlib.import_module("learned_optimizer").NETWORK_KINDS
    )
    tuning = importlib.import_module("one_pass.tuning")
    settings = importlib.import_module("one_pass.settings")
    assert (*tuning.TRANSFORMS,) == settings.TRANSFORM_KINDS
    assert ("fixed", *tuning._METHODS) == settings.METHODS
