import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing.analyze import noise
from penjing.analyze.samples import split
from penjing.errors import RecipeError, UsageError
from penjing.network.capture import capture_network
from penjing.quantize import CoordinateRounding, MixedPrecision, Static
from penjing.quantize.choice import FLOAT, Costs, solve
from penjing.steps.draft import Draft
from penjing.steps.plan import GENERIC, Plan
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.task import Task
from tests.raises import raises_case, raises_setting


def every_choice(costs, budget, objective):
    """The obvious way: all of them, in plain Python; the best value of the aim."""
    names, best = list(costs.noise), None
    count = sum(costs.weights.values()) or 1
    for bits in itertools.product(*(costs.noise[n] for n in names)):
        chosen = dict(zip(names, bits, strict=True))
        noise = sum(costs.noise[n][b] for n, b in chosen.items())
        time = costs.rest_ms + sum(costs.ms.get(n, {}).get(b, 0) for n, b in chosen.items())
        time += sum(t for (a, b), t in costs.edges.items() if (chosen[a] == FLOAT) != (chosen[b] == FLOAT))
        mean = sum(costs.weights.get(n, 0) * (b or 32) for n, b in chosen.items()) / count
        limited = {"noise": time, "bits": mean, "latency": noise}[objective]
        aim = time if objective == "latency" else noise
        if limited <= budget * (1 + 1e-9) and (best is None or aim < best):
            best = aim
    return best


def value(costs, chosen, objective):
    if objective != "latency":
        return sum(costs.noise[n][b] for n, b in chosen.items())
    time = costs.rest_ms + sum(costs.ms[n][b] for n, b in chosen.items())
    return time + sum(t for (a, b), t in costs.edges.items() if (chosen[a] == FLOAT) != (chosen[b] == FLOAT))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("objective", ["noise", "bits", "latency"])
def test_the_solver_finds_what_trying_every_choice_finds(seed, objective):
    random = np.random.default_rng(seed)
    names = [f"l{i}" for i in range(6)]
    kinds = (8, 4, FLOAT) if objective != "bits" else (8, 4, 2)
    spread = 10.0 ** random.uniform(-7, -2, 6)
    noise = {
        n: {b: 0.0 if b == FLOAT else float(s * 4.0 ** (8 - b)) for b in kinds}
        for n, s in zip(names, spread, strict=True)
    }
    ms = {n: {b: float(random.uniform(1, 3) * (2 if b == FLOAT else 1)) for b in kinds} for n in names}
    edges = {(a, b): float(random.uniform(0, 1)) for a, b in itertools.pairwise(names)}
    weights = {n: int(random.integers(1, 100)) for n in names}
    costs = Costs(noise, ms, edges, weights, rest_ms=0.5)
    for part in (0.3, 0.6, 0.9):
        low, high = {"noise": (8, 40), "bits": (2, 8), "latency": (1e-6, 1e-2)}[objective]
        budget = low + part * (high - low)
        expected = every_choice(costs, budget, objective)
        chosen = solve(costs, budget, objective, 8)
        if expected is None:
            assert chosen is None
        else:
            assert value(costs, chosen, objective) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_time_counts_conversions_and_a_measurement_corrects_them():
    costs = Costs({"a": {}, "b": {}}, {"a": {8: 1.0}, "b": {FLOAT: 2.0}}, {("a", "b"): 0.5}, rest_ms=0.25)
    chosen = {"a": 8, "b": FLOAT}
    assert costs.time(chosen) == 3.75
    assert costs.corrected(chosen, 4.75).time(chosen) == pytest.approx(4.75)
    assert costs.corrected(chosen, 3.0) == costs  # what is faster than reckoned needs no correction


SITES = ("0", "2", "4", "8")


def on_a_machine(context, price, rest=lambda precision: 0.0, conversions=lambda floats: 0.0, **others):
    """The context on a machine where an operator takes `price(in floating point, precision)` milliseconds.

    `rest` is what all else takes, `conversions` what a network of these formats takes besides.
    """

    def floats(draft):
        return [name in draft.plan.floats or not draft.plan for name in SITES]

    def profile(draft, precision):
        own = [((name,), price(f, precision)) for name, f in zip(SITES, floats(draft), strict=True)]
        return [*own, ((), rest(precision))]

    def latency(drafts, precision):
        return [sum(ms for _, ms in profile(d, precision)) + conversions(floats(d)) for d in drafts]

    return replace(context, profile=profile, latency=latency, **others)


