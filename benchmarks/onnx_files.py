"""ONNX files of other makers in both runtimes: fp32 parity, INT8 noise and latency, beside two peers on the same files.

Silero's voice activity detector three ways (real speech; the states are those of the file itself), the detector of
ddddocr (cut-out pictures pasted on backgrounds) and its text reader (rendered letters). Every method calibrates on the
same samples; noise is measured on others, as the power of what ONNX Runtime says of the file itself over the power of
the difference, for every output. Peers: `onnxruntime.quantization` (static, QDQ, prepared by `quant_pre_process`) and
NNCF with its defaults.

    python benchmarks/onnx_files.py [--only FILE ...] [--threads 2] [--seconds 2] [--folder DIR]

A contestant that is already in --folder is not built again, so that a run that was stopped goes on; empty the folder
after a change of the code. Results are written after every file, and those of files that are not in --only are kept.
Peers have to be on the path (PYTHONPATH).
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
RATE, CHUNK, CONTEXT = 16000, 512, 64  # of Silero's detector: samples a second, new ones a call, old ones before them
WHEELS = {
    ("silero-vad", "6.2.3"): "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
    ("ddddocr", "1.6.1"): "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935",
}
SPEECH = "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0"  # pocketsphinx-testdata 0.8+5prealpha+1-15
SILERO = ("silero-vad", "6.2.3", "silero_vad/data")
DDDDOCR = ("ddddocr", "1.6.1", "ddddocr")
FILES = {
    "silero_vad": SILERO,
    "silero_vad_16k_op15": SILERO,
    "silero_vad_op18_ifless": SILERO,
    "common_det": DDDDOCR,
    "common": DDDDOCR,
}
FIXED = {"sr": RATE}  # inputs that choose a branch: our source is the file without them
CONTESTANTS = {
    **{f"penjing {runtime} fp32": (runtime, "fp32") for runtime in ("onnxruntime", "openvino")},
    **{f"penjing {runtime} int8": (runtime, "Static") for runtime in ("onnxruntime", "openvino")},
    **{f"penjing {runtime} int8 rounded": (runtime, "rounded") for runtime in ("onnxruntime", "openvino")},
    "onnxruntime.quantization": ("ort", "int8"),
    "nncf": ("nncf", "int8"),
    "onnxruntime, the file itself": ("ort", "fp32"),
}
RECIPES = {
    "fp32": [],
    "Static": [{"quantize.Static": {}}],
    "rounded": [{"quantize.Static": {}}, {"quantize.CoordinateRounding": {}}],
}


def onnx_file(name):
    """The path of a real file, downloaded once."""
    from examples import data

    package, version, folder = FILES[name]
    data.WHEELS |= WHEELS
    return data._unpacked_wheel(package, version) / folder / f"{name}.onnx"


def samples(name, session):
    """For calibration and for measurement: dicts of one sample by the names of the file's inputs."""
    if name.startswith("silero"):
        return speech(session)
    return pictures() if name == "common_det" else letters()


def speech(session):
    """Chunks of real recordings with the states that the file itself comes to; the recordings of both parts differ."""
    import numpy as np

    from examples import data

    def fetch(scratch):
        package = data._debian_package("pocketsphinx-testdata", scratch)
        data._check(package, SPEECH)
        return data._unpacked_debian_package(package, scratch)

    parts = [], []
    for count, path in enumerate(sorted(data._cached("pocketsphinx-testdata", fetch).rglob("*.wav"))):
        with wave.open(str(path)) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
        state = np.zeros((2, 1, 128), np.float32)
        for start in range(CONTEXT, min(len(sound), 20 * RATE) - CHUNK, CHUNK):
            chunk = sound[None, start - CONTEXT : start + CHUNK]
            sample = {"input": chunk, "state": state, "sr": np.array(RATE)}
            parts[count % 2].append(sample)
            state = session.run(["stateN"], sample)[0]
    return [thinned(part, 300) for part in parts]


def thinned(rows, count):
    """So many of a list, evenly spread."""
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]


def pictures():
    """Pictures (1, 3, 416, 416) of values 0 to 255: three cut-outs each, pasted at random on a smooth background."""
    import numpy as np
    from PIL import Image

    from examples import data

    paths, draw, parts = data.pictures(), np.random.default_rng(0), ([], [])
    for part, chosen in zip(parts, (paths[::2], paths[1::2]), strict=True):
        for _ in range(32):
            corners = draw.integers(0, 255, (2, 2, 3), dtype=np.uint8)
            image = Image.fromarray(corners).resize((416, 416), Image.Resampling.BILINEAR)
            for i in draw.choice(len(chosen), 3, replace=False):
                with Image.open(chosen[i]) as cut:
                    cut = cut.convert("RGBA")
                    cut.thumbnail((int(draw.integers(60, 200)),) * 2)
                place = draw.integers(0, 416 - max(cut.size), 2)
                image.paste(cut, tuple(map(int, place)), cut)
            part.append({"images": np.asarray(image, np.float32)[..., ::-1].transpose(2, 0, 1)[None].copy()})
    return parts


