import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from penjing import distill, quantize, share
from penjing.distill import DKD, Logits
from penjing.errors import RecipeError
from penjing.prune import Channels, Iterative
from penjing.quantize import Static
from penjing.recipes.catalogue import CATALOGUE
from penjing.recipes.recipe import Recipe
from penjing.steps.stages import STAGES
from penjing.steps.step import Step
from penjing.train.clipping import Clip
from penjing.train.finetune import Finetune
from tests.raises import raises_case


@dataclass(frozen=True)
class Own:
    """A step of the user's own."""

    stage: ClassVar[str] = "structure"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    size: int = 3

    def __call__(self, draft, context):
        return draft


def refusal(text, code):
    """Of a recipe in YAML."""
    with raises_case(RecipeError, code) as caught:
        Recipe.from_yaml(text)
    assert caught.value.exit_code == 2
    return caught.value


class TestSteps:
    def test_it_is_a_sequence_of_its_steps(self):
        steps = (Finetune(epochs=2), Static())
        assert tuple(Recipe(*steps)) == Recipe(*steps).steps == steps
        assert len(Recipe(*steps)) == 2
        assert list(Recipe()) == []

    def test_equal_recipes_are_equal_values(self):
        assert Recipe(Static(weight_bits=4)) == Recipe(Static(weight_bits=4))
        assert Recipe(Static(weight_bits=4)) != Recipe(Static())

    def test_a_step_of_the_users_own_is_a_step(self):
        assert list(Recipe(Own(), Static())) == [Own(), Static()]
        assert Recipe(Own()).to_data() == [{"Own": {"size": 3}}]

    @pytest.mark.parametrize("wrong", [Static, lambda draft, context: draft, 3, "quantize.Static", None])
    def test_what_is_not_a_step_is_refused(self, wrong):
        with raises_case(RecipeError, "not-a-step") as caught:
            Recipe(wrong)
        assert caught.value.got == repr(wrong) and "quantize.Static" in caught.value.remedy

    @pytest.mark.parametrize("name", ["stage", "per_runtime", "for_floats"])
    def test_a_step_that_does_not_declare_itself_is_refused(self, name):
        with raises_case(RecipeError, "undeclared") as caught:
            Recipe(type("Undeclared", (Own,), {name: None})())
        assert name in caught.value.got

    def test_it_knows_whether_it_quantizes(self):
        assert Recipe(Static()).quantizes
        assert not Recipe(Finetune()).quantizes
        assert not Recipe().quantizes

    @pytest.mark.parametrize("name", CATALOGUE)
    def test_every_step_of_the_catalogue_fulfils_the_contract(self, name):
        limit = {
            "quantize.Rollback": {"snr_db": 20.0},
            "quantize.MixedPrecision": {"average_bits": 5.0},
            "decompose.LowRank": {"macs": 0.5},
            "distill.FewerLayers": {"of": "blocks", "keep": 3},
            "distill.Student": {"architecture": "resnet20"},
            "prune.Blocks": {"blocks": 1},
            "prune.Channels": {"macs": 0.5},
            "prune.Iterative": {"step": Channels(macs=0.5), "finetune": Finetune()},
            "share.Grid": {"snr_db": 25},
            "share.Layers": {"of": "blocks", "every": 2},
        }.get(name, {})
        step = CATALOGUE[name](**limit)
        assert isinstance(step, Step)
        assert step == CATALOGUE[name](**limit)
        assert name.rpartition(".")[2] == type(step).__name__
        with pytest.raises(AttributeError):  # frozen
            step.anything = 1


EXAMPLES = {
    "replace": distill.Student(architecture="resnet20"),
    "structure": Channels(macs=0.5),
    "train": Finetune(),
    "share": share.Codebook(),
    "round": share.Grid(snr_db=25),
    "levels": quantize.Binary(),
    "prepare": quantize.SmoothQuant(),
    "quantize": Static(),
    "quantize at run time": quantize.Dynamic(),
    "quantize and repair": quantize.MixedPrecision(average_bits=5.0),
    "repair": quantize.CoordinateRounding(),
    "train integers": quantize.QAT(),
}
FLOATS = ("replace", "structure", "train", "prepare")
PLANS = ("quantize", "quantize at run time", "quantize and repair")
ALLOWED = {
    *((before, after) for before in FLOATS for after in (*FLOATS[1:], *PLANS)),
    *((before, "share") for before in (*FLOATS, "share")),
    *(("share", after) for after in ("train", *PLANS)),
    *((before, "round") for before in FLOATS),
    *(("round", after) for after in PLANS),
    *((before, "levels") for before in FLOATS),
    *(("levels", after) for after in PLANS),
    *((plan, "train integers") for plan in ("quantize", "quantize and repair")),
    *((plan, "repair") for plan in ("quantize", "quantize at run time")),
}
"""Which stage may stand directly after which other at the head of a recipe."""


