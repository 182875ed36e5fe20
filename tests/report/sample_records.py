from __future__ import annotations

from dataclasses import replace

from penjing.goals.goal import Goal
from penjing.records import (
    Candidate,
    Energy,
    GoalLimit,
    GoalResult,
    Latency,
    LayerRow,
    Machine,
    Measured,
    Parity,
    ParityRow,
    Record,
    Rejection,
    StepCost,
)


def limits(goal: str) -> tuple[GoalLimit, ...]:
    """The limits of a goal in words, as a record has them."""
    asked = Goal.parse(goal).all_limits()
    return tuple(GoalLimit(figure=m.figure, op=m.op, value=m.value, text=m.text()) for m in asked)


MACHINE = Machine(
    processor="Intel(R) Xeon(R) Platinum 8488C",
    instruction_sets=("avx2", "avx512f", "avx512_vnni", "amx_int8", "amx_bf16"),
    cores=2,
    threads=2,
    memory_bytes=8_203_014_144,
    system="Linux 6.1 x86_64",
    python="3.11.9",
)


def latency(median: float) -> Latency:
    return Latency(median=median, p95=1.18 * median, spread=0.041, batch=1, threads=2, calls=400)


def figures(metric: float | None, ms: float, size: int, memory: int = 91_226_112) -> Measured:
    return Measured(
        metric=metric,
        latency_ms=latency(ms),
        throughput_per_s=1000 / ms,
        size_bytes=size,
        packed_bytes=int(0.84 * size),
        peak_memory_bytes=memory,
        parameters=272_186,
        macs=31_022_976,
    )


def resnet_rows(executed: str | None, planned: str = "int8") -> tuple[LayerRow, ...]:
    width = 1 if planned == "int8" else 4
    rows = [
        LayerRow(
            name="conv1",
            kind="conv",
            parameters=144,
            macs=112_896,
            activation_bytes=12_544 * width,
            weight_bytes=144 * width,
        )
    ]
    channels, side = 16, 28
    for stage in range(3):
        for block in range(3):
            inner = channels if stage == 0 or block else channels // 2
            for conv, inside in ((1, inner), (2, channels)):
                weights = 9 * inside * channels
                rows.append(
                    LayerRow(
                        name=f"layer{stage + 1}.{block}.conv{conv}",
                        kind="conv",
                        parameters=weights,
                        macs=weights * side * side,
                        activation_bytes=channels * side * side * width,
                        weight_bytes=weights * width,
                    )
                )
            rows.append(
                LayerRow(
                    name=f"layer{stage + 1}.{block}/add#0", kind="add", activation_bytes=channels * side * side * width
                )
            )
        channels, side = 2 * channels, side // 2
    rows.append(
        LayerRow(
            name="fc", kind="linear", parameters=650, macs=640, activation_bytes=10 * width, weight_bytes=640 * width
        )
    )
    rows = [replace(r, planned=planned, executed=executed) for r in rows]
    if executed == "int8":
        reason = "its input is the network's input: one channel has no integer kernel on this processor"
        rows[0] = replace(rows[0], executed="fp32", planned="fp32", reason=reason)
    return tuple(rows)


def candidate(name: str, metric: float, ms: float, size: int, **more: object) -> Candidate:
    runtime, precision = name.split("-", 1)
    integer = precision.startswith("int8")
    drop = 0.9341 - metric
    settings: dict[str, object] = {
        "name": name,
        "runtime": runtime,
        "precision": precision,
        "folder": f"candidates/{name}",
        "measured": figures(metric, ms, size),
        "parity": (
            Parity(against="source", largest=0.61, mean=0.034, snr_db=33.8, agreement=0.9962, samples=1000),
            Parity(against="planned", largest=0.012, mean=0.00081, snr_db=64.2, agreement=0.9999, samples=1000),
        )
        if integer
        else (Parity(against="source", largest=3.1e-5, mean=2.2e-6, snr_db=118.0, agreement=1.0, samples=1000),),
        "drop": drop,
        "relative_drop": drop / 0.9341,
        "met": drop <= 0.005,
        "reason": "" if drop <= 0.005 else f"drop is {100 * drop:.2f} %, the goal allows 0.5 %",
        "integer_operators": {"Convolution": 20, "Add": 9, "MatMul": 1} if integer else {},
        "float_operators": {"Convolution": 1} if integer else {"Convolution": 21, "Add": 9, "MatMul": 1},
        "layers": resnet_rows("int8" if integer else precision, "int8" if integer else "fp32"),
        "sha256": {"model.onnx": "9f2c" * 16, "load.py": "07ab" * 16},
    }
    return Candidate(**{**settings, **more})  # type: ignore[arg-type]


