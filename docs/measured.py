"""Write the measured tables of README.md and docs/ from the JSON of the benchmarks: ``python docs/measured.py``.

A table is between ``<!-- measured: NAME -->`` and ``<!-- /measured -->``; no other figure is generated.
"""

import json
import re
import statistics
from collections import Counter
from pathlib import Path

from penjing.records import Latency, from_dict
from penjing.records.steadiness import doubt, speedup
from penjing.report.comparison import gain

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def conditions(machine: dict, versions: dict) -> str:
    """Processor, versions, and threads where they are the same for the whole table, in one line."""
    names = ("torch", "onnxruntime", "openvino", "nncf", "brevitas", "torch-pruning", "tensorly", "transformers")
    shown = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}, " if "threads" in machine else ""
    return f"{machine['processor']}, {threads}{shown}."


def candidates(name: str) -> str:
    """Figures of every candidate of one example network."""
    run = json.loads((RESULTS / "examples.json").read_text(encoding="utf-8"))[name]
    lines = [
        f"| | {run['metric_name']} | latency, median (IQR/median) "
        "| speed-up over torch; over fp32 in the same runtime | size "
        "| smaller than fp32 in the same runtime | peak memory | SNR against the source | integer operators |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {r["name"]: r for r in run["rows"]}
    for r in run["rows"]:
        floor = rows.get(f"{r['name'].partition('-')[0]}-fp32")
        compressed = floor is not None and floor is not r
        speeds = [_faster(before, r) for before in (run["rows"][0], floor) if before is not None and before is not r]
        smaller = f"{gain(floor['size_bytes'], r['size_bytes']):.1f}×" if compressed else ""
        latency = r["latency_ms"]
        snr = "" if r["snr_db"] is None else f"{r['snr_db']:.1f} dB"
        operators = f"{r['integer_operators']} of {r['integer_operators'] + r['float_operators']}"
        lines.append(
            f"| {r['name']} | {r['metric']:.2%} | {latency['median']:.2f} ms ({latency['spread']:.0%}) "
            f"| {'; '.join(speeds)} | {r['size_bytes'] / 1e6:.2f} MB | {smaller} "
            f"| {r['peak_memory_bytes'] / 1e6:.0f} MB | {snr} "
            f"| {'' if r['snr_db'] is None else operators} |"
        )
    return "\n".join([*lines, "", f"Batch 1; {conditions(run['machine'], run['versions'])}"])


def _faster(before: dict, after: dict) -> str:
    """A speed-up as text; "busy" if the timings are unsteady."""
    timings = [from_dict(Latency, row["latency_ms"]) for row in (before, after)]
    return "busy" if doubt(*timings) else f"{speedup(*timings):.1f}×"


def cost() -> str:
    """Time and memory of quantization by Penjing and other tools."""
    data = json.loads((RESULTS / "ptq_cost.json").read_text(encoding="utf-8"))
    sizes = list(next(iter(data["tools"].values()))["cost"])
    head = " | ".join(f"{n} samples" for n in sizes)
    lines = [f"| | {head} | agreement | SNR |", "|---|" + "---|" * (len(sizes) + 2)]
    for tool, row in data["tools"].items():
        cells = [
            f"{row['cost'][n]['seconds']:.1f} s, {row['cost'][n]['peak_memory_bytes'] / 1e9:.2f} GB"
            if n in row["cost"]
            else "not run"
            for n in sizes
        ]
        quality = row["quality"]
        lines.append(f"| {tool} | {' | '.join(cells)} | {quality['agreement']:.3f} | {quality['snr_db']:.1f} dB |")
    stages = data["tools"]["penjing"]["cost"][sizes[-1]].get("stages_s", {})
    spent = ", ".join(f"{_renamed(name)} {seconds:.1f} s" for name, seconds in stages.items())
    lines += ["", f"Penjing's time at {sizes[-1]} samples: {spent}."] if stages else []
    return "\n".join(
        [*lines, "", f"{data['repeats']} runs each, medians; {conditions(data['machine'], data['versions'])}"]
    )


def _renamed(name: str) -> str:
    """The current name of a row that an earlier version measured."""
    for earlier, today in {
        "AdaRound": "CoordinateRounding",
        "raising": "capture",
        "blocks less": "blocks fewer",
        "stored teacher": "cached teacher",
        "the teacher's texts besides": "also on the teacher's texts",
    }.items():
        name = name.replace(earlier, today)
    return name


def _read(name: str) -> dict:
    data: dict = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return data


def _under(lines: list[str], data: dict, before: str = "") -> str:
    """The table, followed by `before` and the conditions of the measurement."""
    return "\n".join([*lines, "", before + conditions(data["machine"], data["versions"])])


def _span(row: dict) -> str:
    """The range over seeds; empty if it is a single value."""
    lowest, highest = row.get("lowest"), row.get("highest")
    return f" ({lowest:.2%} to {highest:.2%})" if lowest != highest else ""


def _ms(latency: dict) -> str:
    return f"{latency['median']:.2f} ms"


def lite0_int8() -> str:
    """Agreement and latency of EfficientNet-Lite0 in INT8, by method."""
    data = _read("lite0_int8")
    lines = [
        "| | agreement (95 % interval) | SNR | batch 1 | batch 8 | built in |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in data["rows"].items():
        low, high = row["agreement_interval"]
        lines.append(
            f"| {_renamed(name)} | {row['agreement']:.3f} ({low:.3f} to {high:.3f}) | {row['snr_db']:.1f} dB "
            f"| {_ms(row['latency_ms']['1'])} | {_ms(row['latency_ms']['8'])} | {row['seconds']:.0f} s |"
        )
    return _under(lines, data, "496 images; ")


def litert_int8() -> str:
    """Agreement, latency and size of EfficientNet-Lite0 in LiteRT, by quantizer."""
    data = _read("litert_int8")
    lines = [
        "| | agreement (95 % interval) | SNR | latency, median (spread) | size | integer operators |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in data["rows"].items():
        low, high = row["agreement_interval"]
        counts = row["operators"]
        lines.append(
            f"| {_renamed(name)} | {row['agreement']:.3f} ({low:.3f} to {high:.3f}) | {row['snr_db']:.1f} dB "
            f"| {_ms(row['latency_ms'])} ({row['latency_ms']['spread']:.0%}) | {row['size_bytes'] / 1e6:.2f} MB "
            f"| {counts['integer']} of {sum(counts.values())} |"
        )
    return _under(lines, data, "496 images; ")


def runtime_table() -> str:
    """Every runtime on EfficientNet-Lite0, the fastest first."""
    data = _read("runtime_table")["networks"]["lite0"]
    rows = sorted(data["cells"].items(), key=lambda item: item[1].get("median", float("inf")))
    lines = [
        "| EfficientNet-Lite0 | batch 1, median (IQR/median) | size | against its plan | against the source |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows:
        if "refused" in row:
            lines.append(f"| {name} | refused: {row['refused'].rstrip('.')} | | | |")
            continue
        lines.append(
            f"| {name} | {row['median']:.2f} ms ({row['spread']:.0%}) | {row['size_bytes'] / 1e6:.2f} MB "
            f"| {row['planned_db']:.1f} dB | {row['source_db']:.1f} dB |"
        )
    return _under(lines, data, "INT8 is `quantize.Static` alone, ranges from 64 images; ")


def runtime_networks() -> str:
    """Every runtime on every network: milliseconds in fp32 and INT8, or that it is refused."""
    networks = _read("runtime_table")["networks"]
    runtimes = list(dict.fromkeys(key.split()[0] for network in networks.values() for key in network["cells"]))

    def cell(cells: dict, runtime: str, precision: str) -> str:
        row = cells.get(f"{runtime} {precision}")
        if row is None:
            return "not run"
        below = "" if row.get("holds", True) else " (below its limit)"
        return "refused" if "refused" in row else f"{row['median']:.2f}{below}" if "median" in row else "not timed"

    lines = [f"| fp32 / INT8, ms | {' | '.join(networks)} |", f"|---|{'---|' * len(networks)}"]
    for runtime in runtimes:
        cells = [
            f"{cell(n['cells'], runtime, 'fp32')} / {cell(n['cells'], runtime, 'int8')}" for n in networks.values()
        ]
        lines.append(f"| {runtime} | {' | '.join(cells)} |")
    reasons = {
        f"{name} in {key.split()[0]}: " + re.split(r" [(]| got: | or ", row["refused"])[0]
        for name, network in networks.items()
        for key, row in network["cells"].items()
        if "refused" in row and row["code"] != "precision"
    }
    note = f"Batch 1; MiniLM with outlier channels mitigated; spread up to {max(_spreads(networks)):.0%}. "
    note += "".join(f"{text}. " for text in sorted(reasons))
    return _under(lines, next(reversed(networks.values())), note)


def runtime_auto() -> str:
    """What ``--runtime auto`` picks, and the seconds that takes."""
    networks = {name: n for name, n in _read("runtime_table")["networks"].items() if "auto" in n}
    lines = ["| | picked | its fp32 over the fastest | one export | picking |", "|---|---|---|---|---|"]
    for name, network in networks.items():
        row = network["auto"]
        times = f"{row['export_s']:.1f} s | {row['seconds']:.1f} s ({row['seconds'] / row['export_s']:.1f}x)"
        lines.append(f"| {name} | {row['picked']} | {row['over_fastest']:.2f} | {times} |")
    return _under(lines, next(reversed(networks.values())), "Among those considered by default; ")


def _spreads(networks: dict) -> list[float]:
    return [row["spread"] for network in networks.values() for row in network["cells"].values() if "spread" in row]


def search_resume() -> str:
    """What a search that was killed again and again ends with."""
    data = _read("search")["resume digits"]
    rows = data["rows"]
    same = "the same artifact, to the bit, as" if rows["same"] else "another artifact than"
    where = data["machine"]["processor"]
    return f"Killed {rows['kills']} times at random moments, a search ended with {same} undisturbed ({where})."


def search_goal() -> str:
    """Trials until the goal is met, by the search and by Optuna's samplers."""
    data = _read("search")["goal digits"]
    lines = ["| | trials that trained, until the goal was met | all trials |", "|---|---|---|"]
    for method, label in (("penjing", "Penjing"), ("tpe", "Optuna TPE"), ("nsga2", "Optuna NSGA-II")):
        rows = [row for key, row in data["rows"].items() if key.split()[0] == method]
        shown = [
            ", ".join(f"{row[k]}{'' if row['met'] else ' (not met)'}" for row in rows) for k in ("trained", "trials")
        ]
        lines.append(f"| {label} | {shown[0]} | {shown[1]} |")
    return _under(lines, data, f"The digits network, `{data['goal']}`, one number a seed; ")


def search_cluster() -> str:
    """Trials a minute with one process and with two."""
    data = _read("search")["cluster digits"]
    rows = data["rows"]
    where = data["machine"]["processor"]
    return (
        f"With one process {rows['1']['per_minute']:.1f} trials a minute, with two {rows['2']['per_minute']:.1f}: "
        f"{rows['ratio']:.2f}x ({rows['1']['trials']} trials on one thread each, two cores; {where})."
    )


def search_volume() -> str:
    """Hypervolumes after the same wall time."""
    data = _read("search")["hypervolume digits"]
    labels = {"penjing": "Penjing", "nsga2": "Optuna NSGA-II", "random": "random choices"}
    lines = ["| | hypervolume | trials | seconds |", "|---|---|---|---|"]
    for key, row in data["rows"].items():
        label = labels[key.split()[0]]
        lines.append(f"| {label} | {row['hypervolume']:.1f} | {row['trials']} | {row['seconds']:.0f} |")
    return _under(lines, data, "The digits network; of packed size, latency and drop up to 5 points; ")


def search_headline() -> str:
    """The trials of `penjing compress` on ResNet-20."""
    data = _read("search")["headline"]
    rows = data["rows"]
    lines = ["| trial | latency | packed | drop | seconds |", "|---|---|---|---|---|"]
    for words, seconds, measured, predicted in rows["trials"]:

        def both(name: str, unit: str, factor: float, measured: dict = measured, predicted: dict = predicted) -> str:
            if name not in measured:
                return ""
            expected = f" ({factor * predicted[name]:.3g} expected)" if name in predicted else ""
            return f"{factor * measured[name]:.3g} {unit}{expected}"

        cells = [both("latency_ms", "ms", 1), both("packed_bytes", "kB", 1e-3), both("drop", "points", 100)]
        lines.append(f"| {words} | {' | '.join(cells)} | {seconds:.0f} |")
    before, after = rows["metric"]
    sizes = rows["packed_bytes"]
    note = (
        f"Goal: `{rows['goal']}`, {'met' if rows['met'] else 'missed: ' + rows['reason']}. "
        f"{rows['speedup']:.1f}x faster than torch, {rows['speedup_over_nncf']:.2f}x than NNCF's INT8 in OpenVINO; "
        f"{sizes['artifact'] / 1e3:.1f} kB packed, {rows['smaller_than_raw']:.1f}x fewer bytes than the weights "
        f"(NNCF: {sizes['nncf'] / 1e3:.0f} kB); accuracy {before:.2%} to {after:.2%} (NNCF: "
        f"{rows['metric_nncf']:.2%}). "
        f"{rows['seconds'] / 60:.0f} of {rows['minutes']:g} minutes, {rows['stopped']}. "
    )
    return _under(lines, data, note)


def executorch_ranges() -> str:
    """INT8 files of ExecuTorch from Penjing's ranges and from those of XNNPACK's own quantizer."""
    data = _read("executorch_ranges")
    lines = ["| | agreement (95 % interval) | SNR | batch 1, median (IQR/median) | size |", "|---|---|---|---|---|"]
    for name, row in data["rows"].items():
        low, high = row["agreement_interval"]
        latency = row["latency_ms"]
        lines.append(
            f"| {name} | {row['agreement']:.3f} ({low:.3f} to {high:.3f}) | {row['snr_db']:.1f} dB "
            f"| {_ms(latency)} ({latency['spread']:.0%}) | {row['size_bytes'] / 1e6:.2f} MB |"
        )
    versions = f"executorch {data['versions']['executorch']}, torchao {data['versions']['torchao']}; "
    return _under(lines, data, f"{data['samples']} calibration images; {versions}")


def minilm_int8() -> str:
    """Quality and latency of the sentence encoder in INT8, by method."""
    data = _read("minilm_int8")
    sets = list(next(iter(data["rows"].values()))["cosine"])
    lines = [
        f"| | cosine | {' | '.join(f'{name}, points lost' for name in sets)} | batch 1 | batch 16 |",
        "|---|---|" + "---|" * (len(sets) + 2),
    ]
    for name, row in data["rows"].items():
        drops = " | ".join(f"{row['drop'][s] * 100:+.2f}" for s in sets)
        lines.append(
            f"| {name} | {sum(row['cosine'].values()) / len(sets):.4f} | {drops} "
            f"| {_ms(row['latency_ms']['1'])} | {_ms(row['latency_ms']['16'])} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"At most {data['judged']} texts of each test set; {conditions(data['machine'], data['versions'])}",
        ]
    )


def int8_latency(name: str = "int8_latency") -> str:
    """Latency of INT8 files of Penjing and other tools, on one machine."""
    data = _read(name)
    lines = ["| network, batch | " + " | ".join(LATENCIES) + " |", "|---|" + "---|" * len(LATENCIES)]
    for network, batches in data["networks"].items():
        for batch, rows in batches.items():
            cells = (_ms(rows[key.format(batch=batch)]) for key in LATENCIES.values())
            lines.append(f"| {network}, {batch} | {' | '.join(cells)} |")
    return _under(lines, data)


def qat() -> str:
    """Accuracy after quantization-aware training, compared with Brevitas."""
    data = _read("qat")
    lines = [
        "| | settings | learning rate | epochs | accuracy, median (all seeds) | drop |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(data["table"].items(), key=lambda item: (-int(item[0][1]), item[1]["epochs"])):
        lines.append(
            f"| {name.partition(',')[0]} | {row['settings'].split()[1]} | {row['learning_rate']:g} | {row['epochs']:g} "
            f"| {row['accuracy']:.2%}{_span(row)} | {row['gap'] * 100:.2f} points |"
        )
    conditioned = conditions(data["machine"], data["versions"])
    return "\n".join([*lines, "", f"The source network: {data['source']:.2%}; simulated accuracies; {conditioned}"])


def lstm_int8() -> str:
    """Accuracy, size and latency of a recurrent network in INT8."""
    data = _read("lstm_int8")
    lines = ["| | accuracy | SNR | size | batch 1 | batch 16 |", "|---|---|---|---|---|---|"]
    for name, row in data["rows"].items():
        lines.append(
            f"| {name} | {row['metric']:.2%} | {row['snr_db']:.1f} dB | {row['size_bytes'] / 1e6:.2f} MB "
            f"| {_ms(row['latency_ms']['1'])} | {_ms(row['latency_ms']['16'])} |"
        )
    return _under(lines, data)


def mixed_latency() -> str:
    """Mixed precision under a latency budget."""
    data = _read("mixed_precision")
    lines = [
        "| | budget (relative to INT8) | latency (relative to INT8) | floating-point operators | metric | SNR |",
        "|---|---|---|---|---|---|",
    ]
    for network, parts in data["networks"].items():
        for row in parts.get("latency", []):
            rest = {"int8": " fp32", "int8-bf16": " bf16"}.get(row.get("rest", ""), "") if row.get("floats") else ""
            budget = f"{row['budget']:.2f}" if "budget" in row else ""
            lines.append(
                f"| {network}, {row['name']} | {budget} | {row['latency']:.2f} ({row['latency_ms']['median']:.2f} ms) "
                f"| {row.get('floats', '')}{rest} | {row['metric']:.2%} | {row['snr_db']:.1f} dB |"
            )
    return _part(lines, data, "latency", "Batch 1; ")


def mixed_bits() -> str:
    """Mixed precision under a mean bit width."""
    data = _read("mixed_precision")
    lines = ["| | mean bits per weight | packed | metric | SNR |", "|---|---|---|---|---|"]
    for network, parts in data["networks"].items():
        for row in parts.get("bits", []):
            lines.append(
                f"| {network}, {row['kind']} | {row['bits']:.2f} | {row['packed_bytes'] / 1e3:.0f} kB "
                f"| {row['metric']:.2%} | {row['snr_db']:.1f} dB |"
            )
    return _part(lines, data, "bits")


def _part(lines: list[str], data: dict, part: str, before: str = "") -> str:
    """The table, followed by the conditions under which that part of `mixed_precision` was measured."""
    networks_by_conditions: dict[str, list[str]] = {}
    for network, parts in data["networks"].items():
        if part in parts:
            networks_by_conditions.setdefault(conditions(**parts[f"{part} measured on"]), []).append(network)
    single = len(networks_by_conditions) == 1
    notes = [where if single else f"{', '.join(names)}: {where}" for where, names in networks_by_conditions.items()]
    return "\n".join([*lines, "", before + " ".join(notes)])


def pruning_zoo() -> str:
    """Pruning of every network of the zoo by Penjing and Torch-Pruning."""
    data = _read("pruning_zoo")
    lines = [
        "| 30 % of the channels | parameters left | covered | difference to the masked network "
        "| ONNX Runtime | OpenVINO | Torch-Pruning: parameters left (channels) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in data["networks"].items():
        ours, theirs = row["penjing"], row["torch-pruning"]
        peer = "fails" if "error" in theirs else (
            f"{theirs['parameters'] / theirs['parameters_before']:.1%} "
            f"({theirs['channels'] / theirs['channels_before']:.0%})"
        )  # fmt: skip
        if "error" in ours:
            lines.append(f"| {name} | fails | | | | | {peer} |")
            continue
        exact = ours["disagreement_fp64"]
        proof = f"{exact:.0e}" if isinstance(exact, float) else f"{ours['disagreement']:.0e} (fp32)"
        lines.append(
            f"| {name} | {ours['parameters'] / ours['parameters_before']:.1%} | {ours['covered']:.0%} | {proof} "
            f"| {ours['onnxruntime']:.0e} | {ours['openvino']:.0e} | {peer} |"
        )
    note = (
        "Differences are the largest of any output, relative to the largest output: to the masked network in fp64, "
        "and of the exported file to torch. Covered: prunable output channels of all layers but the last. "
    )
    return _under(lines, data, note)


def coupling_cost() -> str:
    """Time and memory of the coupling analysis by depth."""
    data = _read("coupling_cost")
    lines = ["| | Penjing | groups | capturing | Torch-Pruning | groups |", "|---|---|---|---|---|---|"]
    for name, row in data["networks"].items():
        ours, theirs = row["penjing"], row["torch-pruning"]
        lines.append(
            f"| {name} | {ours['seconds']:.2f} s, {ours['bytes'] / 1e6:.0f} MB | {ours['groups']:.0f} "
            f"| {ours['raise_s']:.1f} s | {theirs['seconds']:.2f} s, {theirs['bytes'] / 1e6:.0f} MB "
            f"| {theirs['groups']:.0f} |"
        )
    return _under(lines, data)


def pruning_accuracy() -> str:
    """Accuracy and speed of pruned image networks, compared with Torch-Pruning."""
    data = _read("pruning_accuracy")
    parts, titles = [], {"resnet20": "ResNet-20", "vgg16": "VGG-16"}
    for name, network in data["networks"].items():
        lines = [
            f"| {titles[name]} | MACs left | settings | epochs | accuracy, mean of three seeds | untrained |",
            "|---|---|---|---|---|---|",
            f"| unpruned | 100% | | | {network['source']['accuracy']:.2%} | |",
        ]
        for target, sides in network.get("accuracy", {}).items():
            lines += [f"{_pruned_row(f'{side} at {target}', r)} {r['untrained']:.2%} |" for side, r in sides.items()]
        parts.append("\n".join(lines))
        if where := network.get("accuracy measured on"):
            parts.append(conditions(**where))
        if speed := network.get("speed"):
            parts.append(_pruned_speed(titles[name], speed))
            parts.append(f"Spread: interquartile range / median. {conditions(**network['speed measured on'])}")
    if widths := data.get("widths"):
        rows = widths["rows"]
        runtimes = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
        title = f"3×3 convolution, {widths['pixels']}×{widths['pixels']}, batch {widths['batch']}: GMAC/s"
        lines = [f"| {title} | {' | '.join(f'{w} channels' for w in rows)} |", "|---|" + "---|" * len(rows)]
        for word, shown in runtimes.items():
            cells = " | ".join(f"{row[word]['gmacs_per_s']:.0f}" for row in rows.values())
            lines.append(f"| {shown} | {cells} |")
        parts += ["\n".join(lines), conditions(**widths["widths measured on"])]
    return "\n\n".join(parts)


def minilm_pruning() -> str:
    """Accuracy and speed of a pruned sentence encoder, compared with Torch-Pruning."""
    data = _read("minilm_pruning")
    lines = [
        "| MiniLM, 20 Newsgroups | MACs left | settings | texts | accuracy, mean of three seeds |",
        "|---|---|---|---|---|",
        f"| unpruned | 100% | | | {data['source']['accuracy']:.2%} |",
    ]
    lines += [_pruned_row(side, row, "texts") for side, row in data["accuracy"].items()]
    if data.get("speed"):
        lines += ["", _pruned_speed("MiniLM", data["speed"])]
    return _under(lines, data, "Spread: interquartile range / median. ")


def low_rank() -> str:
    """Accuracy and speed at half of the multiply-accumulates: low rank, tensorly's with VBMF ranks, and pruning."""
    data = _read("low_rank")
    names = {"vgg16": "VGG-16, Fashion-MNIST", "minilm": "MiniLM, 20 Newsgroups"}
    sides = {"penjing": "`LowRank`", "tensorly": "tensorly, VBMF ranks", "channels": "`prune.Channels`"}
    lines: list[str] = []
    for name, network in data["networks"].items():
        speed = network.get("speed", {})
        batches = dict.fromkeys(label.rpartition(", ")[2] for label in speed)
        head = "".join(f" {batch}, speed-up |" for batch in batches)
        lines += [""] * bool(lines) + [
            f"| {names[name]} | MACs left | accuracy, untrained | trained |{head}",
            "|---" * (4 + len(batches)) + "|",
        ]
        for side in ("whole", *network["runs"]):
            times = [speed[f"{side}, {batch}"] for batch in batches]
            shown = "".join(f" {t['median_ms']:.2f} ms ±{t['spread'] / 2:.0%}, {t['speedup']:.2f}× |" for t in times)
            if side == "whole":
                lines.append(f"| as it was | 100% | {network['source']['accuracy']:.2%} | |{shown}")
                continue
            row = network["runs"][side]
            figures = f"{row['macs']:.1%} | {row['untrained']:.2%} | {row['accuracy']:.2%}"
            lines.append(f"| {sides[side]} | {figures} |{shown}")
    trained = {"vgg16": f"on {data['epochs'] * 100:g}% of the images", "minilm": f"on {data['texts']} texts"}
    text = f"Trained {' and '.join(trained[name] for name in data['networks'])}, one seed; "
    return _under(lines, data, text + "± half of the interquartile range / median; ")


def low_rank_behind() -> str:
    """What fitting the factors, and the whole layers behind them, gains before any training."""
    data = _read("low_rank_behind")
    names = {"vgg16": "VGG-16", "minilm": "MiniLM"}
    lines = [
        "| MACs left | fitted | accuracy | SNR of the logits | whole layers fitted |",
        "|---|---|---|---|---|",
    ]
    for key, row in data["rows"].items():
        name, left, way = key.split(", ")
        lines.append(
            f"| {names[name]}, {float(left):.0%} | {way} | {row['accuracy']:.2%} | {row['logits_db']:.1f} dB "
            f"| {len(row['fitted'])} of {row['whole']} |"
        )
    return _under(lines, data, "Untrained, on test data; ")


def _pruned_row(title: str, row: dict, length: str = "epochs") -> str:
    return (
        f"| {title.replace('torch-pruning', 'Torch-Pruning').replace('penjing', 'Penjing')} | {row['macs']:.1%} "
        f"| {row['settings'].replace('_', ' ')} | {row[length]:g} "
        f"| {row['mean']:.2%}{_span(row)} |"
    )


def _pruned_speed(title: str, speed: dict) -> str:
    lines = [
        f"| {title} | latency | spread | MACs left | speed-up | speed-up × MACs left |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in speed.items():
        for word, shown in {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "penjing": "Penjing",
                            "torch-pruning": "Torch-Pruning", "whole": "unpruned"}.items():  # fmt: skip
            name = name.replace(word, shown)
        lines.append(
            f"| {name} | {row['median_ms']:.2f} ms | {row['spread']:.0%} | {row['macs']:.1%} | {row['speedup']:.2f}× "
            f"| {row['speedup'] * row['macs']:.2f} |"
        )
    return "\n".join(lines)


QUIET = 0.1
"""Largest share of the processor that other processes may use for a latency to be shown."""


def sparse_runtimes() -> str:
    """Sparse weights: accuracy, size and speed."""
    data = _read("sparse_runtimes")
    titles = {"resnet20": "ResNet-20", "minilm": "MiniLM"}
    parts = []
    for name, network in data["networks"].items():
        if not network["rows"]:
            continue
        parts.append(_sparse_cost(titles[name], network))
        others = network.get("latency_settings", {}).get("others")
        if others is None or others > QUIET:
            busy = "not measured" if others is None else f"left out, others used {others:.0%} of the processor"
            parts.append(f"{titles[name]}'s latency: {busy}.")
            continue
        parts += [_sparse_speed(titles[name], network)]
        parts += [_sparse_kernels(titles[name], network)] if "openvino_int8" in network else []
    return _under(["\n\n".join(filter(None, parts))], data, "Spread: interquartile range / median. ")


def _sparse_cost(title: str, network: dict) -> str:
    """Metric by method, and sizes."""
    metric, methods = network["metric"], ("Magnitude", "Wanda", "SparseGPT")
    lines = [
        f"| {title} | zeros | {' | '.join(f'{metric}, {m}' for m in methods)} | ONNX file | zip | xz | INT8, xz |",
        "|---|" + "---|" * (len(methods) + 5),
    ]

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}" if metric == "accuracy" else f"{value:.4f}"

    def size(value: int | None) -> str:
        return "" if value is None else f"{value / 1e6:.2f} MB"

    for pattern, row in network["rows"].items():
        by_method = row[metric]
        cells = [figure(by_method.get(m, by_method.get("dense"))) for m in methods]
        cells += [size(row.get("bytes", {}).get(key)) for key in ("file", "zip", "xz")]
        cells.append(size(row.get("int8_bytes", {}).get("xz")))
        lines.append(f"| {pattern} | {row['zeros']:.0%} | {' | '.join(cells)} |")
    judged = ["", f"Cosine: the mean over {network['texts']} texts."] if network.get("texts") else []
    return "\n".join([*lines, *judged])


def _sparse_speed(title: str, network: dict) -> str:
    """Dense latencies, and speed-ups of the sparse files."""
    rows = {pattern: row["latency_ms"] for pattern, row in network["rows"].items() if "latency_ms" in row}
    if not rows:
        return ""
    runtimes = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "torch, eager"}
    columns = [(runtime, batch) for runtime in runtimes for batch in rows["dense"].get(runtime, {})]
    head = " | ".join(f"{runtimes[runtime]}, batch {batch}" for runtime, batch in columns)
    lines = [f"| {title} | {head} |", "|---|" + "---|" * len(columns)]
    for pattern, row in rows.items():
        cells = (_against_dense(row[runtime][batch], pattern == "dense") for runtime, batch in columns)
        lines.append(f"| {pattern} | {' | '.join(cells)} |")
    settings = network["latency_settings"]
    return "\n".join([*lines, "", f"{settings['rounds']} interleaved rounds, {settings['seconds']:g} s per file."])


def _sparse_kernels(title: str, network: dict) -> str:
    """Sparse kernels of OpenVINO and torch."""
    tables = {"OpenVINO INT8": network["openvino_int8"]}
    if isinstance(csr := network.get("torch_sparse", {}).get("csr"), dict):
        tables["torch modules"] = csr
    batches = list(next(iter(network["openvino_int8"].values())))
    lines = [f"| {title} | {' | '.join(f'batch {b}' for b in batches)} |", "|---|" + "---|" * len(batches)]
    for what, rows in tables.items():
        for position, (name, row) in enumerate(rows.items()):
            shown = name.replace("CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE", "with the option for sparse weights")
            cells = " | ".join(_against_dense(row[b], position == 0) for b in batches)
            lines.append(f"| {what}, {shown} | {cells} |")
    return "\n".join(lines)


def _against_dense(latency: dict, dense: bool) -> str:
    return (
        f"{_ms(latency)} ({latency['spread']:.0%})" if dense else f"{latency['speedup']:.2f}× ({latency['spread']:.0%})"
    )


LATENCIES = {
    "Penjing, OpenVINO": "penjing openvino int8",
    "NNCF, OpenVINO": "nncf",
    "NNCF, fixed shape": "nncf fixed {batch}",
    "OpenVINO bf16": "penjing openvino bf16",
    "Penjing, ONNX Runtime": "penjing onnxruntime int8",
    "ORT static": "ort-minmax",
}


def joint() -> str:
    """The joint recipe against a chain of separate tools."""
    data = _read("joint")
    lines = _by_case(data["speed"], data["accuracy"], data["source"]["accuracy"])
    lines.append("")
    for name, win in data["wins"].items():
        lines.append(
            f"- {_renamed(name)}: *{_renamed(win['by'])}* is at least as accurate and {win['times']:.2f}× as fast."
        )
    first = next(iter(data["accuracy"].values()))
    training = f"{first['epochs']:g} epochs in total on both sides, {first['seeds']} seed{'s' * (first['seeds'] > 1)}"
    return _under(lines, _without_threads(data), f"ResNet-20 on Fashion-MNIST, {training}; {CASES}; ")


def joint_limit() -> str:
    """Networks with few layers, for a third of the latency of the fastest fp32 file."""
    data = _read("joint")["limit"]
    lines = _by_case(data["speed"], data["accuracy"], data["source"])
    runs = [run for row in data["accuracy"].values() for run in row["made"]]
    devices = sorted({f"{run['device']} with torch {run['torch']}" for run in runs})
    note = f"{data['epochs']:g} epochs on {', '.join(devices)}, one seed where no span is given; {CASES}; timed on "
    return _under(lines, _without_threads(data["measured on"]), note)


CASES = "speed-ups over the fastest fp32 file; ± half of the interquartile range / median"


def _by_case(speed: dict, accuracy: dict, source: float) -> list[str]:
    """Accuracy and latency of files, the unpruned network first; two columns per batch and number of threads."""
    whole = [name for name in next(iter(speed.values())) if name.startswith("fp32")]
    fastest = {key: min(rows[name]["median"] for name in whole) for key, rows in speed.items()}
    lines = [
        "| | accuracy, median (all seeds) | " + " | ".join(f"{key} | speed-up" for key in speed) + " |",
        "|---" * (2 + 2 * len(speed)) + "|",
    ]
    for name in (*whole, *accuracy):
        row = accuracy.get(name, {"accuracy": source})
        cells = [
            f"{rows[name]['median']:.3f} ms ±{rows[name]['spread'] / 2:.0%} | {fastest[key] / rows[name]['median']:.1f}"
            for key, rows in speed.items()
        ]
        lines.append(f"| {_renamed(name)} | {row['accuracy']:.2%}{_span(row)} | {' | '.join(cells)} |")
    return lines


def _without_threads(data: dict) -> dict:
    """A copy of the results without the number of threads, which differs between columns."""
    return {**data, "machine": {name: value for name, value in data["machine"].items() if name != "threads"}}


def students() -> str:
    """Accuracy of students distilled with every loss."""
    data = _read("students")
    titles = {"resnet": "ResNet-56 teaches ResNet-20", "mobilenet": "MobileNetV2 teaches a narrow MobileNetV2"}
    parts = []
    for pair, results in data["pairs"].items():
        teacher = results["teacher"]
        lines = [
            f"| {titles[pair]} | accuracy, mean (all seeds) | gap closed |",
            "|---|---|---|",
            f"| the teacher, {teacher['macs'] / teacher['student_macs']:.1f}× the MACs "
            f"| {teacher['mean']:.2%}{_span(teacher)} | |",
        ]
        rows = sorted(results["accuracy"].items(), key=lambda item: -item[1]["gap_closed"])
        for name, row in rows:
            lines.append(f"| {name} | {row['mean']:.2%}{_span(row)} | {round(row['gap_closed'], 2) + 0.0:+.2f} |")
        epochs = next(iter(results["accuracy"].values()))["epochs"]
        if longer := results.get("long"):
            accuracies = ", ".join(f"{name} {value:.2%}" for name, value in longer["accuracy"].items())
            lines += ["", f"After {longer['epochs']:g} epochs, one seed: {accuracies}."]
        parts.append(_under(lines, results["measured on"], f"Fashion-MNIST, {epochs:g} epochs; "))
    return "\n\n".join(parts)


def minilm_layers(name: str = "minilm_layers") -> str:
    """Accuracy and speed of MiniLM distilled from six layers to three."""
    data = _read(name)
    lines = [
        "| MiniLM's six layers teach three | accuracy, mean (all seeds) | gap closed |",
        "|---|---|---|",
        f"| the teacher | {data['teacher']['accuracy']:.2%} | |",
    ]
    for name, row in sorted(data["accuracy"].items(), key=lambda item: -item[1]["gap_closed"]):
        lines.append(f"| {_renamed(name)} | {row['mean']:.2%}{_span(row)} | {row['gap_closed']:+.2f} |")
    first = next(iter(data["accuracy"].values()))
    texts = f"20 Newsgroups, {first['texts']} training texts, {data['teacher']['texts']} for the teacher; "
    parts = [_under(lines, data, texts)]
    if speed := data.get("speed"):
        lines = ["| | latency | spread | speed-up |", "|---|---|---|---|"]
        for title, row in speed["rows"].items():
            shown = title.replace("onnxruntime", "ONNX Runtime").replace("openvino", "OpenVINO")
            lines.append(f"| {shown} | {row['median_ms']:.2f} ms | {row['spread']:.0%} | {row['speedup']:.2f}× |")
        parts.append(_under(lines, speed["measured on"], "Spread: interquartile range / median. "))
    return "\n\n".join(parts)


def training_cost() -> str:
    """The cost of a training step relative to a bare loop."""
    data = _read("training_cost")
    parts = []
    for results in (data, data.get("gpu")):
        if results is None:
            continue
        lines = ["| | time per step | relative to the bare loop (all rounds) |", "|---|---|---|"]
        for network, rows in results["rows"].items():
            for name, row in rows.items():
                relative = f"{row['of_bare']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"
                lines.append(f"| {network}, {_renamed(name)} | {row['ms_a_step']:.1f} ms | {relative} |")
        device = f"{results['device']}; " if "device" in results else ""
        parts.append(_under(lines, results, f"Batches of 256; {device}"))
    return "\n\n".join(parts)


def resume() -> str:
    """Results of runs that were killed during training and resumed."""
    data = _read("resume")
    lines = ["| killed at | resumed with | the same file | the same weights |", "|---|---|---|---|"]
    for row in data["rows"]:
        same = " | ".join("yes" if row["same"][name] else "no" for name in ("the file", "the weights"))
        lines.append(f"| {row['killed at']} | {', '.join(row['went on'])} | {same} |")
    sha = data["digests"]["the file"]
    note = f"The joint recipe on scikit-learn's digits, killed with SIGKILL; SHA-256 of the INT8 file {sha[:16]}…; "
    return _under(lines, data, note)


def latency_predictor() -> str:
    """Rank correlation and mean error of predicted latencies of networks that were not measured."""
    data = _read("latency_predictor")
    names = {"macs": "in proportion to MACs", "power law": "power law", "layers": "times of layers"}
    lines = [
        "| | measured before | rank correlation | mean error | largest | within two standard deviations |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["summary"]:
        before = {"source": "the source", "first trials": "the first trials"}[row["known"]]
        sure = f"{row['within two sd']:.0%}" if "within two sd" in row else ""
        lines.append(
            f"| {row['precision']}, {names[row['way']]} | {before} | {row['rank']:.3f} | {row['error']:.1%} "
            f"| {row['largest']:.0%} | {sure} |"
        )
    filling = data["filling"]["resnet20"]
    count = next(iter(data["summary"]))["networks"]
    note = (
        f"{count} variants of three networks in ONNX Runtime, batch 1. The {filling['probes']} probes of ResNet-20 "
        f"take {filling['seconds']:.0f} s, both precisions together; {data['note']}"
    )
    return _under(lines, data, note)


def pairs() -> str:
    """Signal-to-noise ratio of every ordered pair of techniques."""
    data = _read("pairs")
    names = list(data["techniques"])
    letters: dict[str, str] = {}
    lines = [
        "| first, then | " + " | ".join(str(i + 1) for i in range(len(names))) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for i, first in enumerate(names):
        cells = []
        for second in names:
            row = data["orders"][f"{first} → {second}"]
            if "refused" in row:
                cells.append(letters.setdefault(row["expected"], chr(ord("a") + len(letters))))
            else:
                cells.append(f"{row['snr_db']:.0f}")
        lines.append(f"| {i + 1} {first} | {' | '.join(cells)} |")
    lines += ["", "The second can't follow the first; expected is", ""]
    lines += [f"- {letter}: {expected}" for expected, letter in letters.items()]
    ratios_db = [row["snr_db"] for row in data["orders"].values() if "snr_db" in row]
    refused = len(data["orders"]) - len(ratios_db)
    lowest = min(ratios_db)
    note = f"{len(ratios_db)} orders built, with a lowest signal-to-noise ratio of {lowest:.0f} dB; {refused} refused; "
    here = data["machine"]["processor"]
    others = Counter(row["processor"] for row in data["orders"].values() if row["processor"] != here)
    note += "".join(f"{count} of these orders on {name}, the others on " for name, count in others.items())
    return _under(lines, data, note)


FIELD_TOOLS = {
    "torch fp32": "fp32",
    "penjing in onnxruntime": "Penjing, ONNX Runtime",
    "penjing in openvino": "Penjing, OpenVINO",
    "ort static MinMax": "ORT static",
    "ort dynamic": "ORT dynamic",
    "nncf default": "NNCF",
    "nncf accurate": "NNCF accurate",
}


def all_fields() -> str:
    """INT8 of every example of a field: metric and noise, by tool and runtime."""
    data = _read("fields")
    lines = [f"| | {' | '.join(FIELD_TOOLS.values())} |", "|---|" + "---|" * len(FIELD_TOOLS)]
    for name in ("detection", "segmentation", "text", "tagging", "embeddings", "keywords", "recommendation"):
        rows = {tool: row for tool, row in data[name]["rows"].items() if tool in FIELD_TOOLS}
        metrics = {tool: row.get("metrics", [row["metric"]]) for tool, row in rows.items() if "metric" in row}
        sets = min(map(len, metrics.values()))  # that every tool was judged on
        cells = []
        for tool in FIELD_TOOLS:
            noise = f" ({rows[tool]['snr_db']:.0f} dB)" if "snr_db" in rows.get(tool, {}) else ""
            shown = f"{statistics.mean(metrics[tool][:sets]):.2%}{noise}" if tool in metrics else ""
            cells.append(shown or ("refused" if tool in rows else ""))
        lines.append(f"| {name}, {data[name]['metric_name']} | {' | '.join(cells)} |")
    return _under(lines, data)


def detectors() -> str:
    """INT8 of detectors that differ by the seed of their training: mAP lost, and how near the files are to fp32."""
    data = _read("detectors")
    seeds, count = data["networks"], len(data["networks"])
    lines = [
        f"| | points of mAP lost, mean of {count} (95 %) | by network "
        "| mAP against the boxes of fp32 | noise of boxes, of scores |",
        "|---|---|---|---|---|",
    ]
    for tool, row in data["mean"].items():
        each = ", ".join(f"{100 * table[tool]['lost']:.2f}" for table in seeds.values())
        noise = f"{row['boxes_db']:.1f}, {row['scores_db']:.1f} dB"
        cells = [_points(row["lost"], row["bootstrap"]), each, f"{row['agreement']:.1%}", noise]
        lines.append(f"| {tool} | {' | '.join(cells)} |")
    sources = ", ".join(f"{table['torch fp32']['metric']:.2%}" for table in seeds.values())
    note = f"{data['scenes']:,} scenes, fp32 {sources}; {data['draws']:,} draws; "
    return _under(lines, data, note)


def detectors_against_nncf() -> str:
    """How far detectors in INT8 are above NNCF's accurate mode, scene by scene."""
    data = _read("detectors")
    lines = [
        f"| above NNCF accurate, in points | mAP, mean of {len(data['networks'])} (95 %) | by network "
        "| mAP against the boxes of fp32 (95 %) | by network |",
        "|---|---|---|---|---|",
    ]
    for tool, row in data["mean"].items():
        if "metric_above_peer" in row:
            cells = []
            for above in (row["metric_above_peer"], row["agreement_above_peer"]):
                cells += [_points(above["mean"], above), ", ".join(f"{100 * each:.2f}" for each in above["networks"])]
            lines.append(f"| {tool} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _points(mean: float, bootstrap: dict) -> str:
    return f"{100 * mean:.2f} ({100 * bootstrap['low']:.2f} to {100 * bootstrap['high']:.2f})"


def field_trainings() -> str:
    """How long the examples' networks are trained."""
    data = _read("fields")
    lines = ["| | epochs | processor time |", "|---|---|---|"]
    for name, row in data["training"].items():
        lines.append(f"| {name} | {row['epochs']} | {row['processor_seconds'] / 60:.1f} min |")
    return _under(lines, data, "Of one core; from the time of one epoch. ")


def detector_heads() -> str:
    """mAP of other heads on the detector's trunk, and whether inspect names their layers."""
    data = _read("detector_heads")
    lines = [
        "| | mAP fp32 | INT8, ONNX Runtime | INT8, OpenVINO | places that `inspect` names |",
        "|---|---|---|---|---|",
    ]
    for name, row in data["heads"].items():
        cells = [f"{row[runtime]:.2%}" for runtime in ("fp32", "onnxruntime", "openvino")]
        places = ", ".join(f"`{place['at']}`" for place in row["named"]) or "none"
        lines.append(f"| {HEADS[name]} | {' | '.join(cells)} | {places} |")
    return _under(lines, data)


HEADS = {
    "anchors": "anchors, exponential sizes (SSD)",
    "distances": "distances to four sides, centre-ness (FCOS)",
    "peaks": "peaks of a heat map (CenterNet)",
}


def onnx_files() -> str:
    """Noise and latency of ONNX files in both runtimes, by tool."""
    data = _read("onnx_files")
    tables = []
    for file, rows in data["files"].items():
        lines = [
            f"| {file}.onnx | noise of each output | same answers | latency, median (IQR/median) |",
            "|---|---|---|---|",
        ]
        for tool, row in rows.items():
            if "error" in row:
                lines.append(f"| {_renamed(tool)} | can't be built or opened | | |")
                continue
            exact = row["relative_difference"] < 1e-4
            noise = "equal within 1e-4" if exact else ", ".join(f"{value:.1f}" for value in row["snr_db"]) + " dB"
            latency = row["latency_ms"]
            shown = "busy" if latency["doubt"] else f"{latency['median']:.3g} ms ({latency['spread']:.0%})"
            lines.append(f"| {_renamed(tool)} | {noise} | {row['agreement']:.1%} | {shown} |")
        tables.append("\n".join(lines))
    return _under(["\n\n".join(tables)], data, "Batch 1; ")


def quick() -> str:
    """The quick way to one file, by tool and source: time, and quality in OpenVINO."""
    data = _read("quick")
    lines = ["| | source | seconds (spread) | × NNCF | agreement | noise |", "|---|---|---|---|---|---|"]
    for row in data["rows"]:
        times = f"{row['seconds']:.1f} ({row['spread_s']:.1f}) | {row['times_nncf']:.2f}"
        quality = f"{row['agreement']:.1%} | {row['snr_db']:.1f} dB"
        lines.append(f"| {row['tool']} | {row['source']} | {times} | {quality} |")
    return _under(lines, data, f"Median of {data['repeats']} runs; ")


def packing() -> str:
    """Packed files against other compressors: share of the file, and speed both ways."""
    data = _read("packing")
    tools = list(dict.fromkeys(row["tool"] for row in data["rows"]))
    rows = {(row["network"], row["form"], row["tool"]): row for row in data["rows"]}
    lines = [
        f"| | bytes | {' | '.join(tools)} | Huffman | entropy |",
        "|---|---|" + "---|" * len(tools) + "---|---|",
    ]
    times = [f"| | {' | '.join(tools)} |", "|---|" + "---|" * len(tools)]
    for network, form in dict.fromkeys((row["network"], row["form"]) for row in data["rows"]):
        mine = rows[network, form, "penjing"]
        cells, speeds = [], []
        for tool in tools:
            row = rows.get((network, form, tool))
            cells.append(f"{row['bytes'] / mine['file_bytes']:.1%}" if row else "")
            both = [f"{mine['file_bytes'] / 1e6 / row[key]:.3g}" for key in ("pack_s", "unpack_s")] if row else []
            speeds.append(", ".join(both))
        for key in ("huffman_bytes", "entropy_bytes"):
            cells.append(f"{mine[key] / mine['file_bytes']:.1%}" if mine.get(key) else "")
        lines.append(f"| {network}, {form} | {mine['file_bytes']:,} | {' | '.join(cells)} |")
        times.append(f"| {network}, {form} | {' | '.join(speeds)} |")
    lines += ["", "MB of the file per second, packing and unpacking:", "", *times]
    return _under(lines, data, f"zstd {data['versions']['zstd']}; ")


def deep_compression() -> str:
    """Deep Compression by stage: accuracy of the artifact, its file, its packed file, and how much smaller that is."""
    data = _read("deep_compression")
    whole = data["source"]["file_bytes"]
    lines = ["| | accuracy | points lost | model.onnx | packed | fp32 over packed |", "|---|---|---|---|---|---|"]

    def line(label: str, row: dict) -> str:
        lost = 100 * (data["source"]["accuracy"] - row["accuracy"])
        size = f"{row['file_bytes']:,} | {row['packed_bytes']:,} | {whole / row['packed_bytes']:.1f}×"
        return f"| {label} | {row['accuracy']:.2%} | {lost:.2f} | {size} |"

    rows = [("fp32", data["source"])]
    for name, stages in data["rows"].items():
        way, sparsity, *bits = name.split()
        words = {"shared": f", {bits[0]} bits", "trained through": f", {bits[0]} bits, trained through"} if bits else {}
        for stage, row in stages.items():
            label = f"{way}, {float(sparsity):.0%} zeros{words.get(stage, ', ' + stage)}"
            if (label, row) not in rows:  # rows that differ in their bits have pruning in common
                rows.append((label, row))
    lines += [line(label, row) for label, row in rows]
    asked = data["settings"]
    note = (
        f"VGG-16 with {asked['base']['width']} channels in its first stage, {data['parameters']:,} parameters, trained "
        f"for {asked['base']['epochs']:g} epochs; {asked['epochs']:g} epochs with or after pruning, "
        f"{asked['retrain']:g} of retraining, {asked['through']:g} through the codebook; bytes; one seed; "
    )
    return _under(lines, data, note)


def deltas() -> str:
    """Updates against other tools: share of the new version."""
    data = _read("deltas")
    tools = list(dict.fromkeys(row["tool"] for row in data["rows"]))
    rows = {(row["network"], row["form"], row["tool"]): row for row in data["rows"]}
    lines = [
        f"| | bytes | {' | '.join(tools)} | penjing, s: delta, patch |",
        "|---|---|" + "---|" * len(tools) + "---|",
    ]
    for network, form in dict.fromkeys((row["network"], row["form"]) for row in data["rows"]):
        mine = rows[network, form, "penjing"]
        sizes = (rows.get((network, form, tool)) for tool in tools)
        shares = " | ".join(f"{row['bytes'] / row['file_bytes']:.1%}" if row else "" for row in sizes)
        times = f"{mine['there_s']:.1f}, {mine['back_s']:.1f}"
        lines.append(f"| {network}, {form} | {mine['file_bytes']:,} | {shares} | {times} |")
    return _under(lines, data, f"zstd {data['versions']['zstd']}, nncodec {data['versions']['nncodec']}; ")


def packing_large() -> str:
    """A network of 1 GB, packed and unpacked: seconds, speed and memory."""
    data = _read("packing_large")
    lines = ["| | s | MB/s | memory |", "|---|---|---|---|"]
    for action in ("pack", "unpack"):
        row = data[action]
        speed = data["bytes"] / 1e6 / row["seconds"]
        lines.append(f"| {action} | {row['seconds']:.1f} | {speed:.0f} | {row['memory_bytes'] / 1e6:.0f} MB |")
    share = data["packed_bytes"] / data["bytes"]
    return _under(lines, data, f"{data['bytes'] / 1e9:.2f} GB become {share:.1%}; ")


def lossy() -> str:
    """Packing with loss: bytes, agreement and noise."""
    data = _read("lossy")
    rows = {row["name"]: row for row in data["rows"]}
    names = {"grid": "share.Grid, packed", "int8": "INT8 file, packed", "nncodec": "nncodec, weights alone"}
    lines = ["| | bytes | agreement | noise | × share.Grid |", "|---|---|---|---|---|"]
    for name, label in names.items():
        if row := rows.get(name):
            more = row["bytes"] / rows["grid"]["bytes"]
            label += f" (qp {row['qp']})" if "qp" in row else ""
            lines.append(
                f"| {label} | {row['bytes']:,} | {row['agreement']:.1%} | {row['snr_db']:.1f} dB | {more:.2f} |"
            )
    note = f"Agreement with the fp32 network on 496 other pictures; the limit was {data['agreement']:.0%}; "
    return _under(lines, data, note)


def integer_codebooks() -> str:
    """INT8 networks with few integers in every weight tensor."""
    data = _read("integer_codebooks")
    every = data["rows"]["all, rounded"]
    lines = [
        "| integers of a tensor | accuracy | points lost | noise | packed | all integers take | latency |",
        "|---|---|---|---|---|---|---|",
        f"| fp32 | {data['source']:.2%} | 0.00 | | | | |",
    ]
    for name, row in data["rows"].items():
        slower = row["latency_ms"]["median"] / every["latency_ms"]["median"]
        smaller = every["packed_bytes"] / row["packed_bytes"]
        lines.append(
            f"| {name} | {row['accuracy']:.2%} | {100 * (data['source'] - row['accuracy']):.2f} "
            f"| {row['snr_db']:.1f} dB | {row['packed_bytes']:,} | {smaller:.2f}× as much | {slower:.2f}× |"
        )
    note = (
        "Accuracy on the 10,000 test images; bytes of model.onnx, packed; activations of 8 bits; "
        f"latency by that of all integers, batch 1; {data['epochs']:g} epochs where it was trained; one seed; "
    )
    return _under(lines, data, note)


def _kernels() -> dict:
    return json.loads((RESULTS / "binary_kernels.json").read_text(encoding="utf-8"))


def _kernel_machine(run: dict) -> str:
    shown = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if name != "numpy")
    return f"{run['machine']['processor']}; {shown}."


def _timed(side: dict) -> str:
    return f"{side['median_ms']:.3f} ({side['spread']:.0%})"


def binary_convolutions() -> str:
    """Binary 3×3 convolutions beside fp32 and INT8."""
    run = _kernels()
    lines = [
        "| channels, pixels | threads | binary, ms (IQR/median) | torch fp32 | ONNX Runtime fp32 | ONNX Runtime INT8 "
        "| over torch fp32 | over ONNX Runtime fp32 | over INT8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in run["conv"]["rows"]:
        sides = row["sides"]
        ours, packing = sides["binary"], sides["binary with packing"]
        eager = min((sides["torch fp32"], sides["torch fp32 channels-last"]), key=lambda side: side["median_ms"])
        others = (eager, sides["onnxruntime fp32"], sides["onnxruntime int8"])
        ratios = [
            f"{o['median_ms'] / ours['median_ms']:.1f}× ({o['median_ms'] / packing['median_ms']:.1f}×)" for o in others
        ]
        lines.append(
            f"| {row['channels']}, {row['side']}×{row['side']} | {row['threads']} | {_timed(ours)} "
            f"| {' | '.join(map(_timed, others))} | {' | '.join(ratios)} |"
        )
    return "\n".join([*lines, "", f"Kernels for {run['conv']['instructions']}. Batch 1; {_kernel_machine(run)}"])


def packed_products() -> str:
    """Products of packed weights beside fp32 and ONNX Runtime's own."""
    run = _kernels()
    names = ("4 bits", "2 bits", "torch fp32", "onnxruntime 4 bits, fp32", "onnxruntime 4 bits, int8 inputs")
    lines = [
        f"| weights | threads | {names[0]}, ms (IQR/median) | {names[1]} | {names[2]} | ONNX Runtime, 4 bits "
        "| ONNX Runtime, 4 bits, INT8 inputs | 4 bits over fp32 | 2 bits over fp32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in run["product"]["rows"]:
        sides = row["sides"]
        eager = min((sides["torch fp32 mv"], sides["torch fp32 linear"]), key=lambda side: side["median_ms"])
        sides = sides | {"torch fp32": eager}
        ratios = [f"{eager['median_ms'] / sides[name]['median_ms']:.1f}×" for name in names[:2]]
        lines.append(
            f"| {row['size']}×{row['size']} | {row['threads']} | {' | '.join(_timed(sides[name]) for name in names)} "
            f"| {' | '.join(ratios)} |"
        )
    return "\n".join([*lines, "", f"Groups of 128. {_kernel_machine(run)}"])


def _levels() -> dict:
    return json.loads((RESULTS / "binary_resnet20.json").read_text(encoding="utf-8"))


def binary_training() -> str:
    """Accuracy of ResNet-20 with weights of two and three levels."""
    run = _levels()
    names = {"binary": "Binary: weights and inputs are signs, other weights bytes", "ternary": "Ternary weights"}
    lines = ["| | epochs | accuracy | source | loss |", "|---|---|---|---|---|"]
    for name, words in names.items():
        if row := run.get(name):
            lost = (row["source"] - row["accuracy"]) * 100
            lines.append(
                f"| {words} | {row['epochs']:g} | {row['accuracy']:.2%} | {row['source']:.2%} | {lost:.2f} points |"
            )
    return "\n".join([*lines, "", f"One seed, bfloat16 autocast; {run['machine']['processor']}."])


def binary_artifact() -> str:
    """The binary ResNet-20 as an artifact of kernels, beside fp32 in ONNX Runtime."""
    run = _levels()
    row = run["artifact"]
    source = row["source"]
    lines = [
        "| | accuracy | `model.so` or `model.onnx` | smaller | with manifest and loader | smaller |",
        "|---|---|---|---|---|---|",
        f"| source, fp32 in ONNX Runtime | {source['accuracy']:.2%} | {source['size_bytes'] / 1e3:.1f} kB | "
        f"| {source['folder_bytes'] / 1e3:.1f} kB | |",
    ]
    for name in ("fp16", "fp32"):
        one = row[name]
        sizes = (
            f"{one[size] / 1e3:.1f} kB | {source[size] / one[size]:.1f}×" for size in ("size_bytes", "folder_bytes")
        )
        lines.append(f"| binary, {name} | {one['accuracy']:.2%} | {' | '.join(sizes)} |")
    sides = row["sides"]
    ours = sides["binary"]
    lines += ["", "| batch 1 | ms (IQR/median) | binary is faster |", "|---|---|---|"]
    lines.append(f"| binary, fp16, 1 thread | {_timed(ours)} | |")
    for threads in (1, 2):
        other = sides[f"onnxruntime fp32, {threads} threads"]
        ratio = f"{other['median_ms'] / ours['median_ms']:.1f}×"
        words = f"{threads} thread{'s' * (threads > 1)}"
        lines.append(f"| source, fp32 in ONNX Runtime, {words} | {_timed(other)} | {ratio} |")
    one, two = (row["batch"]["sides"][f"{n} threads"] for n in (1, 2))
    lines += ["", f"| batch {row['batch']['samples']} | ms (IQR/median) | faster than on 1 thread |", "|---|---|---|"]
    lines.append(f"| binary, fp16, 1 thread | {_timed(one)} | |")
    lines.append(f"| binary, fp16, 2 threads | {_timed(two)} | {one['median_ms'] / two['median_ms']:.1f}× |")
    library, bits, numbers = row["fp16"]["size_bytes"], row["bits_bytes"], row["numbers_bytes"]
    parts = (f"{size / 1e3:.1f} kB" for size in (bits, numbers, library - bits - numbers))
    told = (
        "Kernels for {}; {}. Of the library in fp16, {} are the bits of binary weights, {} the other weights, scales "
    )
    told += (
        "and thresholds, and {} code; the bits alone would be {:.1f}× smaller. Against the plan: {:.0f} dB in fp32, "
    )
    told += "{:.0f} dB in fp16."
    ratio, noise = row["source"]["size_bytes"] / bits, (row[name]["snr_db"] for name in ("fp32", "fp16"))
    told = told.format(row["instructions"], run["machine"]["processor"], *parts, ratio, *noise)
    return "\n".join([*lines, "", told])


def diagnosis() -> str:
    """What was expected of every precision, and what was measured."""
    data = _read("diagnosis")
    lines = [
        "| | faster at most | measured | weights smaller at most | files smaller, measured |",
        "|---|---|---|---|---|",
    ]
    for name, row in data["networks"].items():
        for e in row["diagnosis"]["expectations"]:
            if e["precision"] not in ("int8", "bf16"):
                continue
            doubt = " (busy)" if e["doubt"] else ""
            cells = [f"{name}, {e['runtime']}-{e['precision']}"]
            measured = "not timed" if e["faster_measured"] is None else _factor(e["faster_measured"]) + doubt
            cells += [_factor(e["faster"]), measured]
            cells += [_factor(e["smaller"]), _factor(e["smaller_measured"])]
            lines.append(f"| {' | '.join(cells)} |")
    rows = list(data["networks"].values())
    spent = ", ".join(f"{us:.1f} µs in {runtime}" for runtime, us in data["operator_us"].items())
    took = ", ".join(f"{name} {row['diagnose_s']:.1f} s" for name, row in data["networks"].items())
    runs = "; ".join(
        f"{name} {e['expected_s']:.0f} s expected, {e['took_s']:.0f} s real"
        for name, e in ((name, row["diagnosis"]["effort"]) for name, row in data["networks"].items())
    )
    ends = [f"The diagnosis took: {took}. The runs took: {runs}. A tiny convolution takes {spent}."]
    if any(e["faster_measured"] is None for row in rows for e in row["diagnosis"]["expectations"]):
        ends.append("What is not timed was rejected by its parity.")
    if any(e["doubt"] for row in rows for e in row["diagnosis"]["expectations"]):
        ends.append("Where it says busy, other programs used the processor, and the timing can't be trusted.")
    return "\n".join([*lines, "", " ".join(ends), "", conditions(rows[0]["machine"], rows[0]["versions"])])


def _factor(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f}×"


def diagnosis_lines() -> str:
    """The findings of every network, as they are printed."""
    data = _read("diagnosis")["networks"]
    texts = []
    for name, row in data.items():
        findings = [f"{f['kind']}: {f['words']}" for f in row["diagnosis"]["findings"]]
        texts.append("\n".join([name, *(f"  {text}" for text in findings or ["nothing stands in the way"])]))
    return "\n".join(["```text", *texts, "```"])


TABLES = {
    "diagnosis": diagnosis,
    "diagnosis_lines": diagnosis_lines,
    "binary_training": binary_training,
    "binary_artifact": binary_artifact,
    "binary_convolutions": binary_convolutions,
    "packed_products": packed_products,
    "integer_codebooks": integer_codebooks,
    "deep_compression": deep_compression,
    "resnet20": lambda: candidates("resnet20"),
    "lite0": lambda: candidates("lite0"),
    "ptq_cost": cost,
    "lite0_int8": lite0_int8,
    "litert_int8": litert_int8,
    "executorch_ranges": executorch_ranges,
    "minilm_int8": minilm_int8,
    "int8_latency": int8_latency,
    "int8_latency_amx": lambda: int8_latency("int8_latency_amx"),
    "qat": qat,
    "lstm_int8": lstm_int8,
    "mixed_latency": mixed_latency,
    "mixed_bits": mixed_bits,
    "pruning_zoo": pruning_zoo,
    "coupling_cost": coupling_cost,
    "pruning_accuracy": pruning_accuracy,
    "minilm_pruning": minilm_pruning,
    "sparse_runtimes": sparse_runtimes,
    "joint": joint,
    "joint_limit": joint_limit,
    "low_rank": low_rank,
    "low_rank_behind": low_rank_behind,
    "pairs": pairs,
    "training_cost": training_cost,
    "resume": resume,
    "latency_predictor": latency_predictor,
    "students": students,
    "minilm_layers": minilm_layers,
    "all_fields": all_fields,
    "detectors": detectors,
    "detectors_against_nncf": detectors_against_nncf,
    "field_trainings": field_trainings,
    "detector_heads": detector_heads,
    "onnx_files": onnx_files,
    "quick": quick,
    "runtime_networks": runtime_networks,
    "runtime_auto": runtime_auto,
    "runtime_table": runtime_table,
    "search_cluster": search_cluster,
    "search_goal": search_goal,
    "search_headline": search_headline,
    "search_resume": search_resume,
    "search_volume": search_volume,
    "packing": packing,
    "deltas": deltas,
    "packing_large": packing_large,
    "lossy": lossy,
    "minilm_ways": lambda: minilm_layers("minilm_ways"),
}


def written(name: str) -> str | None:
    """A table as Markdown; None if its benchmark has not been run."""
    try:
        return TABLES[name]()
    except (FileNotFoundError, KeyError) as error:
        print(f"{name}: not measured ({error})")
        return None


def main() -> None:
    """Rewrite every marked table of README.md and docs/."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        filled = re.sub(
            r"(<!-- measured: (\w+) -->\n).*?(<!-- /measured -->)",
            lambda m: m[0] if (table := written(m[2])) is None else f"{m[1]}{table}\n{m[3]}",
            text,
            flags=re.DOTALL,
        )
        if filled != text:
            path.write_text(filled, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
