"""Weights of a file into a network: all of them or none, and what does not fit is listed.

Training leaves prefixes in names: ``module.`` (data parallel), ``_orig_mod.`` (torch.compile), ``model.`` (Lightning).
They are taken off where every name fits then, and only there.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from penjing.errors import CheckpointError
from penjing.sources import finite
from penjing.sources.weight_files import State, WeightFile, read

SHOWN = 10  # of the names of each kind
COMPARED = 2_000  # names, in search of the nearest: of hundreds of thousands it would take minutes
RENAMED = 8  # times as many names as the network has: not an older version of it
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that torch gives to what it wraps: no network has them of its own."""
_AVERAGES = "n_averaged"  # how many `torch.optim.swa_utils.AveragedModel` has seen, beside the network
_COUNTERS = "num_batches_tracked"  # of batch normalization: old files lack it, and inference does not read it


@dataclass(frozen=True)
class Loaded:
    """Weights that a network was given.

    Attributes:
        file: As it was named.
        sha256: Of what was read.
        notes: What the user is to know of it.
    """

    file: str
    sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Misfit:
    """How the names and shapes of a state dict differ from a network's.

    Attributes:
        missing: In the network alone.
        unexpected: In the file alone.
        misshapen: In both, with another shape or kind of number: what is said of each.
        torn: Pairs that are one tensor in the network, and two different ones in the file.
        matched: How many names are in both.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: Mapping[str, str] = field(default_factory=dict)
    torn: tuple[tuple[str, str], ...] = ()
    matched: int = 0

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen or self.torn)

    @property
    def count(self) -> int:
        """Names that do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen) + len(self.torn)


def load(module: nn.Module, file: Path | str, ignore: Sequence[str] = ()) -> Loaded:
    """Give a network the weights of a file, in place; it is unchanged where they do not fit.

    Args:
        module: The network.
        file: See `penjing.sources.weight_files.read`; ``FILE:key`` names one of several state dicts.
        ignore: Patterns of names in the file that the network need not have, such as ``"criterion.*"``.

    Raises:
        CheckpointError: The file can't be read, does not fit or holds NaN, or several of its state dicts fit.
    """
    known = _tensors(module)
    weights = read(file)
    fitting: dict[str, State] = {}
    nearest: tuple[str, State, Misfit] | None = None
    for key, state in weights.states.items():
        for spelled in _spellings(_without(state, ignore)):
            misfit = compare(spelled, known, module)
            if not misfit:
                fitting[key] = spelled
                break
            if nearest is None or _closeness(misfit) > _closeness(nearest[2]):
                nearest = key, spelled, misfit
    if not fitting:
        assert nearest is not None
        misfit = nearest[2]
        renamed = misfit.missing and misfit.unexpected and not (misfit.misshapen or misfit.torn)
        if renamed and _by_its_own_rules(module, weights, ignore):
            return Loaded(str(file), weights.sha256)
        raise _does_not_fit(module, weights, *nearest)
    key, state = next(iter(fitting.items()))
    if any(not _equal(state, other) for other in fitting.values()):
        raise CheckpointError(
            f"{weights.path.name} holds several state dicts that fit",
            code="ambiguous",
            got=", ".join(fitting),
            expected="one",
            remedy=f"name it: {weights.path}:{key}",
        )
    finite.check({n: t for n, t in state.items() if n in known}, weights.path.name, CheckpointError)
    with torch.no_grad():
        for name, tensor in known.items():
            if name in state:
                tensor.copy_(state[name])
    return Loaded(str(file), weights.sha256, tuple(_converted(state, known)))


def compare(state: State, known: State, module: nn.Module) -> Misfit:
    """How a state dict differs from the tensors of a network.

    Counters of batch normalization, constants that the network makes anew (buffers that are not stored) and the second
    name of a tied tensor may be left out.
    """
    constants = {name for name, _ in module.named_buffers()} - known.keys()
    groups = _ties(known)
    absent = {
        name
        for name in known
        if name not in state and not any(other in state for other in groups.get(name, ())) and not _counter(name)
    }
    unexpected = [n for n in state if n not in known and n not in constants and not _counter(n)]
    misshapen = {n: said for n, t in state.items() if n in known and (said := _difference(t, known[n]))}
    torn = [
        (name, other)
        for name, others in groups.items()
        for other in others
        if name < other and name in state and other in state and not misshapen and not _same(state[name], state[other])
    ]
    matched = sum(name in known for name in state)
    return Misfit(tuple(n for n in known if n in absent), tuple(unexpected), misshapen, tuple(torn), matched)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a network stores, by name.

    Raises:
        CheckpointError: It has no numbers yet.
    """
    tensors = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    empty = [n for n, t in tensors.items() if t.is_meta or nn.parameter.is_lazy(t)]
    if empty:
        raise CheckpointError(
            "the network can't take weights yet",
            code="no-storage",
            got=f"{empty[0]} and {len(empty) - 1} more without numbers: on the meta device, or of a lazy layer",
            expected="a network whose parameters have shape and memory",
            remedy="module.to_empty(device='cpu') in the factory; run lazy layers once on an example",
        )
    return tensors


def _counter(name: str) -> bool:
    return name.rpartition(".")[2] == _COUNTERS


def _ties(known: State) -> dict[str, tuple[str, ...]]:
    """The other names of every tensor that has several."""
    names: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
    for name, tensor in known.items():
        if tensor.numel():
            names.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    return {n: tuple(o for o in group if o != n) for group in names.values() if len(group) > 1 for n in group}


def _difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    """What is said of a tensor that another can't take; "" where it can."""
    if got.is_quantized or got.layout != torch.strided or got.is_meta:
        kind = "quantized" if got.is_quantized else "on the meta device" if got.is_meta else str(got.layout)
        return f"{kind}, and a plain tensor in the network"
    if got.shape != expected.shape:
        return f"{list(got.shape)}, and {list(expected.shape)} in the network"
    if _kind(got) != _kind(expected):
        return f"{got.dtype}, and {expected.dtype} in the network".replace("torch.", "")
    return ""