def big() -> Record:
    """A run as the demo makes it: seven candidates over two runtimes, a network of 29 rows."""
    candidates = (
        candidate("onnxruntime-fp32", 0.9341, 0.512, 1_121_400),
        candidate("onnxruntime-int8", 0.9333, 0.338, 334_200),
        candidate("openvino-fp32", 0.9341, 0.471, 1_164_000),
        candidate("openvino-bf16", 0.9336, 0.302, 1_164_000),
        candidate("openvino-int8", 0.9334, 0.281, 321_750),
        candidate("openvino-int8-percentile", 0.9259, 0.279, 321_750),
    )
    return Record(
        penjing="0.1.0",
        versions={
            "torch": "2.13.0",
            "onnx": "1.23.2",
            "onnxruntime": "1.31.1",
            "openvino": "2026.4.1",
            "numpy": "2.4.6",
        },
        machine=MACHINE,
        seed=0,
        created="2026-11-22T18:40:12Z",
        name="resnet20",
        task="Fashion-MNIST",
        data={"calibration": "5e1f" * 16, "evaluation": "c04d" * 16},
        recipe=[
            {"quantize.Static": {"weight_bits": 8, "activation_bits": 8, "range": "mse", "exclude": []}},
        ],
        metric_name="accuracy",
        higher_is_better=True,
        source=figures(0.9341, 0.872, 1_147_811, 268_435_456),
        artifact=candidates[4].measured,
        candidates=candidates,
        goal=GoalResult(
            text="minimize latency_ms, drop<=0.5%",
            met=True,
            reason="openvino-int8 is the fastest of 5 candidates within the limits",
            chosen="openvino-int8",
            pareto=("openvino-int8", "openvino-bf16", "openvino-fp32", "openvino-int8-percentile"),
            limits=limits("drop<=0.5%"),
        ),
        layers=resnet_rows(None, "fp32"),
        steps=(
            StepCost(name="open source", wall_s=3.1, peak_memory_bytes=412_000_000),
            StepCost(name="measure source", wall_s=8.4, peak_memory_bytes=530_000_000),
            StepCost(name="quantize.Static", wall_s=6.72, peak_memory_bytes=611_000_000),
            StepCost(name="export and measure", wall_s=74.9, peak_memory_bytes=802_000_000),
        ),
        warnings=("The spread of onnxruntime-fp32 is 14 %: another program may have used the processor.",),
    )