def letters():
    """Rendered letters and digits, (1, 1, 64, 160) of values -1 to 1."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    draw, parts = np.random.default_rng(0), ([], [])
    words = "abcdefghjkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
    for part in parts:
        for _ in range(48):
            image = Image.new("L", (160, 64), int(draw.integers(180, 255)))
            pen = ImageDraw.Draw(image)
            for place in range(int(draw.integers(3, 6))):
                font = ImageFont.load_default(int(draw.integers(28, 44)))
                at = (4 + 30 * place + int(draw.integers(0, 6)), int(draw.integers(2, 18)))
                pen.text(at, words[draw.integers(len(words))], int(draw.integers(0, 90)), font)
            noisy = np.asarray(image, np.float32) + draw.normal(0, 4, (64, 160)).astype(np.float32)
            part.append({"input1": ((noisy / 255 - 0.5) / 0.5)[None, None]})
    return parts


def file_session(path, threads=THREADS):
    """ONNX Runtime on a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def make(name, contestant, folder):
    """Write a contestant's files and `made.json` with its seconds into `folder`."""
    import torch

    torch.set_num_threads(THREADS)
    path = onnx_file(name)
    calibration, _ = samples(name, file_session(path))
    kind, precision = CONTESTANTS[contestant]
    start = time.perf_counter()
    if kind == "ort" and precision == "fp32":
        (folder / "model.onnx").write_bytes(path.read_bytes())
    elif kind == "ort":
        by_onnxruntime(path, calibration, folder)
    elif kind == "nncf":
        import nncf
        import openvino

        # Its reader has to know the shapes of some of these files.
        model = openvino.convert_model(str(path), input={word: list(x.shape) for word, x in calibration[0].items()})
        quantized = nncf.quantize(model, nncf.Dataset(calibration), subset_size=len(calibration))
        openvino.save_model(quantized, str(folder / "model.xml"), compress_to_fp16=False)
    else:
        by_penjing(path, calibration, kind, precision, folder)
    (folder / "made.json").write_text(json.dumps({"seconds": time.perf_counter() - start}))


def by_onnxruntime(path, calibration, folder):
    """As its documentation recommends: prepared, static, QDQ, one scale a channel."""
    import onnx
    import onnx.version_converter
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rows = iter(calibration)

        def get_next(self):
            return next(self.rows, None)

    ready = folder / "ready.onnx"
    model = onnx.load(path)
    if model.opset_import[0].version < 13:  # the first with one scale a channel
        onnx.save(onnx.version_converter.convert_version(model, 13), ready)
        path = ready
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready), str(folder / "model.onnx"), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def by_penjing(path, calibration, runtime, precision, folder):
    """The file as a source; its axes as it declares them."""
    import torch

    import penjing as pj
    from penjing import measure, runtimes
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.recipes.recipe import Recipe
    from penjing.sources.onnx import open_network
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context
    from penjing.tasks.outputs import flatten_outputs

    fixed = {name: value for name, value in FIXED.items() if name in calibration[0]}
    network, _, dynamic = open_network(path, **fixed)
    names = list(network.inputs.values())
    dynamic = {i: {a: w for a, w in axes.items() if w == "batch"} for i, axes in dynamic.items()}
    dynamic = {i: axes for i, axes in dynamic.items() if axes}
    batch = 10 if dynamic else 1
    batches = []
    for start in range(0, len(calibration) - batch + 1, batch):
        rows = calibration[start : start + batch]
        parts = [[torch.from_numpy(row[name]) for row in rows] for name in names]
        batches.append(tuple(torch.cat(p, next(iter(dynamic.get(i, {0: ""})))) for i, p in enumerate(parts)))
    task = pj.Task(example=batches[0], calibration=batches, dynamic=dynamic)
    captured = capture_network(network, *task.call(), task.dynamic)
    draft = Draft(captured)
    if RECIPES[precision]:
        capabilities = runtimes.get(runtime).capabilities(measure.machine(THREADS).instruction_sets)
        context = Context(task=task, capabilities=capabilities, source=captured, events=lambda *_, **__: None)
        for step in Recipe.from_data(RECIPES[precision]):
            draft = step(draft, context)
    with torch.no_grad():
        structure = flatten_outputs(captured(*batches[0]))[1]
    form = "int8" if RECIPES[precision] else precision
    manifest = building.build(draft, runtime, form, task, structure, folder)
    _, integer, floating = building.executed_rows(draft.network, draft.plan, task.call(), manifest, folder)
    (folder / "executed.json").write_text(json.dumps({"int8": integer, "float": floating}))


