"""Learned optimisers saved as JSON, and files of the original program.

    save_network(network, "optimizer.json")
    network = load_network("optimizer.json")      # or l2o_optimizer.pt
    network = load_network("relu20")              # trained, in trained/relu20.json

The original program, https://github.com/Johnny1188/learning-to-optimize, saves with torch.save.
Loading such a file runs no code from it: everything but tensors and plain values is replaced by an
empty object.
"""

import json
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from learned_optimizer.errors import OptimizerError
from learned_optimizer.files import write_whole
from learned_optimizer.networks import CoordinateLSTM, CoordinateNetwork, make_network

# errors raised by reading a description that isn't one
_UNREADABLE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError)
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TYPES}
TRAINED = Path(__file__).parent / "trained"  # networks that come with the package
ORIGINAL_LAYERS = {"recurs": "lstm.{}_l0", "recurs2": "lstm.{}_l1", "output": "output.{}"}


def save_network(network: CoordinateNetwork, path: Path | str) -> None:
    """Write a network as JSON, with exact weights."""
    write_whole(path, json.dumps(network_to_dict(network)) + "\n")


def network_to_dict(network: CoordinateNetwork) -> dict:
    """The network's kind, settings, type and weights as plain values."""
    weights = {name: p.tolist() for name, p in network.state_dict().items()}
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    return {"kind": network.kind, "settings": network.settings, "dtype": dtype, "weights": weights}


def load_network(path: Path | str) -> CoordinateNetwork:
    """The network in a file by `save_network`, with its type, or in an l2o_optimizer.pt.

    A name without such a file is that of a trained network of the package, now "relu20". Raises
    OptimizerError if the file holds something else, or weights that are not finite.
    """
    if str(path) in {kept.stem for kept in TRAINED.glob("*.json")} and not Path(path).exists():
        path = TRAINED / f"{path}.json"
    if zipfile.is_zipfile(path):
        return _load_original(path)
    try:
        description = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise OptimizerError(f"cannot read a learned optimiser from {path}: {problem}") from problem
    try:
        network = make_network(description["kind"], **description["settings"])
        network.to(DTYPES[description.get("dtype", "float32")])  # missing in older files
        weights = description["weights"].items()
        network.load_state_dict({n: torch.tensor(w, dtype=torch.float64) for n, w in weights})
    except OptimizerError:
        raise
    except _UNREADABLE as problem:
        raise OptimizerError(
            f"{path} is no learned optimiser, or one of another architecture: {problem}"
        ) from problem
    if not all(p.isfinite().all() for p in network.parameters()):
        raise OptimizerError(f"{path} holds weights that are not finite")
    return network


# ---- the original's files ----


class _Named:
    """Takes the place of any class or function that a file names, and of the objects they make."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _load_original(path: Path | str) -> CoordinateLSTM:
    """An LSTM from a dict saved by meta_train.py, a checkpoint of an epoch, or weights alone.

    out_mul has this program's default if the file does not say it.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Named, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        config = content.get("config", {})
        weights = content.get("state_dict") or content.get("best_opter") or content
        return _original_lstm(
            weights, config.get("opter_config") or {}, config.get("meta_training") or {}
        )
    except OptimizerError:
        raise
    except (*_UNREADABLE, OSError, UnpicklingError) as problem:
        reason = str(problem).strip().split("\n")[0]
        raise OptimizerError(f"{path} is no learned optimiser: {reason}") from problem


def _original_lstm(weights: dict[str, Tensor], opter: dict, training: dict) -> CoordinateLSTM:
    first = weights["recurs.weight_ih"]
    inputs, hidden = first.shape[1], len(first) // 4
    extra = opter.get("additional_inp_dim", 0)
    if extra or inputs > 2:
        raise OptimizerError(
            f"an optimiser of {inputs} inputs: those beside the gradient are not the same here; "
            "expected additional_inp_dim 0"
        )
    out_mul = training.get("optee_updates_lr")
    network = CoordinateLSTM(
        hidden, preprocess=inputs == 2,
        preprocess_factor=opter.get("preproc_factor", 10.0),
        **({} if out_mul is None else {"out_mul": out_mul}),
    )  # fmt: skip
    ours = {}
    for name, weight in weights.items():
        layer, _, kind = name.partition(".")
        ours[ORIGINAL_LAYERS[layer].format(kind)] = weight
    network.to(first.dtype).load_state_dict(ours)
    return network
