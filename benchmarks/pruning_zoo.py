"""Structured pruning over a zoo of networks, compared with Torch-Pruning: success, correctness, and parameters left.

Every built-in architecture and several of `transformers` (from a config, random weights), with 30 % of the channels of
every group removed by their L2 norm, except the network's outputs. Each network and tool runs in its own process, with
a limit on time and memory.

Penjing: `prune.Channels(channels=0.7, scope="layer", approximate=True)`. The pruned network is compared with the masked
one in float64 if its forward allows, exported to ONNX Runtime and OpenVINO, and run in both. *Covered* is the share of
prunable output channels of the layers on a list written by hand (all convolutions, linear and embedding layers except
those that produce the outputs).

Torch-Pruning: `BasePruner` with `GroupMagnitudeImportance(p=2)`, `pruning_ratio=0.3`, output layers ignored,
`num_heads` named for attention as its documentation asks, and the modules' own head sizes updated afterwards as in its
examples. It *runs* when the pruned network's forward does.

    python benchmarks/pruning_zoo.py [--only NAME ...] [--out benchmarks/results/pruning_zoo.json]

Finished networks are stored in the JSON; a second call resumes.
"""

import argparse
import importlib.metadata
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
RATIO = 0.3
LIMIT_S, LIMIT_BYTES = 400, 14 << 30

# name → (side of the image or None for tokens, layers that produce the outputs, settings)
PICTURES = {
    "vgg16": (64, ["classifier"], {}),
    "vgg16_small": (32, ["classifier"], {"classes": 10}),
    "resnet20": (32, ["classifier"], {}),
    "resnet56": (32, ["classifier"], {}),
    "resnet18": (64, ["classifier"], {}),
    "resnet50": (64, ["classifier"], {}),
    "resnext50_32x4d": (64, ["classifier"], {}),
    "googlenet": (64, ["classifier"], {}),
    "inception_v3": (96, ["classifier"], {}),
    "mobilenet_v1": (64, ["classifier"], {}),
    "mobilenet_v2": (64, ["classifier"], {}),
    "mobilenet_v3_large": (64, ["classifier"], {}),
    "mobilenet_v3_small": (64, ["classifier"], {}),
    "shufflenet_v2_x0_5": (64, ["classifier"], {}),
    "shufflenet_v2_x1_0": (64, ["classifier"], {}),
    "efficientnet_b0": (64, ["classifier"], {}),
    "efficientnet_lite0": (64, ["classifier"], {}),
    "ghostnet": (64, ["classifier"], {}),
    "mnasnet1_0": (64, ["classifier"], {}),
    "squeezenet1_0": (64, ["classifier"], {}),
    "squeezenet1_1": (64, ["classifier"], {}),
    "densenet121": (64, ["classifier"], {}),
    "densenet201": (64, ["classifier"], {}),
    "vit_tiny": (64, ["classifier"], {"resolution": 64}),
    "vit_base": (64, ["classifier"], {"resolution": 64}),
    "unet": (64, ["classifier"], {}),
}
TOKENS = {"bert_small": ["classifier"], "gpt_tiny": ["head"], "lstm_tagger": ["classifier"]}
TRANSFORMERS = (
    "hf-resnet50", "hf-vit", "hf-deit", "hf-swin", "hf-convnext", "hf-segformer", "hf-regnet", "hf-mobilevit",
    "hf-bert", "hf-distilbert", "hf-roberta", "hf-gpt2", "hf-llama", "hf-t5-encoder",
)  # fmt: skip


def built(name):
    """The network in eval mode with randomized norms, its example, and the layers that produce its outputs."""
    import torch

    torch.manual_seed(0)
    if name.startswith("hf-"):
        model, example, outputs = from_transformers(name)
    else:
        from penjing.architectures import build

        side, outputs, settings = PICTURES[name] if name in PICTURES else (None, TOKENS[name], {})
        model = build(name, **settings)
        example = torch.randn(2, 3, side, side) if side else torch.randint(0, 100, (2, 32))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        for role in ("weight", "bias"):
            tensor = getattr(module, role, None)
            if isinstance(tensor, torch.nn.Parameter) and tensor.dim() == 1:
                with torch.no_grad():
                    tensor.add_(torch.empty_like(tensor).uniform_(-0.2, 0.2))
    return model.eval(), example, outputs


