"""From TorchScript to the files of ncnn with pnnx, a program in its wheel. Nothing that it writes is executed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penjing.errors import ExportError
from penjing.measure.time_limits import opening_s
from penjing.network.graph import line, operator_name, site
from penjing.records.manifest import Port
from penjing.runtimes.ncnn_files import NO_BATCH, Layer


def converted(network: Any, aside: Path, shapes: Sequence[Sequence[str]], half: bool = False) -> dict[str, bytes]:
    """What pnnx writes for `model.pt`: "param" and "bin" of ncnn, and "py", an example of their use, which is read.

    Args:
        network: Of which `model.pt` was made, for errors.
        aside: The folder of `model.pt`, for what pnnx writes.
        shapes: Sizes of the inputs as pnnx names them; of each input the same, or several where they vary.
        half: Store weights in half precision.

    Raises:
        ExportError: pnnx can't convert it.
    """
    ended = ""
    for sizes in shapes:
        ended = _run(aside, [*sizes, f"fp16={int(half)}"])
        if not ended:
            return {word: (aside / name).read_bytes() for word, name in _WRITTEN.items()}
    raise ExportError(
        f"pnnx can't convert the network{_where(network, ended, ': ')}",
        code="unreadable",
        got=ended[-400:],
        expected="operators of torch that pnnx knows",
        remedy="write that operator with others, or choose another runtime",
    )


_WRITTEN = {"param": "model.ncnn.param", "bin": "model.ncnn.bin", "py": "model_ncnn.py"}


def _run(aside: Path, options: list[str]) -> str:
    """Run pnnx in a folder; how it ended where it wrote nothing."""
    for name in _WRITTEN.values():
        (aside / name).unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [str(_pnnx()), "model.pt", *options],
            cwd=aside,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=opening_s(aside),
            env={"PATH": "", "OMP_NUM_THREADS": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return f"no answer in {error.timeout:.0f} s"
    if all((aside / name).is_file() for name in _WRITTEN.values()):
        return ""
    last = " ".join(line.strip() for line in done.stderr.splitlines()[-12:] if line.strip())
    return f"exit code {done.returncode}: {last}"


def _pnnx() -> Path:
    """The program in pnnx's wheel."""
    spec = importlib.util.find_spec("pnnx")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    return next(path for path in (folder / "pnnx", folder / "pnnx.exe") if path.is_file())


def refuse_unknown(layers: Sequence[Layer], network: Any) -> None:
    """Raise ExportError for layers that ncnn does not have: pnnx passes on what it can't translate."""
    import ncnn

    unknown = [layer.type for layer in layers if ncnn.layer_to_index(layer.type) < 0]
    if not unknown:
        return
    named = [kind for kind in unknown if not kind.startswith("pnnx.")]  # what pnnx could not compute itself, mostly
    raise ExportError(
        f"ncnn has no layer{_where(network, ' '.join(named), ' for ')}",
        code="no-operator",
        got=", ".join(dict.fromkeys(named or unknown)),
        expected="operators of torch that pnnx translates to layers of ncnn",
        remedy="write it with other operators, or choose another runtime",
    )


def _where(network: Any, text: str, before: str) -> str:
    """The operators of a network that a text names, such as "aten::sort", "F.max_pool2d" or "ops.mine.spin(…)"."""
    words = set(re.split(r"[^A-Za-z0-9_]+", text))
    nodes = [n for n in network.graph.nodes if n.op == "call_function" and words & _names(n)]
    return before + " or ".join(site(node) + line(node) for node in nodes[:3]) if nodes else ""


def _names(node: Any) -> set[str]:
    """What pnnx may call an operator: `max_pool2d_with_indices` is `max_pool2d` there, and `linalg_inv` `inv`."""
    name = operator_name(node)
    return {name, name.removeprefix("_"), name.removesuffix("_with_indices"), name.removeprefix("linalg_")}


def batches(text: str, inputs: Sequence[Port]) -> str:
    """The axis of the batch of every input as a setting, as pnnx tells it in its example; "-" where ncnn sees none."""
    told = dict(re.findall(r'ex\.input\("in(\d+)", ncnn\.Mat\(in\d+\.numpy\(\), batch_index=(\d+)\)', text))
    axes = [told.get(str(i), str(NO_BATCH)) for i in range(len(inputs))]
    return ",".join("-" if axis == str(NO_BATCH) else axis for axis in axes)