BOTH = replace(GENERIC, precisions=("fp32", "bf16", "int8", "int8-bf16"))


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    ).eval()
    task = Task(example=torch.zeros(2, 3, 12, 12), calibration=[torch.rand(8, 3, 12, 12) for _ in range(6)])
    network = capture_network(model, *task.call())
    return Draft(network), Context(task=task, source=network)


class TestTheStep:
    def test_the_mean_of_bits_is_kept_and_beats_the_same_bits_everywhere(self, prepared):
        draft, context = prepared
        mixed = MixedPrecision(average_bits=4.5, weight_bits=(8, 4, 2))(draft, context)
        bits = {e: v.spec.bits for e, v in mixed.plan.entries.items() if e.endswith(":weight")}
        sizes = {e: mixed.network.get_submodule(e.removesuffix(":weight")).weight.numel() for e in bits}
        assert sum(bits[e] * sizes[e] for e in bits) / sum(sizes.values()) <= 4.5
        assert len(set(bits.values())) > 1

    def test_of_both_ways_to_judge_operators_the_better_network_is_taken(self, prepared):
        draft, context = prepared
        events = []
        context = replace(context, events=lambda name, **values: events.append((name, values)))
        mixed = MixedPrecision(average_bits=3, weight_bits=(8, 4, 3, 2))(draft, context)
        told = [values["snr_db"] for name, values in events if name == "mixed"]
        chosen = {values["site"]: values["bits"] for name, values in events if name == "bits"}
        fitting, held = split(context)
        plans = {bits: Static(weight_bits=bits)(draft, fitting) for bits in (8, 4, 3, 2)}
        edges = {f"{n}:weight": bits for n, bits in chosen.items() if f"{n}:weight" in plans[8].plan.entries}
        entries = {edge: plans[bits].plan.entries[edge] for edge, bits in edges.items()}
        assert entries.keys() < mixed.plan.entries.keys()
        assert all(mixed.plan.entries[e].spec == entry.spec for e, entry in entries.items())
        plan = replace(plans[8].plan, entries={**plans[8].plan.entries, **entries})
        again = CoordinateRounding()(replace(plans[8], plan=plan), fitting)
        snr = noise.signal_to_noise(draft.network, insert(again.network, again.plan), held)
        assert len(told) == 2 and snr == pytest.approx(max(told))

    def test_a_time_needs_a_runtime_that_tells(self, prepared):
        draft, context = prepared
        with raises_case(UsageError, "no-profile"):
            MixedPrecision(latency_ms=1)(draft, context)

    def test_what_no_choice_keeps_is_refused(self, prepared):
        draft, context = prepared
        with raises_case(RecipeError, "unreachable"):
            MixedPrecision(average_bits=3, weight_bits=(8, 4))(draft, context)

    def test_the_fastest_is_given_where_no_choice_is_as_fast_as_wanted(self, prepared):
        draft, context = prepared
        events = []
        context = on_a_machine(
            context, lambda f, precision: 1.0 + f, events=lambda name, **values: events.append((name, values))
        )
        mixed = MixedPrecision(latency_ms=1.0)(draft, context)
        assert context.latency([mixed], "int8") == [4.0] and not mixed.plan.floats
        assert [values["met"] for name, values in events if name == "mixed"][-1] is False

    def test_operators_in_floating_point_pay_for_bfloat16(self, prepared):
        draft, context = prepared
        calls = [((torch.rand(8, 3, 12, 12),), {})]
        ratios = noise.in_bfloat16(draft.network, ["0", "8"], calls)
        reference = draft.network(*calls[0][0])
        assert draft.network.get_submodule("8").weight.dtype == torch.float32
        body = nn.Sequential(*(draft.network.get_submodule(str(i)) for i in (0, 2, 4)))
        assert all(0 < ratio < 1e-4 for ratio in ratios.values()) and len(body) == 3
        x = calls[0][0][0]
        for convolution in body:
            x = convolution(x).relu()
        head, x = draft.network.get_submodule("8"), x.mean((2, 3))
        half = nn.functional.linear(x.bfloat16().float(), head.weight.bfloat16().float(), head.bias.bfloat16().float())
        ratio = (half - reference).double().square().sum() / reference.double().square().sum()
        assert ratios["8"] == pytest.approx(float(ratio.detach()), rel=1e-3)

    def test_floats_are_paid_for_with_measured_times(self, prepared):
        draft, context = prepared
        context = on_a_machine(context, lambda f, precision: 1.0 + f)
        latency = context.latency
        again = MixedPrecision(latency_ratio=6.2 / latency([Static()(draft, context)], "int8")[0])(draft, context)
        mixed = MixedPrecision(latency_ms=6.2)(draft, context)
        assert again.plan == mixed.plan
        returned = [n for n, reason in mixed.plan.floats.items() if reason == "mixed precision"]
        assert latency([mixed], "int8")[0] <= 6.2 and len([n for n in returned if n in "0248"]) == 2

    def test_conversions_that_cost_more_than_reckoned_are_learnt_from_measurements(self, prepared):
        draft, context = prepared

        def conversions(floats):
            """Much for every change of format, but where formats alternate, as they do when they are timed."""
            alternating = floats == [False, True, False, True]
            return 0.0 if alternating else 2.0 * sum(a != b for a, b in itertools.pairwise(floats))

        context = on_a_machine(context, lambda f, precision: 1.0 + f / 2, conversions=conversions)
        mixed = MixedPrecision(latency_ms=5.0)(draft, context)
        assert context.latency([mixed], "int8")[0] <= 5.0

    @pytest.mark.parametrize(("half", "taken"), [(0.5, "int8-bf16"), (9.0, "int8")])
    def test_the_rest_is_in_the_format_that_keeps_the_limit_with_the_least_noise(self, prepared, half, taken):
        """A 2-bit operator takes 1 ms, one in fp32 8, one in bfloat16 `half`; 6.7 ms are allowed."""
        draft, context = prepared

        def price(f, precision):
            return (half if precision in ("bf16", "int8-bf16") else 8.0) if f else 1.0

        context = on_a_machine(context, price, capabilities=BOTH)
        mixed = MixedPrecision(latency_ms=6.7, weight_bits=(2,))(draft, context)
        assert mixed.plan.precision == taken and Plan.from_json(mixed.plan.to_json()) == mixed.plan
        assert context.latency([mixed], taken)[0] <= 6.7
        with raises_case(UsageError, "precision") as caught:
            MixedPrecision(latency_ms=6.7, precision="int8-bf16")(draft, replace(context, capabilities=GENERIC))
        assert caught.value.got == "int8-bf16"

    def test_a_ratio_is_of_the_faster_network_in_integers(self, prepared):
        """The rest takes 4 ms beside fp32 and 12 beside bfloat16, whose integers are no measure then."""
        draft, context = prepared

        def price(f, precision):
            return (0.5 if precision in ("bf16", "int8-bf16") else 3.0) if f else 1.0

        def rest(precision):
            return 12.0 if precision in ("bf16", "int8-bf16") else 4.0

        context = on_a_machine(context, price, rest, capabilities=BOTH)
        mixed = MixedPrecision(latency_ratio=1.1, weight_bits=(2,))(draft, context)
        assert mixed.plan.precision == "int8" and context.latency([mixed], "int8")[0] <= 1.1 * 8

    def test_all_integers_keep_the_ratio_of_one(self, prepared):
        draft, context = prepared
        events = []
        context = on_a_machine(
            context, lambda f, precision: 1.0 + f, events=lambda name, **values: events.append((name, values))
        )
        mixed = MixedPrecision(latency_ratio=1.0)(draft, context)
        assert not mixed.plan.floats
        assert [values["met"] for name, values in events if name == "mixed"][-1] is True

    def test_a_runtime_without_integers_is_told(self, prepared):
        draft, context = prepared
        context = replace(context, capabilities=replace(GENERIC, precisions=("fp32",)))
        with raises_case(UsageError, "no-integers"):
            MixedPrecision(snr_db=10)(draft, context)

    @pytest.mark.parametrize("settings", [{"weight_bits": ()}, {"weight_bits": (9,)}, {"precision": "int4"}])
    def test_settings_that_make_no_sense_are_refused(self, settings):
        with raises_setting(*settings):
            MixedPrecision(average_bits=4, **settings)

    @pytest.mark.parametrize("limits", [{}, {"snr_db": 20, "latency_ms": 1}])
    def test_it_takes_one_limit(self, limits):
        with raises_case(RecipeError, "limits"):
            MixedPrecision(**limits)


def test_it_runs_in_a_runtime_that_times_its_operators(prepared, tmp_path):
    _, context = prepared
    pytest.importorskip("openvino")
    recipe = pj.Recipe(MixedPrecision(snr_db=25.0))
    result = pj.run(
        recipe, context.source, context.task, runtime="openvino", out=tmp_path / "run", seconds=0.05, threads=1
    )
    (chosen,) = [c for c in result.record.candidates if c.precision.startswith("int8")]  # that which was measured alone
    assert chosen.parity and (result.folder / "report.html").exists()