class Session:
    """A contestant: `run(list of arrays)` in the order of the file's inputs, `names`."""

    def __init__(self, folder, threads):
        self.folder = Path(folder)
        self.kind, _ = CONTESTANTS[self.folder.name]
        if self.kind == "ort":
            self.session = file_session(self.folder / "model.onnx", threads)
            self.names = [port.name for port in self.session.get_inputs()]
        elif self.kind == "nncf":
            import openvino

            settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads),
                        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}  # fmt: skip
            compiled = openvino.Core().compile_model(str(self.folder / "model.xml"), "CPU", settings)
            self.session = compiled.create_infer_request()
            self.names = [port.any_name for port in compiled.inputs]
        else:
            from penjing.records.manifest import read_manifest
            from penjing.runtimes import open_artifact

            self.session = open_artifact(self.folder, threads)
            self.names = [port.name for port in read_manifest(self.folder).programs[0].inputs]

    def run(self, inputs):
        """The outputs in the order of the file."""
        if self.kind == "ort":
            return self.session.run(None, dict(zip(self.names, inputs, strict=True)))
        if self.kind == "nncf":
            results = self.session.infer(dict(zip(self.names, inputs, strict=True)))
            return [results[i].copy() for i in range(len(results))]
        return self.session.run(inputs)


def open_folder(folder, threads):
    """Open a contestant, for the latency workers."""
    return Session(folder, threads)


def judge(name, folder):
    """Noise of every output, and the largest difference relative to the largest value, on samples of their own."""
    import numpy as np

    session, source = Session(folder, THREADS), file_session(onnx_file(name))
    _, test = samples(name, source)
    signal, noise, most, largest, same = {}, {}, 0.0, 0.0, []
    for sample in test:
        right = source.run(None, sample)
        outputs = session.run([sample[word] for word in session.names])
        for i, (output, expected) in enumerate(zip(outputs, right, strict=True)):
            difference = output.astype(np.float64).reshape(expected.shape) - expected
            signal[i] = signal.get(i, 0.0) + float((expected.astype(np.float64) ** 2).sum())
            noise[i] = noise.get(i, 0.0) + float((difference**2).sum())
            most, largest = max(most, float(np.abs(difference).max())), max(largest, float(np.abs(expected).max()))
        same.append(answers(name, outputs[0].reshape(right[0].shape), right[0]))
    ratios = [float(10 * np.log10(signal[i] / max(noise[i], 1e-30))) for i in signal]
    return {"snr_db": ratios, "relative_difference": most / largest, "agreement": float(np.mean(same))}


def answers(name, output, expected):
    """Share of equal answers: speech or not; the same cells of the detector above 0.1; characters."""
    import numpy as np

    if name.startswith("silero"):
        return float(((output > 0.5) == (expected > 0.5)).mean())
    if name == "common_det":
        one, other = (np.flatnonzero(value[0, :, 4] * value[0, :, 5] > 0.1) for value in (output, expected))
        return len(np.intersect1d(one, other)) / max(len(np.union1d(one, other)), 1) if len(other) else 1.0
    return float((output.argmax(-1) == expected.argmax(-1)).mean())


def built(name, contestant, folder):
    """What was measured of a contestant, or why it could not be built."""
    if not (folder / "judged.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--make", name, contestant, "--folder", str(folder)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            return {"error": " ".join(done.stderr[-400:].split())}
        try:
            (folder / "judged.json").write_text(json.dumps(judge(name, folder)))
        except Exception as error:  # a peer's file that its runtime does not open
            return {"error": " ".join(str(error).split())[-400:]}
    row = {}
    for part in ("judged", "made", "executed"):
        if (folder / f"{part}.json").exists():
            row |= json.loads((folder / f"{part}.json").read_text())
    return row


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "penjing-onnx-files")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/onnx_files.json")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(*arguments.make, arguments.folder)
        return
    from penjing.measure import Target, compare, machine, versions

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    known_versions = versions() | {"nncf": importlib.metadata.version("nncf")}
    data = {"machine": vars(machine(arguments.threads)), "versions": known_versions, "recipes": RECIPES, "files": {}}
    if arguments.out.exists() and set(arguments.only) < set(FILES):
        data["files"] = json.loads(arguments.out.read_text())["files"]
    for name in arguments.only:
        rows, targets = {}, []
        first = samples(name, file_session(onnx_file(name)))[1][0]
        for contestant in CONTESTANTS:
            folder = arguments.folder / name / contestant
            rows[contestant] = row = built(name, contestant, folder)
            if "error" not in row:
                inputs = [first[word] for word in Session(folder, arguments.threads).names]
                targets.append(Target(contestant, folder, inputs, 1))
        timings = compare(
            targets, threads=arguments.threads, seconds=arguments.seconds, opener="onnx_files:open_folder"
        )
        print(
            f"\n{name}\n  {'':<34}{'noise of each output, dB':<28}{'difference':>11}{'same':>7}{'ms':>9}{'spread':>8}"
        )
        for contestant, row in rows.items():
            if "error" in row:
                print(f"  {contestant:<34}{row['error'][-150:]}")
                continue
            latency = timings[contestant].latency
            row["latency_ms"] = vars(latency)
            noises = " ".join(f"{value:.1f}" for value in row["snr_db"])
            print(
                f"  {contestant:<34}{noises:<28}{row['relative_difference']:>11.1e}{row['agreement']:>7.3f}"
                f"{latency.median:>9.2f}{latency.spread:>8.0%}  {row.get('int8') or ''}",
                flush=True,
            )
        data["files"] = {known: rows if known == name else data["files"][known]
                         for known in FILES if known in {*data["files"], name}}  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