def from_transformers(name):
    """A network of transformers in its usual size, or half of it, with random weights."""
    import torch
    import transformers as t

    images, tokens = torch.randn(2, 3, 64, 64), torch.randint(5, 100, (2, 32))
    small = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "hf-resnet50":
        return t.ResNetForImageClassification(t.ResNetConfig(num_labels=1000)), images, ["classifier.1"]
    if name == "hf-vit":
        config = t.ViTConfig(image_size=64, num_labels=1000)
        return t.ViTForImageClassification(config), images, ["classifier"]
    if name == "hf-deit":
        config = t.DeiTConfig(image_size=64, num_labels=1000, hidden_size=384, num_attention_heads=6,
                              intermediate_size=1536)  # fmt: skip
        return t.DeiTForImageClassification(config), images, ["classifier"]
    if name == "hf-swin":
        model = t.SwinForImageClassification(t.SwinConfig(num_labels=1000))
        return model, torch.randn(2, 3, 224, 224), ["classifier"]
    if name == "hf-convnext":
        return t.ConvNextForImageClassification(t.ConvNextConfig(num_labels=1000)), images, ["classifier"]
    if name == "hf-segformer":
        return t.SegformerForImageClassification(t.SegformerConfig(num_labels=1000)), images, ["classifier"]
    if name == "hf-regnet":
        return t.RegNetForImageClassification(t.RegNetConfig(num_labels=1000)), images, ["classifier.1"]
    if name == "hf-mobilevit":
        config = t.MobileViTConfig(image_size=64, num_labels=1000)
        return t.MobileViTForImageClassification(config), images, ["classifier"]
    if name == "hf-bert":
        return t.BertForSequenceClassification(t.BertConfig(**small)), tokens, ["classifier"]
    if name == "hf-distilbert":
        config = t.DistilBertConfig(vocab_size=1000)
        return t.DistilBertForSequenceClassification(config), tokens, ["classifier"]
    if name == "hf-roberta":
        config = t.RobertaConfig(**small, num_hidden_layers=6)
        return t.RobertaForSequenceClassification(config), tokens, ["classifier.out_proj"]
    if name == "hf-gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(**small, use_cache=False)), tokens, ["lm_head"]
    if name == "hf-llama":
        config = t.LlamaConfig(**small, hidden_size=512, intermediate_size=1376, num_hidden_layers=6,
                               num_attention_heads=8, num_key_value_heads=4, use_cache=False)  # fmt: skip
        return t.LlamaForCausalLM(config), tokens, ["lm_head"]
    config = t.T5Config(vocab_size=1000, use_cache=False)
    return t.T5EncoderModel(config), tokens, ["shared", "encoder.embed_tokens", *_last_of_t5(6)]