def _kind(tensor: torch.Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bool"
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "int"


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)


def _without(state: State, ignore: Sequence[str]) -> State:
    return {n: t for n, t in state.items() if not any(fnmatchcase(n, pattern) for pattern in ignore)}


def _spellings(state: State) -> Iterator[State]:
    """The same tensors under every name that they may have without the prefixes of training."""
    yield state
    plain = {".".join(part for part in name.split(".") if part not in _WRAPPERS): t for name, t in state.items()}
    if _AVERAGES in plain and len(plain) > 1:
        plain.pop(_AVERAGES)
    if len(plain) < len(state) - 1 or not plain:
        return  # two names have become one
    if plain.keys() != state.keys():
        yield plain
    while len({name.partition(".")[0] for name in plain}) == 1 and all("." in name for name in plain):
        plain = {name.partition(".")[2]: tensor for name, tensor in plain.items()}
        yield plain


def _closeness(misfit: Misfit) -> tuple[int, int]:
    return misfit.matched - len(misfit.misshapen), -misfit.count


def _by_its_own_rules(module: nn.Module, weights: WeightFile, ignore: Sequence[str]) -> bool:
    """Load as the network itself does it, where it takes names of an older version; whether it could."""
    most = RENAMED * len(_tensors(module))
    for state in weights.states.values():
        for spelled in _spellings(_without(state, ignore)):
            if len(spelled) > most:  # torch goes through all of them at every layer
                break
            try:  # on a copy: what fails must leave nothing behind
                copy.deepcopy(module).load_state_dict(spelled)
            except Exception:  # names and shapes, or whatever hooks of the user's code raise
                continue
            finite.check(spelled, weights.path.name, CheckpointError)
            module.load_state_dict(spelled)
            return True
    return False


def _converted(state: State, known: State) -> Iterator[str]:
    """What is to be said of numbers whose type in the file is another than in the network."""
    types = {(t.dtype, known[n].dtype) for n, t in state.items() if n in known and t.is_floating_point()}
    for got, own in sorted(types, key=str):
        if got != own:
            yield f"weights that are {got} in the file are {own} in the network".replace("torch.", "")


def _does_not_fit(module: nn.Module, weights: WeightFile, key: str, state: State, misfit: Misfit) -> CheckpointError:
    lines = [
        *_listed("missing", misfit.missing, _near(misfit.missing, misfit.unexpected, "in the file")),
        *_listed("unexpected", misfit.unexpected, _near(misfit.unexpected, misfit.missing, "in the network")),
        *_listed("of another shape", list(misfit.misshapen), misfit.misshapen),
        *_listed("torn", [one for one, _ in misfit.torn], {a: f"tied to {b}, and differs" for a, b in misfit.torn}),
    ]
    where = f" under {key!r}" if key else ""
    others = [name or "(the file itself)" for name in weights.states if name != key]
    if others:
        lines.append(f"other state dicts in the file: {', '.join(others[:SHOWN])}")
    return CheckpointError(
        f"the weights in {weights.path.name}{where} do not fit {type(module).__name__}",
        code="misfit",
        got="\n            ".join(lines),
        expected=f"the {len(_tensors(module))} tensors of the network, by name and shape; nothing was loaded",
        remedy=_remedy(misfit, state),
    )


def _remedy(misfit: Misfit, state: State) -> str:
    if misfit.misshapen and not misfit.missing and not misfit.unexpected:
        return "build the network with the sizes of these weights: number of classes, width, input channels"
    if misfit.unexpected and not misfit.missing and not misfit.misshapen:
        name = misfit.unexpected[0]
        pattern = f"{name.partition('.')[0]}.*" if "." in name else name
        return f"if the network does not need them: --ignore-weights '{pattern}', or load_weights(..., ignore=[...])"
    if misfit.matched > len(misfit.missing) == len(misfit.unexpected) and not misfit.misshapen:
        return "if the names alone differ, rename them in the file: torch.save({new: tensor, ...}, 'weights.pth')"
    return f"give the network that these weights were saved from: {misfit.matched} of {len(state)} names are in both"


def _near(names: Sequence[str], others: Sequence[str], where: str) -> dict[str, str]:
    """The nearest names on the other side, of those that are shown; among many, of those with the same last part."""
    pairs = {}
    for name in names[:SHOWN]:
        last = name.rpartition(".")[2]
        near = others if len(others) <= COMPARED else [other for other in others if other.rpartition(".")[2] == last]
        pairs[name] = difflib.get_close_matches(name, near[:COMPARED], n=1, cutoff=0.6)
    return {name: f"nearest {where}: {near[0]}" for name, near in pairs.items() if near}


def _listed(what: str, names: Sequence[str], remarks: Mapping[str, str]) -> list[str]:
    if not names:
        return []
    shown = [f"  {name} ({remarks[name]})" if name in remarks else f"  {name}" for name in names[:SHOWN]]
    more = [f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{len(names)} {what}:", *shown, *more]
