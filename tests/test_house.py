"""The rules of the house, read from every import in the syntax trees."""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "baseline_mlp", "baseline_pca", "baseline_vicreg", "evaluate", "find_oja", "learn_to_optimize",
    "main", "plot", "prune_rule", "sweep", "train_krotov_hopfield", "tune_one_pass",
}  # fmt: skip
MAIN_JOB = {
    "hypgraddesc", "initializers", "learning_rules", "linear_probe", "meta_gradients",
    "mnist_datasets", "models_fully_local", "train",
}  # fmt: skip
LIBRARIES = {  # what each may use, beside the standard library
    "hypergradients": {"torch"},
    "krotov_hopfield": {"torch", "numpy", "numba"},
    "learned_optimizer": {"torch", "numpy", "numba", "hypergradients"},
    "one_pass": {"torch", "numpy", "numba"},
}
GROUND = {"data_sets", "experiment", "kernels"}  # folders that do without the root
FOLDERS = {*LIBRARIES, *GROUND, "comparison", "figures", "rules", "sweeps"}
PROGRAMS = {"examples", "benchmarks"}  # folders of scripts

Graph = dict[str, set[str]]


def name_of(path: Path) -> str:
    """The module's name, a package's for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(path): path
    for folder in ("", *FOLDERS, *PROGRAMS)
    for path in (ROOT / folder).glob("*.py")
}


def imported(tree: ast.AST, package: str) -> Iterable[str]:
    """Names of what a module imports anywhere, by statements or as texts for import_module.

    Beside `from package import name` stands package.name, which may be a module.
    """
    by_name = "import_module" in ast.dump(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are by whole names"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif by_name and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from {node.value, f"{package}.{node.value}"} & {*FILES}


def imports_of(name: str, text: str) -> set[str]:
    """What a module imports: modules of the house, and top-level names of anything else."""
    found = set()
    for whole in imported(ast.parse(text), name.partition(".")[0]):
        own = [".".join(whole.split(".")[:k]) for k in (3, 2, 1)]
        found.add(next((module for module in own if module in FILES), own[-1]))
    return found - {name}


IMPORTS: Graph = {name: imports_of(name, path.read_text()) for name, path in FILES.items()}


def room(name: str) -> str:
    """The folder of a module, "" for the root."""
    top = name.partition(".")[0]
    return top if top in FOLDERS | PROGRAMS else ""


def between_rooms() -> Graph:
    """Which folders import which others; the root is none."""
    graph: Graph = {folder: set() for folder in FOLDERS}
    for name, used in IMPORTS.items():
        if room(name) in FOLDERS:
            graph[room(name)] |= {room(other) for other in used & {*FILES}} - {"", room(name)}
    return graph


def circle(graph: Graph) -> list[str]:
    """The nodes of one circle, none where there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        done.add(node)
        return next(filter(None, (walk(n, [*path, node]) for n in graph.get(node, ()))), [])

    return next(filter(None, (walk(node, []) for node in graph)), [])


def test_the_root_holds_the_commands_and_the_main_jobs_modules_and_nothing_else():
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS | MAIN_JOB
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == FOLDERS and not [*ROOT.glob("[!.]*/*/__init__.py")]


def test_no_modules_and_no_folders_import_each_other_in_a_circle():
    assert circle(IMPORTS) == []
    assert circle(between_rooms()) == []


def test_ground_folders_import_nothing_from_the_root():
    for name, used in IMPORTS.items():
        assert room(name) not in GROUND or not used & (COMMANDS | MAIN_JOB), name


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_imports_itself_those_below_it_and_third_parties(library):
    known = {library, *LIBRARIES[library], *sys.stdlib_module_names} - {"argparse"}
    for name in FILES:
        if room(name) == library:
            assert {module.partition(".")[0] for module in IMPORTS[name]} <= known, name


def test_libraries_and_kernels_know_neither_flags_nor_run_directories():
    for name, used in IMPORTS.items():
        if room(name) in {"kernels", *LIBRARIES}:
            assert not used & {"argparse", "experiment.command_line", "experiment.run_log"}, name


def test_no_script_imports_a_script():
    programs = {name for name in FILES if room(name) in PROGRAMS}
    scripts = COMMANDS | {n for n in programs if '__name__ == "__main__"' in FILES[n].read_text()}
    others = {"benchmarks.table", "examples.own_rules"}
    assert programs - scripts == others, "what benchmarks share, what main.py runs: no scripts"
    for name in scripts:
        assert not IMPORTS[name] & scripts, name


def test_imports_are_seen_wherever_they_stand():
    text = (
        "import importlib\nfrom typing import TYPE_CHECKING\nimport json\n"
        "if TYPE_CHECKING:\n    from train import train\n"
        "def load():\n    import learning_rules\n"
        "    from hypergradients import methods, CG\n"
        "    return importlib.import_module('rules.competing_units'), TABLE\n"
        "TABLE = {'name': 'layers'}\n"
    )
    assert imports_of("krotov_hopfield.x", text) == {
        "importlib", "typing", "json", "train", "learning_rules", "hypergradients.methods",
        "hypergradients", "rules.competing_units", "krotov_hopfield.layers",
    }  # fmt: skip


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
