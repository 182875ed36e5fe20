"""A sentence encoder (all-MiniLM-L6-v2) in INT8: quality and latency, compared with other tools.

The calibration set is 128 texts (20 Newsgroups and Reuters R8, training parts). Measured in the runtimes: the mean
cosine similarity to the fp32 encoder's sentence embeddings on other texts, the accuracy of a logistic regression that
was fitted to fp32 embeddings and applied to each contestant's, and latency at batch 1 and 16 with 128 tokens, side by
side.

Peers use the settings their documentation recommends: ONNX Runtime's dynamic quantization (per channel, after its
pre-processing), NNCF with `ModelType.TRANSFORMER`.

    python benchmarks/minilm_int8.py [--fitted 4000] [--judged 10000] [--folder DIR]
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
TOKENS = 128
SETS = ("20newsgroups", "reuters-r8")
DEFAULT = [
    {"quantize.Static": {"outliers": "mitigate"}},
    {"quantize.CoordinateRounding": {}},
]  # what `compress` does automatically
NO_ADDS = {"exclude": ["*/add#*"]}
CONTESTANTS = {
    "penjing openvino int8": ("openvino", "int8", DEFAULT),
    "penjing onnxruntime int8": ("onnxruntime", "int8", DEFAULT),
    "penjing openvino int8, rest bf16": ("openvino", "int8-bf16", DEFAULT),
    "penjing openvino int8, smooth": ("openvino", "int8", [{"quantize.SmoothQuant": {"alpha": 0.75, "multiply": True}},
                                      {"quantize.Static": NO_ADDS | {"activation_range": "minmax"}},
                                      {"quantize.CoordinateRounding": {}}]),
    "penjing openvino int8, outliers fp32": ("openvino", "int8", [{"quantize.SplitOutliers": {}},
                                             {"quantize.Static": NO_ADDS}, {"quantize.CoordinateRounding": {}}]),
    "penjing onnxruntime dynamic int8": ("onnxruntime", "int8", [{"quantize.Dynamic": {}}]),
    "penjing onnxruntime fp32": ("onnxruntime", "fp32", []),
    "penjing openvino fp32": ("openvino", "fp32", []),
    "penjing openvino bf16": ("openvino", "bf16", []),
    "ort dynamic int8": ("ort", "int8", []),
    "nncf int8": ("nncf", "int8", []),
}  # fmt: skip


def encoder():
    """Tokens to a unit vector: the mean over unmasked tokens."""
    import torch
    from transformers import AutoModel

    from examples import data

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = AutoModel.from_pretrained(data.minilm())

        def forward(self, input_ids, attention_mask):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weights = attention_mask[..., None].to(hidden.dtype)
            return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)

    return Encoder().eval()


def tokens(texts, batch=8):
    """Batches of input_ids and attention_mask, (batch, 128) int64."""
    from transformers import AutoTokenizer

    from examples import data

    tokenizer = AutoTokenizer.from_pretrained(data.minilm())
    settings = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    return [
        {k: v for k, v in tokenizer(texts[i : i + batch], **settings).items() if k != "token_type_ids"}
        for i in range(0, len(texts), batch)
    ]


def labelled(name: str, part: str, count: int):
    """`count` texts evenly spaced over a part of a data set, and their classes."""
    from examples import data

    csv.field_size_limit(10**7)
    texts, classes = data.texts(name)[part]
    step = max(1, len(texts) // count)
    return texts[::step][:count], classes[::step][:count]


def make(name: str, folder: Path) -> None:
    """Write the contestant's files and its seconds into `folder`."""
    import torch

    torch.set_num_threads(THREADS)
    kind, precision, recipe = CONTESTANTS[name]
    calibration = tokens([text for s in SETS for text in labelled(s, "train", 64)[0]])
    axes = {k: {0: "batch", 1: "length"} for k in ("input_ids", "attention_mask")}
    model = encoder()
    start = time.perf_counter()
    if kind in ("ort", "nncf"):
        batch, length = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("length", min=1, max=512)
        source = folder / "fp32.onnx"
        torch.onnx.export(
            model, (), str(source), kwargs=calibration[0], dynamo=True, verbose=False, external_data=False,
            dynamic_shapes={k: {0: batch, 1: length} for k in calibration[0]}, output_names=["output"],
        )  # fmt: skip
        start = time.perf_counter()
        if kind == "ort":
            from onnxruntime.quantization import QuantType, quantize_dynamic
            from onnxruntime.quantization.shape_inference import quant_pre_process

            quant_pre_process(str(source), str(folder / "ready.onnx"), skip_symbolic_shape=True)
            quantize_dynamic(
                str(folder / "ready.onnx"), str(folder / "model.onnx"), per_channel=True, weight_type=QuantType.QInt8
            )
        else:
            import nncf
            import openvino

            rows = [{k: v[i : i + 1].numpy() for k, v in b.items()} for b in calibration for i in range(8)]
            quantized = nncf.quantize(
                openvino.convert_model(str(source)), nncf.Dataset(rows), subset_size=len(rows),
                model_type=nncf.ModelType.TRANSFORMER,
            )  # fmt: skip
            openvino.save_model(quantized, str(folder / "model.xml"), compress_to_fp16=False)
    else:
        from penjing import measure, runtimes
        from penjing.network.capture import capture_network
        from penjing.pipeline import building
        from penjing.recipes.recipe import Recipe
        from penjing.steps.draft import Draft
        from penjing.steps.step import Context
        from penjing.tasks.task import Task

        task = Task(example={k: v[:2] for k, v in calibration[0].items()}, calibration=calibration, dynamic=axes)
        raised = capture_network(model, *task.call(), task.dynamic)
        draft = Draft(raised)
        capabilities = runtimes.get(kind).capabilities(measure.machine(THREADS).instruction_sets)
        for step in Recipe.from_data(recipe):
            draft = step(draft, Context(task=task, capabilities=capabilities, source=raised))
        building.build(draft, kind, precision, task, {"kind": "tensor"}, folder)
    (folder / "made.json").write_text(json.dumps({"seconds": time.perf_counter() - start}))