def _last_of_t5(layers):
    """The encoder's residual width is its output."""
    ends = [f"encoder.block.{i}.layer.0.SelfAttention.o" for i in range(layers)]
    return ends + [f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(layers)]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def penjing(name, folder):
    """Prune with Penjing; return all figures of its columns."""
    import torch

    from penjing.analyze.coupling import couple
    from penjing.measure import peak_memory_bytes, reset_peak
    from penjing.network.capture import capture_network
    from penjing.pipeline.building import build as export
    from penjing.prune import Channels
    from penjing.prune.channels import disagreement, remove
    from penjing.records.manifest import read_manifest
    from penjing.runtimes import open_artifact
    from penjing.runtimes.artifact import predictor
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context
    from penjing.tasks.outputs import flatten_outputs
    from penjing.tasks.task import Task

    model, example, outputs = built(name)
    task = Task(example=example)
    start = time.perf_counter()
    network = capture_network(model, (example,))
    figures = {"raise_s": time.perf_counter() - start, "parameters_before": parameters(network)}
    reset_peak()
    before, start = peak_memory_bytes(), time.perf_counter()
    coupling = couple(network, task.call())
    figures["couple_s"] = time.perf_counter() - start
    figures["couple_bytes"] = peak_memory_bytes() - before
    figures["covered"], figures["missed"] = covered(model, coupling, outputs)
    figures["channels_before"] = channels(model, outputs)
    step = Channels(channels=1 - RATIO, scope="layer", criterion="l2", approximate=True, round_to=1, min_keep=0)
    start = time.perf_counter()
    ranking = step.ranking(network, coupling, Context(task=task))
    removed = step._chosen(Draft(network), ranking, Context(task=task))
    pruned = remove(Draft(network), coupling, removed)
    figures["prune_s"] = time.perf_counter() - start
    figures["parameters"] = parameters(pruned.network)
    figures["units"] = [sum(map(len, removed.values())), sum(coupling.groups[n].units for n in ranking.most)]
    figures["disagreement"] = disagreement(network, pruned.network, coupling, removed, task.call())
    try:
        wide = torch.randn_like(example, dtype=torch.float64) if example.is_floating_point() else example
        call = ((wide,), {})
        figures["disagreement_fp64"] = disagreement(network.double(), pruned.network.double(), coupling, removed, call)
    except RuntimeError as error:  # a forward that creates float32 tensors itself
        figures["disagreement_fp64"] = str(error)[:80]
    pruned.network.float()
    with torch.no_grad():
        leaves, structure = flatten_outputs(pruned.network(example))
    for runtime in ("onnxruntime", "openvino"):
        where = folder / runtime
        where.mkdir()
        export(pruned, runtime, "fp32", task, structure, where)
        answer = predictor(open_artifact(where, THREADS), read_manifest(where))(example.numpy())
        got, _ = flatten_outputs(answer)
        scale = max(float(x.abs().max()) for x in leaves)
        figures[runtime] = max(float(abs(a.numpy() - b).max()) for a, b in zip(leaves, got, strict=True)) / scale
    return figures


def covered(model, coupling, outputs):
    """Share of the listed layers' output channels that are in a group, and the layers that are only partly covered."""
    free = {}
    for group in coupling.groups.values():
        for member in group.members:
            if member.role in ("its outputs", "its channels"):
                free.setdefault((member.tensor, member.axis), set()).update(member.positions.tolist())
    every, mine, missed, seen = 0, 0, [], set()
    for layer, axis in listed(model, outputs).items():
        weight = model.get_submodule(layer).weight
        if id(weight) not in seen:
            seen.add(id(weight))
            here = max((len(free.get((n, axis), ())) for n in names_of(model, weight)), default=0)
            every, mine = every + weight.shape[axis], mine + here
            if here < weight.shape[axis]:
                missed.append(layer)
    return mine / every, missed


def listed(model, outputs):
    """Layers with channels → the axis of their outputs, except those that produce the network's outputs."""
    import torch

    transposed = torch.nn.modules.conv._ConvTransposeNd
    axes = {}
    for layer, module in model.named_modules():
        if any(layer == o or layer.startswith(f"{o}.") for o in outputs):
            continue
        if isinstance(module, transposed | torch.nn.Embedding) or type(module).__name__ == "Conv1D":
            axes[layer] = 1
        elif isinstance(module, torch.nn.Linear | torch.nn.modules.conv._ConvNd):
            axes[layer] = 0
    return axes


def names_of(model, weight):
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]


def channels(model, outputs):
    """Output channels of the listed layers."""
    return sum(model.get_submodule(layer).weight.shape[axis] for layer, axis in listed(model, outputs).items())


def torch_pruning(name, folder):
    """Prune with Torch-Pruning as documented."""
    import torch
    import torch_pruning as tp

    model, example, outputs = built(name)
    figures = {"parameters_before": parameters(model), "channels_before": channels(model, outputs)}
    modules = dict(model.named_modules())
    attention = attention_layers(model)
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=[modules[o] for o in outputs if o in modules],
        num_heads={layer: heads for layer, (heads, _) in attention.items()},
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=RATIO,
        output_transform=first_tensor,
    )
    pruner.step()
    for layer, (_, owner) in attention.items():
        resize_heads(owner, layer, pruner.num_heads[layer])
    figures["prune_s"] = time.perf_counter() - start
    figures["parameters"] = parameters(model)
    figures["channels"] = channels(model, outputs)
    with torch.no_grad():
        answer = first_tensor(model(example))
    figures["runs"] = bool(torch.isfinite(answer).all())
    return figures


def first_tensor(output):
    import torch

    if isinstance(output, torch.Tensor):
        return output
    for key in ("logits", "last_hidden_state"):
        if hasattr(output, key):
            return getattr(output, key)
    return output[0]