class TestOrder:
    def test_every_stage_has_an_example(self):
        assert set(EXAMPLES) == set(STAGES) and all(step.stage == name for name, step in EXAMPLES.items())
        assert {cls.stage for cls in CATALOGUE.values()} == set(STAGES)

    @pytest.mark.parametrize("after", STAGES)
    @pytest.mark.parametrize("before", STAGES)
    def test_a_pair_of_stages_is_allowed_or_refused_before_any_compute(self, before, after):
        needs_plan = STAGES[before].needs
        steps = (*([Static()] if needs_plan else []), EXAMPLES[before], EXAMPLES[after])
        allowed = (before, after) in ALLOWED or (before, after) in {
            ("repair", "train integers"),
            ("train integers",) * 2,
        }
        if allowed:
            assert tuple(Recipe(*steps)) == steps
        else:
            with pytest.raises(RecipeError) as caught:
                Recipe(*steps)
            assert caught.value.code in ("order", "too-early")
            assert type(EXAMPLES[after]).__name__ in caught.value.what and caught.value.expected

    def test_a_repair_needs_a_plan(self):
        for step in (quantize.CoordinateRounding(), quantize.QAT()):
            with raises_case(RecipeError, "too-early") as caught:
                Recipe(Finetune(), step)
            assert "quantize.Static" in caught.value.expected

    def test_it_is_checked_in_yaml_too(self):
        assert "Static → Finetune" in refusal("[quantize.Static, Finetune]", "order").got


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "weight_bits": st.integers(2, 8),
        "activation_bits": st.integers(2, 8),
        "weight_range": st.sampled_from(["minmax", "mse"]),
        "activation_range": st.sampled_from(["minmax", "moving_average", "percentile", "mse"]),
        "samples": st.integers(1, 10_000),
        "exclude": st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
        "settings": st.dictionaries(
            st.text(min_size=1, max_size=9), st.just({"weight_bits": 4, "activation_range": "minmax"}), max_size=2
        ),
    },
)