def open_folder(folder, threads):
    """Open a session that runs [input_ids, attention_mask], for the latency workers."""
    folder = Path(folder)
    kind = CONTESTANTS[folder.name][0]
    if kind not in ("ort", "nncf"):
        from penjing.runtimes import open_artifact

        return open_artifact(folder, threads)

    class Session:
        def __init__(self):
            self.requests = {}
            if kind == "ort":
                import onnxruntime

                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = threads
                self.session = onnxruntime.InferenceSession(
                    str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
                )
                self.names = [i.name for i in self.session.get_inputs()]

        def run(self, inputs):
            if kind == "ort":
                return self.session.run(None, dict(zip(self.names, inputs, strict=True)))
            shape = inputs[0].shape
            if shape not in self.requests:
                import openvino

                core = openvino.Core()
                model = core.read_model(str(folder / "model.xml"))
                model.reshape({port: list(shape) for port in model.inputs})
                settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads),
                            "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}  # fmt: skip
                self.requests[shape] = core.compile_model(model, "CPU", settings).create_infer_request()
            return [self.requests[shape].infer(inputs)[0].copy()]

    return Session()


def vectors(run, texts):
    """Sentence embeddings (texts, 384)."""
    import numpy as np

    return np.concatenate([run([b["input_ids"].numpy(), b["attention_mask"].numpy()])[0] for b in tokens(texts, 8)])


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fitted", type=int, default=4000, help="texts that each logistic regression is fitted to")
    parser.add_argument("--judged", type=int, default=10000, help="at most so many texts of each test part")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "penjing-minilm-int8")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/minilm_int8.json")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--make", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make, arguments.folder)
        return
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    from penjing.measure import Target, compare, machine, versions

    for name in arguments.only:
        folder = arguments.folder / name
        if not (folder / "made.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, "--make", name, "--folder", str(folder)]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-2000:]}")
            print(f"made {name}", flush=True)
    reference = open_folder(arguments.folder / "penjing onnxruntime fp32", THREADS)
    judges, test_sets = {}, {}
    for name in SETS:
        texts, classes = labelled(name, "train", arguments.fitted)
        judges[name] = LogisticRegression(max_iter=1000).fit(vectors(reference.run, texts), classes)
        texts, classes = labelled(name, "test", arguments.judged)
        test_sets[name] = (texts, classes, vectors(reference.run, texts))
    rows = {}
    print(f"\n{'':<36}{'cosine':>8}" + "".join(f"{name:>14}" for name in SETS))
    for name in arguments.only:
        path = (
            arguments.folder / name / f"judged-{arguments.fitted}-{arguments.judged}.json"
        )  # resumes where it stopped
        if not path.exists():
            session = open_folder(arguments.folder / name, THREADS)
            row = {"cosine": {}, "accuracy": {}, "drop": {}}
            for data, (texts, classes, exact) in test_sets.items():
                embeddings = vectors(session.run, texts)
                row["cosine"][data] = float(np.mean((embeddings * exact).sum(1)))
                row["accuracy"][data] = float(judges[data].score(embeddings, classes))
                row["drop"][data] = float(judges[data].score(exact, classes)) - row["accuracy"][data]
            path.write_text(json.dumps(row))
        row = json.loads(path.read_text())
        rows[name] = row | json.loads((arguments.folder / name / "made.json").read_text())
        cosine = np.mean(list(row["cosine"].values()))
        print(f"{name:<36}{cosine:>8.4f}" + "".join(f"{row['drop'][d] * 100:>+13.2f}p" for d in SETS), flush=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    batch = tokens(test_sets[SETS[0]][0][:16], 16)[0]
    for size in (1, 16):
        inputs = [batch["input_ids"][:size].numpy(), batch["attention_mask"][:size].numpy()]
        targets = [Target(n, arguments.folder / n, inputs, size) for n in rows]
        timings = compare(targets, threads=THREADS, seconds=arguments.seconds, opener="minilm_int8:open_folder")
        print(f"\nbatch {size}, {TOKENS} tokens")
        for name in sorted(rows, key=lambda n: timings[n].latency.median):
            latency = timings[name].latency
            rows[name].setdefault("latency_ms", {})[str(size)] = vars(latency)
            print(f"  {name:<36}{latency.median:>8.2f} ms  spread {latency.spread:.0%}", flush=True)
    data = {"machine": vars(machine(THREADS)), "versions": versions(), "judged": arguments.judged, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