def judged() -> Record:
    """A detector whose integers lost the scores in one runtime."""

    def parities(lost: float, limit: float) -> tuple[Parity, ...]:
        rows = (
            ParityRow(output="boxes", snr_db=limit + 21, largest=0.8, batch=32, limit_db=limit),
            ParityRow(output="both", snr_db=limit + 18, largest=0.9, batch=32, limit_db=limit),
            ParityRow(
                output="both", columns="4-5 of the last axis", snr_db=lost, largest=0.4, batch=3, limit_db=limit - 4,
                why="the plan itself keeps 20 dB here",
            ),
            ParityRow(output="labels", snr_db=60, largest=1, batch=32, equal=0.97, limit_equal=0.8),
        )  # fmt: skip
        told = tuple(replace(row, limit_db=None, limit_equal=None, why="") for row in rows)
        return (
            Parity(against="planned", largest=0.9, mean=0.1, snr_db=48.2, agreement=None, samples=32, rows=rows),
            Parity(against="source", largest=1.4, mean=0.2, snr_db=38.4, agreement=None, samples=32, rows=told),
        )

    reason = (
        "both, columns 4-5 of the last axis: 1.9 dB is below the limit of 26 dB against what was planned, computed in "
        "torch, in a call of 3; the first operator that differs is scores"
    )
    wrong = candidate(
        "openvino-int8", 0.9334, 0.281, 321_750, met=False, reason=f"rejected: {reason}", parity=parities(1.9, 30),
        rejection=Rejection(
            reason=reason, against="planned", output="both, columns 4-5 of the last axis", snr_db=1.9, limit_db=26,
            operator="scores",
        ),
    )  # fmt: skip
    wrong = replace(wrong, measured=replace(wrong.measured, latency_ms=None, throughput_per_s=None))
    record = big()
    offered = (
        replace(record.candidates[0], parity=parities(92, 60)),
        replace(record.candidates[1], parity=parities(31, 30)),
    )
    return replace(
        record,
        candidates=offered,
        rejected=(wrong,),
        artifact=offered[1].measured,
        goal=replace(
            record.goal, chosen="onnxruntime-int8", reason="onnxruntime-int8: drop 0.1 % is within 0.5 %", pareto=()
        ),
        warnings=(f"openvino-int8 is not offered: {reason}",),
    )


def nothing_left() -> Record:
    """The same where no other candidate could be built: the rejected one is delivered."""
    record = judged()
    (wrong,) = record.rejected
    reason = f"no candidate may be offered; {wrong.name} comes nearest and is {wrong.reason}"
    wrong = replace(wrong, measured=figures(0.9334, 0.281, 321_750))
    return replace(
        record,
        candidates=(),
        rejected=(wrong,),
        artifact=wrong.measured,
        goal=replace(record.goal, met=False, chosen=wrong.name, reason=reason),
    )


def deep() -> Record:
    """150 layers, the goal not met, a metric where lower is better, latencies far apart."""
    rows = tuple(
        LayerRow(
            name=f"encoder.layers.{i // 6}.{('query', 'key', 'value', 'attention', 'output', 'feed_forward')[i % 6]}",
            kind=("linear", "linear", "linear", "matmul", "linear", "linear")[i % 6],
            parameters=590_592 * (4 if i % 6 == 5 else 1),
            macs=75_497_472 * (4 if i % 6 == 5 else 1) + 1_000_000 * i,
            activation_bytes=98_304 * (1 + i % 5),
            weight_bytes=589_824 * (4 if i % 6 == 5 else 1) * (1 if i % 6 != 3 else 0),
            planned="int8",
            executed=("int8", "int8", "int8", "bf16", "int8", "fp32" if i > 120 else "int8")[i % 6],
            reason="both inputs are activations; the runtime has no integer kernel for that" if i % 6 == 3 else None,
        )
        for i in range(150)
    )
    chosen = Candidate(
        name="openvino-int8",
        runtime="openvino",
        precision="int8",
        folder="candidates/openvino-int8",
        measured=Measured(
            metric=35.9, latency_ms=latency(21.4), size_bytes=91_000_000, energy_mj=Energy(value=410.0, method="model")
        ),
        parity=(Parity(against="source", largest=4.0, mean=0.2, snr_db=17.5, agreement=None, samples=300),),
        drop=4.3,
        relative_drop=0.136,
        reason="drop is 4.3, the goal allows 0.5",
        layers=rows,
    )
    slow = replace(
        chosen,
        name="onnxruntime-fp32",
        runtime="onnxruntime",
        precision="fp32",
        measured=Measured(metric=31.6, latency_ms=latency(402.0), size_bytes=352_000_000),
        layers=(),
        drop=0.0,
        relative_drop=0.0,
        reason="latency_ms is 402, the goal allows 50",
    )
    half = replace(
        slow,
        name="openvino-bf16",
        runtime="openvino",
        precision="bf16",
        measured=replace(slow.measured, metric=31.9, latency_ms=latency(61.0)),
        drop=0.3,
        relative_drop=0.0095,
        reason="latency_ms is 61.0, the goal allows 50",
    )
    return replace(
        big(),
        name="bert",
        task="wikitext",
        metric_name="perplexity",
        higher_is_better=False,
        source=Measured(
            metric=31.6, latency_ms=latency(455.0), size_bytes=352_100_000, macs=16_900_000_000, parameters=88_000_000
        ),
        artifact=chosen.measured,
        candidates=(chosen, half, slow),
        goal=GoalResult(
            text="latency_ms<=50, drop<=0.5, minimize size_bytes",
            met=False,
            reason="no candidate meets both limits: the fastest within drop<=0.5 is openvino-bf16 with 61.0 ms",
            chosen="openvino-int8",
            pareto=("openvino-int8", "openvino-bf16", "onnxruntime-fp32"),
            limits=limits("latency_ms<=50, drop<=0.5"),
        ),
        layers=rows,
        warnings=(),
    )