class TestYaml:
    @given(SETTINGS, st.floats(min_value=1e-3, max_value=100, allow_nan=False))
    def test_it_reads_back_what_it_wrote(self, settings, epochs):
        recipe = Recipe(Finetune(epochs=epochs, optimizer="adamw"), Static(**settings))
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        assert Recipe.from_data(recipe.to_data()) == recipe

    def test_its_data_is_plain(self):
        data = Recipe(Finetune(losses=(len,)), Static(exclude=("head",))).to_data()
        assert json.loads(json.dumps(data)) == data
        assert yaml.safe_load(yaml.safe_dump(data)) == data
        assert data[1]["quantize.Static"]["exclude"] == ["head"]
        assert "len" in data[0]["Finetune"]["losses"][0]

    def test_its_data_is_the_same_in_every_process(self):
        """A resumed run compares its recipe with the one that was asked for."""
        within = Iterative(step=Channels(macs=0.5), finetune=Finetune(hooks=(print,)))
        for step, setting, value in ((Finetune(losses=(len,)), "losses", len), (within, "hooks", print)):
            with raises_case(RecipeError, "unwritable") as caught:
                Recipe(step).to_yaml()
            assert f"{type(step).__name__}({setting}=" in caught.value.what and caught.value.got == repr(value)
            assert "replace" in caught.value.remedy
        one, other = (Recipe(Finetune(losses=(lambda batch: 0,))).to_data() for _ in range(2))
        assert one == other

    def test_settings_may_be_left_out(self):
        assert Recipe.from_yaml("- quantize.Static") == Recipe(Static())
        assert Recipe.from_yaml("- quantize.Static:") == Recipe(Static())
        assert Recipe.from_yaml("- quantize.Static: {weight_bits: 4}") == Recipe(Static(weight_bits=4))
        assert Recipe.from_yaml("[]") == Recipe()

    def test_numbers_and_words_are_those_of_yaml_1_2(self):
        text = "- Finetune: {learning_rate: 1e-3, weight_decay: 5.e-4, ema: .9, autocast: off, steps: 3}"
        settings = Finetune(learning_rate=0.001, weight_decay=0.0005, ema=0.9, autocast="off", steps=3)
        assert Recipe.from_yaml(text) == Recipe(settings)

    @pytest.mark.parametrize("name", ["1e3", "off", "yes", ".5", "true", "3", "1_0"])
    def test_a_name_that_looks_like_something_else_stays_a_name(self, name):
        recipe = Recipe(Static(exclude=(name,)))
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe

    def test_settings_of_settings_may_be_names_alone(self):
        text = "- Finetune: {distill: [distill.Logits, {distill.DKD: {beta: 2}}], clip: Clip}"
        assert Recipe.from_yaml(text) == Recipe(Finetune(distill=(Logits(), DKD(beta=2)), clip=Clip()))
        assert Recipe.from_yaml("- Finetune: {distill: auto}") == Recipe(Finetune())

    def test_lists_become_tuples(self):
        recipe = Recipe.from_yaml("- quantize.Static:\n    exclude: [conv1, 'layer3.*']\n")
        assert recipe.steps[0].exclude == ("conv1", "layer3.*")

    @pytest.mark.parametrize(
        ("text", "code", "meant"),
        [
            ("- quantize.static", "unknown-step", "quantize.Static"),
            ("- quantise.Static: {}", "unknown-step", "quantize.Static"),
            ("- os.system: {command: ls}", "unknown-step", None),
            ("- {}", "unknown-step", "{Finetune: {}}"),
            ("- 5", "unknown-step", None),
            (
                "- prune.Iterative: {step: {prune.Channels: {macs: 0.5}}, finetune: {epochs: 1}}",
                "unknown-step",
                '{Finetune: {"epochs": 1}}',
            ),
            ("- [quantize.Static]", "unknown-step", "quantize.Static"),
            ("-", "unknown-step", None),
            ("- Finetune: {distill: {Logits: {}}}", "unknown-setting", "distill.Logits"),
            ("- Finetune: {distill: [distill.Logit]}", "unknown-setting", "distill.Logits"),
            ("- prune.Movement: {finetune: {Finetun: {}}}", "unknown-step", "Finetune"),
            ("- quantize.Static: {weight_bit: 4}", "unknown-setting", "weight_bits"),
        ],
    )
    def test_a_name_that_does_not_exist_is_told_with_the_nearest(self, text, code, meant):
        error = refusal(text, code)
        assert error.remedy == (meant and f"did you mean {meant}?") and error.expected.startswith("one of ")

    @pytest.mark.parametrize(
        ("text", "field", "expected"),
        [
            ("- quantize.Static: {weight_bits: 99}", "weight_bits", "from 2 to 8"),
            ("- quantize.Static: {weight_bits: 4.0}", "weight_bits", "from 2 to 8"),
            ("- quantize.Static: {activation_range: kl}", "activation_range", "'percentile'"),
            ("- quantize.Static: {weight_range: percentile}", "weight_range", "'mse'"),
            ("- quantize.Static: {samples: 0}", "samples", "at least 1"),
            ("- quantize.Static: {exclude: head}", "exclude", "tuple of names"),
            ("- quantize.Static: {settings: 3}", "settings", "{'layer3.*': "),
            ("- quantize.Static: {settings: {a: {weight_bits: 1}}}", "weight_bits", "from 2 to 8"),
            ("- Finetune: {channels_last: 'no'}", "channels_last", "True or False"),
            ("- Finetune: {epochs: 0}", "epochs", "above 0"),
            ("- Finetune: {epochs: many}", "epochs", "a number"),
            ("- Finetune: {optimizer: adam}", "optimizer", "'adamw'"),
        ],
    )
    def test_a_setting_that_breaks_its_rule_is_named(self, text, field, expected):
        error = refusal(text, "settings")
        assert error.field == field and expected in str(error.expected)

    @pytest.mark.parametrize(
        ("text", "code", "got"),
        [
            ("- quantize.Static: 5", "not-a-mapping", "5"),
            ("- quantize.Static: [weight_bits]", "not-a-mapping", "['weight_bits']"),
            ("- quantize.Static: {settings: {a: {samples: 5}}}", "unknown-setting", "samples"),
            ("- quantize.Static: {}\n  Finetune: {}", "two-steps", "quantize.Static, Finetune"),
            ("- distill.Logits: {}", "not-a-step", "{'distill.Logits': {}}"),
            ("- Finetune: {epochs: 1, epochs: 5}", "unreadable", "'epochs' appears twice"),
            ("quantize.Static: {}", "not-a-list", "dict"),
            ("", "not-a-list", "NoneType"),
            ("{a: [", "unreadable", "line 1"),
        ],
    )
    def test_what_cannot_be_read_is_said(self, text, code, got):
        assert got in refusal(text, code).got

    def test_code_in_yaml_does_not_run(self, tmp_path):
        mark = tmp_path / "ran"
        text = f"- !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]"
        refusal(text, "unreadable")
        assert not mark.exists()


def test_a_step_or_a_list_may_stand_in_the_place_of_a_recipe():
    step = Static()
    assert Recipe.of(step) == Recipe.of([step]) == Recipe.of((step,)) == Recipe.of(Recipe(step)) == Recipe(step)
    for wrong, code, got, remedy in (
        ([step, 3], "not-a-step", "3", "quantize.Static"),
        (Static, "not-a-step", repr(Static), "quantize.Static"),
        ("recipe.yaml", "file-name", "'recipe.yaml'", "from_yaml"),
    ):
        with raises_case(RecipeError, code) as caught:
            Recipe.of(wrong)
        assert caught.value.got == got and remedy in caught.value.remedy
