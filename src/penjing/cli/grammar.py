"""The grammar of the command line: commands, their options, and the texts of `--help`."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from penjing import __version__
from penjing.cli import values

SOURCE_HELP = (
    "file.py:factory, package.module:factory, a .pt2, .onnx or .keras file, a Hugging Face folder, or a built-in name"
)
CALIBRATION_HELP = (
    "inputs without labels: a folder of images, an .npy or .npz file, file.py:batches, or a TASK; a few hundred samples"
)
TASK_HELP = "file.py:task, package.module:task, a folder of images by class, or an .npz file"


def parser(run: Mapping[str, Callable[..., int]]) -> argparse.ArgumentParser:
    """The command line parser; `run` maps each command to the function that it calls."""
    grammar = argparse.ArgumentParser(
        prog="penjing",
        description="Makes a trained network small and fast, and proves that it is still the network you had.",
        epilog="Exit codes: 0 done and goal met, 1 error, 2 usage, 3 finished but goal not met.",
    )
    grammar.add_argument("--version", action="version", version=f"penjing {__version__}")
    commands = grammar.add_subparsers(required=True, metavar="COMMAND")
    for row in _COMMANDS:
        command = commands.add_parser(
            row.name,
            help=row.help,
            description=row.help,
            epilog="example:\n" + textwrap.indent(row.example, "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=run[row.name])
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        row.add_options(command)
    return grammar


@dataclass(frozen=True)
class _Command:
    """One command: its help, an example, and the function that adds its options."""

    name: str
    help: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]


def _source(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    _weights(command, "the SOURCE's weights")


def _weights(command: argparse._ActionsContainer, what: str) -> None:
    command.add_argument(
        "--weights",
        metavar="FILE",
        help=f"{what}: a .safetensors file, a state dict written by torch.save, or the index of several files; "
        "FILE:key takes the state dict below that key",
    )
    command.add_argument(
        "--ignore-weights",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names in --weights that the network need not have; repeatable",
    )


def _compress(command: argparse.ArgumentParser) -> None:
    _source(command)
    command.add_argument("--task", required=True, metavar="TASK", help=TASK_HELP)
    command.add_argument(
        "--goal",
        help="limits and an objective; drop is the loss of the metric in its own unit (1%% = 0.01), "
        "relative_drop is relative to the source's metric "
        "(default: minimize latency_ms, drop<=1%%; with --target: minimize size_bytes, drop<=1%%)",
    )
    command.add_argument(
        "--runtime",
        metavar="NAMES",
        help="for example openvino or onnxruntime,litert; all: every installed one; auto: the one that the source is "
        "fastest in (default: those that `penjing runtimes` shows without a star)",
    )
    _targeting(command)
    command.add_argument(
        "--recipe",
        metavar="R.yaml",
        help="a YAML file of steps, or a built-in recipe: joint or label-free (pruned, trained, quantized) "
        "(default: post-training static quantization; not with --minutes or --trials)",
    )
    command.add_argument(
        "--minutes",
        type=values.minutes,
        metavar="N",
        help="search for recipes: the artifact is there within a fifth more",
    )
    command.add_argument("--trials", type=values.positive, metavar="N", help="search until so many recipes were tried")
    command.add_argument(
        "--study", metavar="URL", help="the database for a search's study, e.g. postgresql://… (default: in --out)"
    )
    command.add_argument(
        "--cluster", metavar="auto|ADDRESS", help="run a search's trials on Ray: started here, or a running cluster"
    )
    command.add_argument("--out", default="runs/compress", metavar="DIR", help="the run folder (default: %(default)s)")
    command.add_argument("--resume", action="store_true", help="resume the run in --out")
    command.add_argument("--force", action="store_true", help="replace the run in --out")
    command.add_argument(
        "--log",
        action="append",
        default=[],
        metavar="KIND:PLACE",
        help="watch the run from outside: mlflow:URI, tensorboard:DIR or wandb:PROJECT; repeatable",
    )
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument(
        "--batch", type=values.positive, default=1, help="samples per timed call (default: %(default)s)"
    )
    command.add_argument("--device", default="cpu", help="device for training steps (default: %(default)s)")
    _excluding(command)
    _timing(command, 1.0)


def _inspect(command: argparse.ArgumentParser) -> None:
    _source(command)
    command.add_argument("--task", metavar="TASK", help=TASK_HELP)
    command.add_argument("--shape", type=values.shape, metavar="C,H,W", help="shape of one sample, instead of a task")
    command.add_argument("--group", metavar="NAME", help="show everything coupled with the channels of this layer")
    command.add_argument("--picture", metavar="FILE.svg", help="with --group or --sensitivity: write an image")
    command.add_argument(
        "--sensitivity", metavar="FILE.json", help="prune each group alone and show the loss; needs --task"
    )
    command.add_argument(
        "--noise", metavar="RUNTIME", help="quantize for this runtime and show the noise of each operator; needs --task"
    )
    command.add_argument(
        "--runtime",
        action="append",
        default=[],
        metavar="NAMES",
        help="export for these runtimes, open and run there, and tell which operators they can't take; "
        "all: those that are installed",
    )
    _targeting(command)
    command.add_argument(
        "--save-failing",
        metavar="FILE",
        help="write the smallest part of the network that a runtime can't take (.onnx, or .pt2 without an ONNX form)",
    )


def _quantize(command: argparse.ArgumentParser) -> None:
    _source(command)
    command.add_argument("--calibration", required=True, metavar="DATA", help=CALIBRATION_HELP)
    command.add_argument(
        "--out", required=True, metavar="FILE", help="small.onnx for ONNX Runtime, small.xml for OpenVINO"
    )
    command.add_argument("--runtime", metavar="NAME", help="the runtime, where the suffix of --out does not tell it")
    command.add_argument(
        "--fast", action="store_true", help="correct biases instead of searching the rounding of every weight"
    )
    _excluding(command)
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--threads", type=values.positive, help="threads to use (default: every core)")
    command.add_argument("--force", action="store_true", help="replace the file")


def _targeting(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--target",
        metavar="NAME",
        help="a device other than this machine: one of `penjing targets`, or a profile of your own (mine.yaml)",
    )


def _targets(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", nargs="?", metavar="NAME", help="show this profile, or a file mine.yaml")
    command.add_argument("--yaml", action="store_true", help="print the profile's file, to start your own from")


def _excluding(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep matching operators in floating point; repeatable",
    )


def _measure(command: argparse.ArgumentParser) -> None:
    command.add_argument("artifact", metavar="ARTIFACT", help="a run folder or an artifact folder")
    command.add_argument(
        "--against", metavar="OTHER", help="another artifact, or a SOURCE (default: the run's own source)"
    )
    _weights(command, "weights of the SOURCE in --against")
    command.add_argument("--task", metavar="TASK", help=TASK_HELP + "; measures the metric too")
    command.add_argument(
        "--batch", type=values.positive, default=1, help="samples per timed call (default: %(default)s)"
    )
    _timing(command, 2.0)


def _verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="a run folder")
    command.add_argument("--task", metavar="TASK", help=TASK_HELP + "; checks the metric too")
    _timing(command, 2.0)


def _compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, two or more")
    command.add_argument("--picture", metavar="FILE.svg", help="write the Pareto picture of all candidates")
    command.add_argument("--html", metavar="FILE.html", help="write everything as one self-contained page")


def _pack(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source",
        metavar="FOLDER",
        help="a run folder, an artifact, a checkpoint, or one file; with a limit a SOURCE: file.py:factory, "
        "package.module:factory, a .pt2, .onnx or .keras file, or an artifact for ONNX Runtime in fp32",
    )
    command.add_argument("-o", "--out", required=True, metavar="FILE.pj", help="the file to write")
    command.add_argument("--threads", type=values.positive, help="threads to use (default: every core)")
    command.add_argument("--force", action="store_true", help="replace the file")
    command.add_argument("--checkpoint", action="store_true", help="a run's trainable checkpoint, not its artifact")
    command.add_argument("--picture", metavar="FILE.svg", help="write an image of what every tensor takes")
    lossy = command.add_argument_group(
        "with loss", "weights become whole numbers of a step, as coarse as all limits allow; needs --calibration"
    )
    lossy.add_argument(
        "--noise", type=values.decibels, metavar="DB", help="for example 25dB: signal over noise of the outputs"
    )
    lossy.add_argument(
        "--agreement", type=values.share, metavar="SHARE", help="for example 97%%: samples in the same class"
    )
    lossy.add_argument(
        "--drop", type=values.share, metavar="LOSS", help="for example 0.5%%: of the metric, by the select of a TASK"
    )
    lossy.add_argument("--calibration", metavar="DATA", help=CALIBRATION_HELP)
    lossy.add_argument(
        "--keep", action="append", default=[], metavar="LAYER", help="leave its weights as they are; repeatable"
    )
    _weights(lossy, "the SOURCE's weights")
    lossy.add_argument("--seed", type=int, help="default: 0")


def _unpack(command: argparse.ArgumentParser) -> None:
    command.add_argument("packed", metavar="FILE.pj", help="what `penjing pack` wrote")
    command.add_argument("-o", "--out", required=True, metavar="DIR", help="a new or empty folder")
    command.add_argument("--threads", type=values.positive, help="threads to use (default: every core)")


def _delta(command: argparse.ArgumentParser) -> None:
    what = "a run folder, an artifact, a checkpoint, one file, or a packed file"
    command.add_argument("old", metavar="OLD", help=f"the version that is there: {what}")
    command.add_argument("new", metavar="NEW", help="the version that it becomes, of any of these kinds")
    command.add_argument("-o", "--out", required=True, metavar="UPDATE.pjd", help="the file to write")
    command.add_argument("--threads", type=values.positive, help="threads to use (default: every core)")
    command.add_argument("--force", action="store_true", help="replace the file")


def _patch(command: argparse.ArgumentParser) -> None:
    command.add_argument("old", metavar="OLD", help="what the update was made from")
    command.add_argument("update", metavar="UPDATE.pjd", help="what `penjing delta` wrote")
    command.add_argument(
        "-o", "--out", required=True, metavar="NEW", help="the file or folder to write; NEW.pj is written packed"
    )
    command.add_argument("--threads", type=values.positive, help="threads to use (default: every core)")
    command.add_argument("--force", action="store_true", help="replace what is there, which may be OLD")


def _bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="RUN", help="a run folder, or an artifact folder")
    command.add_argument("-o", "--out", required=True, metavar="DIR", help="a new or empty folder")
    command.add_argument("--threads", type=values.positive, help="threads of the runtime there (default: the record's)")
    command.add_argument("--force", action="store_true", help="replace a folder that this command wrote")


def _record(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", choices=["add"], help="add: take what bench.py measured into record and report")
    command.add_argument("run", metavar="RUN", help="the run folder")
    command.add_argument("bench", metavar="bench.json", help="what bench.py wrote on the device")


def _timing(parser: argparse.ArgumentParser, seconds: float) -> None:
    parser.add_argument("--threads", type=values.positive, help="threads of the runtimes (default: every core)")
    parser.add_argument(
        "--seconds", type=values.duration, default=seconds, help="timed seconds per artifact (default: %(default)s)"
    )


_COMMANDS = (
    _Command(
        "compress",
        "Find the smallest or fastest artifact that meets a goal, with the evidence.",
        'penjing compress net.py:trained --task net.py:task --goal "minimize latency_ms, drop<=0.5%" --out runs/first\n'
        'penjing compress net.py:trained --task net.py:task --goal "minimize size_bytes, drop<=1%" --minutes 10\n'
        "penjing compress resnet18 --weights best.pth --task task.py:task --runtime openvino",
        _compress,
    ),
    _Command(
        "inspect",
        "Cost per layer, coupled channels, and what would stay in floating point.",
        "penjing inspect net.py:trained --task net.py:task --noise openvino\n"
        "penjing inspect resnet18 --shape 3,224,224 --group conv1 --picture conv1.svg\n"
        "penjing inspect net.py:trained --task net.py:task --sensitivity scan.json --picture scan.svg\n"
        "penjing inspect net.onnx --runtime all --save-failing part.onnx",
        _inspect,
    ),
    _Command(
        "quantize",
        "The quick way to one INT8 file: nothing is searched or timed, and its parity is told.",
        "penjing quantize net.onnx --calibration pictures/ --out small.onnx\n"
        "penjing quantize net.py:trained --calibration inputs.npy --out small.xml --fast",
        _quantize,
    ),
    _Command(
        "measure",
        "Latency, memory and size of an artifact, side by side with another or with its source.",
        "penjing measure runs/first --task net.py:task\npenjing measure runs/first --against runs/second",
        _measure,
    ),
    _Command(
        "verify",
        "Re-measure the figures of a record on this machine and report which hold.",
        "penjing verify runs/first --task net.py:task",
        _verify,
    ),
    _Command(
        "compare",
        "Several runs side by side: their artifacts, what differs, and what can't be compared.",
        "penjing compare runs/first runs/second\npenjing compare runs/* --html runs.html --picture runs.svg",
        _compare,
    ),
    _Command(
        "pack",
        "One small file of an artifact's or a checkpoint's files, equal to the bit; or of a network, within a limit.",
        "penjing pack runs/first -o first.pj\n"
        "penjing pack net.onnx -o small.pj --noise 25dB --calibration pictures/\n"
        "penjing pack runs/first --checkpoint -o checkpoint.pj --picture bytes.svg",
        _pack,
    ),
    _Command(
        "unpack",
        "The files of a packed network, as they were.",
        "penjing unpack first.pj -o first",
        _unpack,
    ),
    _Command(
        "delta",
        "What changed between two versions of a network, entropy-coded: an update to send.",
        "penjing delta first.onnx second.onnx -o update.pjd\npenjing delta runs/first runs/second -o update.pjd",
        _delta,
    ),
    _Command(
        "patch",
        "The new version of a network from its old one and an update, equal to the bit.",
        "penjing patch first.onnx update.pjd -o second.onnx",
        _patch,
    ),
    _Command(
        "bench",
        "A folder that measures an artifact on the device itself, with Python and the runtime alone.",
        "penjing bench runs/first -o bench",
        _bench,
    ),
    _Command(
        "record",
        "Take what was measured on a device into a run's record and report.",
        "penjing record add runs/first bench.json",
        _record,
    ),
    _Command(
        "runtimes",
        "Which runtimes are installed, and what each accelerates.",
        "penjing runtimes --json",
        lambda command: None,
    ),
    _Command(
        "targets",
        "The devices that artifacts can be made for: formats, operators, limits, and where that is written.",
        "penjing targets\npenjing targets ethos-u55\npenjing targets pi4 --yaml > mine.yaml",
        _targets,
    ),
)
