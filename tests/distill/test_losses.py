"""Every loss against a slow reference: loops over samples and classes with Python's own arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from penjing import distill
from penjing.distill.attention import attention_transfer
from penjing.distill.crd import contrastive
from penjing.distill.dist import correlations
from penjing.distill.dkd import decoupled
from penjing.distill.hard import hard_labels
from penjing.distill.hints import hint
from penjing.distill.logits import soft_targets
from penjing.distill.rkd import angles, distances
from penjing.distill.similarity import similarity_preserving
from penjing.distill.teaching import DistillationInputs
from penjing.distill.tinybert import layer_to_layer
from penjing.errors import RecipeError, TaskError
from tests.raises import raises_case, raises_setting

SEEDS = st.integers(0, 10**6)


def two(seed, samples=5, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64) for _ in range(2)]


def softened(row, temperature):
    powers = [math.exp(float(x) / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def divergence(target, predicted):
    return sum(p * math.log(p / q) for p, q in zip(target, predicted, strict=True) if p > 0)


def pearson(a, b):
    n, ma, mb = len(a), sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True)) / n
    return covariance / math.sqrt(sum((x - ma) ** 2 for x in a) / n * sum((y - mb) ** 2 for y in b) / n)


@given(seed=SEEDS, temperature=st.floats(0.5, 8))
def test_soft_targets(seed, temperature):
    student, teacher = two(seed)
    rows = [
        divergence(softened(t, temperature), softened(s, temperature)) for s, t in zip(student, teacher, strict=True)
    ]
    assert float(soft_targets(student, teacher, temperature)) == pytest.approx(
        temperature**2 * sum(rows) / len(rows), rel=1e-9
    )


@given(seed=SEEDS)
def test_hard_labels(seed):
    student, teacher = two(seed)
    rows = [-math.log(softened(s, 1)[max(range(4), key=lambda c, t=t: float(t[c]))])
            for s, t in zip(student, teacher, strict=True)]  # fmt: skip
    assert float(hard_labels(student, teacher)) == pytest.approx(sum(rows) / len(rows), rel=1e-9)


@given(seed=SEEDS, temperature=st.floats(0.5, 8))
def test_decoupled(seed, temperature):
    student, teacher = two(seed)
    target = torch.arange(5) % 4
    total = 0.0
    for s, t, true in zip(student, teacher, target.tolist(), strict=True):
        actual, reference = softened(s, temperature), softened(t, temperature)
        binary = divergence([reference[true], 1 - reference[true]], [actual[true], 1 - actual[true]])
        others = [c for c in range(4) if c != true]
        among = divergence(
            [reference[c] / (1 - reference[true]) for c in others], [actual[c] / (1 - actual[true]) for c in others]
        )
        total += 1.5 * binary + 6.0 * among
    actual = decoupled(student, teacher, target, temperature, 1.5, 6.0)
    assert float(actual) == pytest.approx(temperature**2 * total / 5, rel=1e-6, abs=1e-9)


def test_decoupled_weighed_as_they_are_is_soft_targets():
    student, teacher = (x[:1] for x in two(3))
    target = torch.tensor([2])
    beta = 1 - float(torch.softmax(teacher / 2, 1)[0, 2])
    assert float(decoupled(student, teacher, target, 2.0, 1.0, beta)) == pytest.approx(
        float(soft_targets(student, teacher, 2.0)), rel=1e-9
    )


@given(seed=SEEDS, temperature=st.floats(0.5, 8))
def test_correlations(seed, temperature):
    student, teacher = two(seed)
    student_rows = [softened(s, temperature) for s in student]
    teacher_rows = [softened(t, temperature) for t in teacher]
    between = sum(1 - pearson(a, b) for a, b in zip(student_rows, teacher_rows, strict=True)) / 5
    within = sum(1 - pearson([r[c] for r in student_rows], [r[c] for r in teacher_rows]) for c in range(4)) / 4
    got = correlations(student, teacher, temperature)
    # The correlation of rows that hardly vary is a quotient of very small numbers.
    assert [float(x) for x in got] == pytest.approx([temperature**2 * between, temperature**2 * within], abs=1e-4)


@pytest.mark.parametrize("way", [distill.Logits(), distill.HardLabels(), distill.DKD(), distill.DIST()])
class TestEvery:
    def loss(self, way, student, teacher, target=None):
        lesson = DistillationInputs(student, teacher, target, {}, {})
        return way.loss(lesson)(lesson)

    def test_falls_to_its_least_at_the_teacher(self, way):
        student, teacher = two(0)
        student.requires_grad_()
        target = teacher.argmax(1)
        start = float(self.loss(way, student, teacher, target).detach())
        optimizer = torch.optim.Adam([student], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            self.loss(way, student, teacher, target).backward()
            optimizer.step()
        assert float(self.loss(way, student, teacher, target)) < 0.02 * start + 1e-6

    def test_the_second_of_four_axes_are_the_classes(self, way):
        student, teacher = (x.reshape(5, 2, 2, 3).movedim(-1, 1) for x in two(0, 20, 3))
        flat = [x.movedim(1, -1).reshape(20, 3) for x in (student, teacher)]
        target = flat[1].argmax(1)
        assert torch.equal(
            self.loss(way, student, teacher, target.reshape(5, 2, 2)), self.loss(way, *flat, target=target)
        )

    @pytest.mark.parametrize("places", [(3,), (2, 2)])
    @pytest.mark.parametrize("axis", [1, -1])
    def test_labels_tell_which_axis_the_classes_are(self, way, axis, places):
        shape = (5, *places, 4)
        student, teacher = two(0, 5 * math.prod(places))
        target = teacher.argmax(1)
        flat = self.loss(way, student, teacher, target)
        moved = (x.reshape(shape).movedim(-1, axis) for x in (student, teacher))
        assert torch.allclose(self.loss(way, *moved, target=target.reshape(shape[:-1])), flat)

    @pytest.mark.parametrize("shape", [(8,), (8, 1)])
    def test_an_output_without_classes_is_refused(self, way, shape):
        with raises_case(TaskError, "not-logits") as caught:
            self.loss(way, torch.randn(shape), torch.randn(shape))
        assert str(shape) in caught.value.got and "distill.Outputs" in caught.value.remedy

    def test_other_classes_are_refused(self, way):
        with raises_case(TaskError, "outputs") as caught:
            self.loss(way, torch.zeros(5, 3), torch.zeros(5, 4), torch.zeros(5).long())
        assert "(5, 3)" in caught.value.got and "(5, 4)" in caught.value.got


def test_decoupled_distillation_grows_over_the_first_part_of_the_training():
    student, teacher = two(0)
    target = teacher.argmax(1)
    whole = decoupled(student, teacher, target, 4.0, 1.0, 4.0)

    def loss(done, **settings):
        lesson = DistillationInputs(student, teacher, target, {}, {}, done)
        return distill.DKD(**settings).loss(lesson)(lesson) / whole

    fractions = [float(loss(done, warmup=0.2)) for done in (0.0, 0.05, 0.1, 0.2, 0.9)]
    assert fractions == pytest.approx([0.0, 0.25, 0.5, 1.0, 1.0])
    assert float(loss(0.0, warmup=0.0)) == pytest.approx(1.0)
    for wrong in (-0.1, 1.1):
        with raises_setting("warmup"):
            distill.DKD(warmup=wrong)


def test_decoupled_distillation_leaves_out_labels_below_0():
    student, teacher = two(0, samples=6)
    student.requires_grad_()
    target = teacher.argmax(1)
    target[[1, 4]] = -100
    rest = [0, 2, 3, 5]

    def loss(target, keep=slice(None)):
        lesson = DistillationInputs(student[keep], teacher[keep], target, {}, {})
        return distill.DKD().loss(lesson)(lesson)

    assert torch.allclose(loss(target), loss(target[rest], rest))
    assert torch.allclose(loss(target[rest].to(torch.uint8), rest), loss(target[rest], rest))
    nothing = loss(torch.full((6,), -100))
    nothing.backward()
    assert float(nothing.detach()) == 0 and not student.grad.any()


def test_labels_that_are_no_classes_are_refused():
    lesson = DistillationInputs(torch.zeros(2, 3), torch.zeros(2, 3), None, {}, {})
    with raises_case(TaskError, "not-classes"):
        distill.DKD().loss(lesson)(lesson)


@pytest.mark.parametrize("temperature", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("cls", [distill.Logits, distill.DKD, distill.DIST])
def test_a_temperature_is_above_0(cls, temperature):
    with raises_setting("temperature"):
        cls(temperature=temperature)


def test_weights_are_not_negative():
    with raises_setting("weight"):
        distill.HardLabels(weight=-1)


def test_soft_targets_are_those_of_torch():
    student, teacher = two(1)
    reference = F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean") * 16
    assert torch.allclose(soft_targets(student, teacher, 4.0), reference)


def values(seed, samples=5, width=4):
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huber(a, b):
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def length(v):
    return math.sqrt(sum(float(x) ** 2 for x in v))


@given(seed=SEEDS)
def test_hint(seed):
    a, b = values(seed), values(seed + 1)
    squares = [(float(x), float(y)) for x, y in zip(a.flatten(), b.flatten(), strict=True)]
    expected = sum((x - y) ** 2 for x, y in squares) / sum(y**2 for _, y in squares)
    assert float(hint(a, b)) == pytest.approx(expected, rel=1e-9)


@given(seed=SEEDS)
def test_attention_transfer(seed):
    a, b = values(seed, 2, 3 * 4).reshape(2, 3, 2, 2), values(seed + 1, 2, 5 * 4).reshape(2, 5, 2, 2)

    def maps(x):
        rows = [[sum(float(c[i, j]) ** 2 for c in sample) for i in range(2) for j in range(2)] for sample in x]
        return [[value / length(row) for value in row] for row in rows]

    rows = [sum((p - q) ** 2 for p, q in zip(*pair, strict=True)) for pair in zip(maps(a), maps(b), strict=True)]
    assert float(attention_transfer(a, b)) == pytest.approx(sum(rows) / 2, rel=1e-9)


def test_attention_of_two_sizes_is_compared_at_the_smaller():
    a = values(0, 2, 3 * 16).reshape(2, 3, 4, 4)
    averaged = F.avg_pool2d(a.square().sum(1, keepdim=True), 2).sqrt()
    assert float(attention_transfer(a, averaged)) == pytest.approx(0, abs=1e-12)


@given(seed=SEEDS)
def test_distances(seed):
    a, b = values(seed), values(seed + 1, width=7)

    def all_distances(x):
        lengths = [[length(p - q) for q in x] for p in x]
        mean = sum(map(sum, lengths)) / (5 * 4)
        return [d / mean for row in lengths for d in row]

    pairs = list(zip(all_distances(a), all_distances(b), strict=True))
    assert float(distances(a, b)) == pytest.approx(sum(huber(*p) for p in pairs) / 25, rel=1e-6)


@given(seed=SEEDS)
def test_angles(seed):
    a, b = values(seed, 4), values(seed + 1, 4, 7)

    def cosine(x, corner, i, j):
        u, v = x[i] - x[corner], x[j] - x[corner]
        return 0.0 if corner in (i, j) else sum(float(p) * float(q) for p, q in zip(u, v, strict=True)) / (
            length(u) * length(v))  # fmt: skip

    triples = [(c, i, j) for c in range(4) for i in range(4) for j in range(4)]
    expected = sum(huber(cosine(a, *t), cosine(b, *t)) for t in triples) / 64
    assert float(angles(a, b)) == pytest.approx(expected, rel=1e-6)


@given(seed=SEEDS)
def test_similarity_preserving(seed):
    a, b = values(seed), values(seed + 1, width=7)

    def rows(x):
        gram = [[sum(float(p) * float(q) for p, q in zip(u, v, strict=True)) for v in x] for u in x]
        return [[value / length(row) for value in row] for row in gram]

    squares = [(p - q) ** 2 for one, two in zip(rows(a), rows(b), strict=True) for p, q in zip(one, two, strict=True)]
    assert float(similarity_preserving(a, b)) == pytest.approx(sum(squares) / 25, rel=1e-9)


@pytest.mark.parametrize("compare", [distances, angles, similarity_preserving])
def test_relations_do_not_see_a_rotation(compare):
    a = values(0)
    turned = a @ torch.linalg.qr(values(1, 4, 4))[0]
    assert float(compare(a, turned)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("samples", [torch.randn(1, 3), torch.ones(4, 3)])
def test_without_a_distance_there_is_nothing_to_learn(samples):
    student = samples.clone().requires_grad_()
    lesson = DistillationInputs(student, torch.randn(len(samples), 3), None, {}, {})
    loss = distill.RKD().loss(lesson)(lesson)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("way", [distill.RKD(), distill.SimilarityPreserving(), distill.CRD()])
def test_relations_of_one_number_a_sample(way):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, generator=generator) for _ in range(2))
    seen = []
    for shape in ((6,), (6, 1)):
        lesson = DistillationInputs(student.reshape(shape), teacher.reshape(shape), None, {}, {})
        torch.manual_seed(0)
        seen.append(float(way.loss(lesson)(lesson)))
    assert seen[0] == seen[1] > 0


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 4, 7), (2, 8, 7)), ((2, 1, 7), (2, 8, 7)), ((2, 7, 4), (2, 7, 8)), ((2, 4), (2, 9)),
                             ((2, 4, 6, 6), (2, 8, 3, 3)), ((2, 4, 3, 3, 3), (2, 8, 3, 3, 3))]
)  # fmt: skip
def test_hints_of_other_widths(student, teacher):
    lesson = DistillationInputs(None, None, None, {"a": torch.randn(student)}, {"b": torch.randn(teacher)})
    term = distill.Hints(features=(("a", "b"),)).loss(lesson)
    assert float(term(lesson)) > 0 and len(list(term.parameters())) == 2


@pytest.mark.parametrize(("student", "teacher"), [((2, 4, 6), (2, 8, 7)), ((2, 4, 6, 6), (2, 4)), ((2, 4), (2, 4, 1))])
def test_hints_of_other_shapes_are_refused_before_the_training(student, teacher):
    lesson = DistillationInputs(None, None, None, {"a": torch.randn(student)}, {"b": torch.randn(teacher)})
    with raises_case(TaskError, "shape") as caught:
        distill.Hints(features=(("a", "b"),)).loss(lesson)
    assert str(student) in caught.value.got and str(teacher) in caught.value.got


def test_samples_that_coincide_have_finite_gradients():
    a = values(0)
    a[1] = a[0]
    a.requires_grad_()
    (distances(a, values(1)) + angles(a, values(1))).backward()
    assert torch.isfinite(a.grad).all()


@given(seed=SEEDS, temperature=st.floats(0.07, 2))
def test_contrastive(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    anchors, same, others = (
        F.normalize(torch.randn(n, 3, generator=generator, dtype=torch.float64), dim=1) for n in (4, 4, 6)
    )
    log_scale = torch.tensor(math.log(1.7), dtype=torch.float64)
    rows = []
    for i in range(4):
        ratio = math.exp(float((anchors[i] * same[i]).sum()) / temperature) / 1.7
        row = -math.log(ratio / (ratio + 6))
        for other in others:
            ratio = math.exp(float((anchors[i] * other).sum()) / temperature) / 1.7
            row -= math.log(6 / (ratio + 6))
        rows.append(row)
    assert float(contrastive(anchors, same, others, temperature, log_scale)) == pytest.approx(sum(rows) / 4, rel=1e-6)


def test_samples_that_were_seen_are_what_others_are_told_from():
    x, y = torch.randn(4, 5), torch.randn(4, 7)
    lesson = DistillationInputs(x, y, None, {}, {})
    term = distill.CRD(dimensions=3, negatives=6).loss(lesson)
    (pair,) = term.pairs
    mine, theirs = (F.normalize(embed(z), dim=1).detach() for embed, z in zip(pair.embed, (x, y), strict=True))
    first = torch.exp(mine @ theirs.t() / 0.07).mean().log()
    term(lesson)
    assert torch.equal(pair.seen_by_teacher[-4:], theirs) and not pair.seen_by_teacher[:2].any()
    assert pair.log_scales[0] == pytest.approx(float(first), rel=1e-5)
    result = float(term(lesson).detach())  # told from the four that were seen, and not from places that are still empty
    expected = contrastive(mine, theirs, theirs, 0.07, first) + contrastive(theirs, mine, mine, 0.07, first)
    assert result == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(pair.seen_by_teacher, torch.cat([theirs, theirs])[-6:])


def test_samples_that_all_look_alike_do_not_outweigh_the_labels():
    """As in a network that was not trained: with a scale of the first batch the loss was in the thousands."""
    generator = torch.Generator().manual_seed(0)
    students = [
        DistillationInputs(*(1 + 0.05 * torch.randn(32, 8, generator=generator) for _ in range(2)), None, {}, {})
        for _ in range(40)
    ]
    term = distill.CRD(negatives=1024).loss(students[0])
    told = [float(term(lesson).detach()) for lesson in students]
    assert max(told) < 2 * (math.log(1024) + 2)


@given(seed=SEEDS)
def test_layer_to_layer(seed):
    student, teacher = two(seed)
    slow = sum((a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)) / 20
    assert float(layer_to_layer(student, teacher)) == pytest.approx(slow, rel=1e-9)


def test_layers_of_other_widths_need_adapters_and_other_heads_are_refused():
    values = {"a": torch.randn(2, 4, 6), "b": torch.randn(2, 4, 9), "a:scores": torch.randn(2, 3, 4, 4)}
    values["b:scores"] = torch.randn(2, 3, 4, 4)
    lesson = DistillationInputs(None, None, None, values, values)
    term = distill.TinyBERT(hidden=(("a", "b"),), attention=(("a", "b"),)).loss(lesson)
    hidden, scores = term.adapters[0](values["a"]) - values["b"], values["a:scores"] - values["b:scores"]
    assert float(term(lesson)) == pytest.approx(float(hidden.square().mean() + scores.square().mean()), rel=1e-5)
    values["b:scores"] = torch.randn(2, 2, 4, 4)
    with raises_case(TaskError, "shape"):
        distill.TinyBERT(attention=(("a", "b"),)).loss(lesson)
    with raises_case(RecipeError, "no-features"):
        distill.TinyBERT()


@pytest.mark.parametrize("wrong", [{"dimensions": 0}, {"negatives": 1.5}, {"temperature": 0}])
def test_contrastive_settings_that_make_no_sense(wrong):
    with raises_setting(next(iter(wrong))):
        distill.CRD(**wrong)