def bare() -> Record:
    """Nothing that may be missing is there."""
    return Record(
        penjing="0.1.0",
        versions={},
        machine=replace(MACHINE, processor="", instruction_sets=()),
        seed=0,
        created="2026-11-22T18:40:12Z",
        name="net",
        task="",
        data={},
        recipe=[],
        metric_name="metric",
        higher_is_better=True,
        source=Measured(),
        artifact=None,
        candidates=(
            Candidate(
                name="onnxruntime-fp32", runtime="onnxruntime", precision="fp32", folder="c", measured=Measured()
            ),
        ),
        goal=GoalResult(text="", met=False, reason="the artifact could not be loaded", chosen=None),
        layers=(),
        steps=(),
    )


ATTACK = '<script>alert("x")</script>\x1b[31m[red]&amp;"\'><img src=http://evil.example/x onerror=alert(1)>'


def hostile() -> Record:
    """Every text that a stranger can choose is markup, an escape sequence and an address."""
    record = big()
    rows = tuple(
        replace(r, name=f"{ATTACK}{i}", kind=ATTACK, executed=f"int8 {ATTACK}", reason=ATTACK)
        for i, r in enumerate(record.layers)
    )
    candidates = tuple(
        replace(
            c,
            name=f"{ATTACK}{i}",
            runtime=ATTACK,
            precision=f"int8 {ATTACK}",
            folder=ATTACK,
            reason=ATTACK,
            met=False,
            layers=rows,
            integer_operators={ATTACK: 1},
            float_operators={ATTACK: 2},
            sha256={ATTACK: ATTACK},
            parity=(replace(c.parity[0], against=ATTACK),),
        )
        for i, c in enumerate(record.candidates)
    )
    return replace(
        record,
        penjing=ATTACK,
        versions={ATTACK: ATTACK},
        created=ATTACK,
        name=ATTACK,
        task=ATTACK,
        data={ATTACK: ATTACK},
        recipe=[{"step": ATTACK, ATTACK: [ATTACK]}, {ATTACK: {ATTACK: ATTACK}}],
        metric_name=f"accuracy {ATTACK}",
        candidates=candidates,
        goal=GoalResult(
            text=f"latency_ms<=1 {ATTACK}",
            met=True,
            reason=ATTACK,
            chosen=candidates[4].name,
            pareto=(candidates[4].name,),
            limits=(GoalLimit(figure=ATTACK, op=ATTACK, value=1.0, text=ATTACK),),
        ),
        layers=rows,
        steps=(StepCost(name=ATTACK, wall_s=1.0, peak_memory_bytes=1),),
        machine=replace(record.machine, processor=ATTACK, instruction_sets=(ATTACK,), system=ATTACK, python=ATTACK),
        warnings=(ATTACK,),
    )