def attention_layers(model):
    """Projections of attention → (heads, the module that reshapes them): what its documentation calls `num_heads`."""
    projections = {}
    for module in model.modules():
        words = ("num_attention_heads", "num_heads", "n_heads", "heads")
        heads = next((getattr(module, word) for word in words if hasattr(module, word)), None)
        if heads is None and hasattr(module, "config") and hasattr(module, "q_proj"):
            heads = module.config.num_attention_heads
        if not isinstance(heads, int):
            continue
        for name in ("query", "key", "value", "qkv", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin",
                     "q", "k", "v", "c_attn"):  # fmt: skip
            layer = getattr(module, name, None)
            if layer is not None and hasattr(layer, "weight"):
                projections[layer] = (heads, module)
    return projections


def resize_heads(owner, layer, heads):
    """Update the sizes that transformers modules store next to their weights, as in Torch-Pruning's examples."""
    import torch

    width = layer.out_features if isinstance(layer, torch.nn.Linear) else layer.nf
    for name in ("num_attention_heads", "num_heads", "n_heads", "heads"):
        if isinstance(getattr(owner, name, None), int):
            setattr(owner, name, heads)
    for name in ("all_head_size", "inner_dim"):
        if isinstance(getattr(owner, name, None), int):
            setattr(owner, name, width)


def child(side, name, folder):
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)
    figures = (penjing if side == "penjing" else torch_pruning)(name, folder)
    (folder / "result.json").write_text(json.dumps(figures))


def measured(side, name):
    with tempfile.TemporaryDirectory() as aside:
        command = [sys.executable, __file__, "--child", side, name, aside]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return {"error": f"not done in {LIMIT_S} s"}
        path = Path(aside) / "result.json"
        if path.exists():
            return json.loads(path.read_text())
        lines = [line for line in done.stderr.strip().splitlines() if line.strip() and not line.startswith("  ")]
        return {"error": lines[-1][:200] if lines else f"ended with {done.returncode}"}


def shown(name, row):
    mine, theirs = row["penjing"], row["torch-pruning"]
    if "error" in mine:
        left = f"FAILED {mine['error'][:60]}"
    else:
        worst = mine["disagreement_fp64"]
        worst = worst if isinstance(worst, float) else mine["disagreement"]
        share = mine["parameters"] / mine["parameters_before"]
        left = (
            f"{share:6.1%} left, covered {mine['covered']:6.1%}, masked {worst:.0e}, ORT {mine['onnxruntime']:.0e}, "
            f"OV {mine['openvino']:.0e}, couple {mine['couple_s']:.1f} s"
        )
    right = theirs.get("error", "")[:50]
    if not right:
        share = theirs["parameters"] / theirs["parameters_before"]
        channel_share = theirs["channels"] / theirs["channels_before"]
        right = f"{share:6.1%} left, channels {channel_share:.1%}{'' if theirs['runs'] else ', NOT FINITE'}"
    return f"{name:20s} {left} | {right}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "pruning_zoo.json")
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.child[1], Path(arguments.child[2]))
        return
    from penjing import measure

    data = {"networks": {}}
    if arguments.out.exists():
        data |= json.loads(arguments.out.read_text())
    data |= {"machine": vars(measure.machine(THREADS)), "ratio": RATIO}
    data["versions"] = measure.versions() | {
        name: importlib.metadata.version(name) for name in ("torch-pruning", "transformers")
    }
    for name in arguments.only or [*PICTURES, *TOKENS, *TRANSFORMERS]:
        if name not in data["networks"] or arguments.only:
            data["networks"][name] = {side: measured(side, name) for side in ("penjing", "torch-pruning")}
            arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
        print(shown(name, data["networks"][name]), flush=True)
    rows = data["networks"].values()
    fine = [r["penjing"] for r in rows if "error" not in r["penjing"]]
    print(f"\npenjing: {len(fine)} of {len(data['networks'])} pruned, run and exported; covered on average "
          f"{math.fsum(r['covered'] for r in fine) / max(1, len(fine)):.1%}")  # fmt: skip
    theirs = [r["torch-pruning"] for r in rows if "error" not in r["torch-pruning"]]
    print(f"torch-pruning: {len(theirs)} of {len(data['networks'])} pruned and run")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
