import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from penjing.errors import CalibrationError
from penjing.tasks.task import Task, calibration_calls, fingerprint
from tests.raises import raises_case

X = torch.arange(24.0).reshape(4, 3, 2)


def task(calibration, example=None, **settings):
    return Task(example=torch.zeros(1, 3, 2) if example is None else example, calibration=calibration, **settings)


def refusal(code, calibration, example=None, **settings):
    with raises_case(CalibrationError, code) as caught:
        list(calibration_calls(task(calibration, example, **settings)))
    assert caught.value.remedy
    return caught.value


def test_every_form_becomes_a_call_of_tensors():
    for batch in (X, (X,), [X], X.numpy(), (X.numpy(),)):
        ((args, kwargs),) = calibration_calls(task([batch]))
        assert torch.equal(args[0], X) and kwargs == {}
    example = {"ids": torch.zeros(1, 3, dtype=torch.int64), "mask": torch.zeros(1, 3, dtype=torch.bool)}
    batch = {"mask": np.ones((2, 3), bool), "ids": np.ones((2, 3), np.int32)}
    ((args, kwargs),) = calibration_calls(task([batch], example))
    assert args == () and list(kwargs) == ["ids", "mask"] and kwargs["ids"].dtype == torch.int64


def test_types_of_the_same_kind_are_cast_to_the_example():
    ((args, _),) = calibration_calls(task([X.double()]))
    assert args[0].dtype == torch.float32


def test_nested_inputs_keep_their_structure():
    example = ([torch.zeros(1, 2), torch.zeros(1, 3)], {"k": torch.zeros(1)})
    batch = ([np.ones((4, 2)), np.ones((4, 3))], {"k": np.ones(4)})
    ((args, _),) = calibration_calls(task([batch], example))
    assert [t.shape[0] for t in args[0]] == [4, 4] and args[1]["k"].dtype == torch.float32


def test_a_dataloader_of_one_tensor_is_calibration_data():
    loader = DataLoader(TensorDataset(X), batch_size=2)
    assert [c[0][0].shape[0] for c in calibration_calls(task(loader))] == [2, 2]


def test_batches_are_never_held_all_at_once():
    alive = []

    class Stream:
        def __iter__(self):
            for _ in range(20):
                batch = torch.zeros(2, 3, 2)
                alive.append(weakref.ref(batch))
                yield batch
                del batch

    most = 0
    gc.freeze()  # what was there before is not looked through for every batch
    try:
        for _ in calibration_calls(task(Stream())):
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
    finally:
        gc.unfreeze()
    assert len(alive) == 20 and most <= 3


def test_limit_counts_batches():
    assert len(list(calibration_calls(task([X, X, X]), limit=2))) == 2


def test_missing_calibration_is_said_before_iterating():
    with raises_case(CalibrationError, "no-calibration") as caught:
        calibration_calls(task(None))
    assert caught.value.got == "Task.calibration is None"


def test_empty():
    assert refusal("empty", []).code == "empty"
    assert refusal("empty", (x for x in [])).code == "empty"
    assert refusal("empty-or-read", map(str, [])).code == "empty-or-read"


def test_not_iterable():
    assert refusal("not-iterable", 5).code == "not-iterable"


def test_a_generator_read_twice_is_told_from_an_empty_one():
    once = task(x for x in [X, X])
    assert len(list(calibration_calls(once, limit=1))) == 1
    with raises_case(CalibrationError, "read-once") as caught:
        list(calibration_calls(once))
    assert "DataLoader" in caught.value.remedy


def test_an_exhausted_map_is_recognised_by_what_it_lacks():
    once = task(map(torch.clone, [X]))
    assert len(list(calibration_calls(once))) == 1
    with raises_case(CalibrationError, "empty-or-read") as caught:
        list(calibration_calls(once))
    assert caught.value.got == "no batch in a map" and "__iter__" in caught.value.remedy


@pytest.mark.parametrize(
    ("calibration", "example"),
    [
        ([(X, torch.zeros(4, dtype=torch.int64))], None),
        (DataLoader(TensorDataset(X, torch.zeros(4)), batch_size=4), None),
        ([({"x": X}, torch.zeros(4))], {"x": torch.zeros(1, 3, 2)}),
        ([((X, X), torch.zeros(4))], (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.zeros(1))),
    ],
    ids=["pair", "loader", "dict", "nested"],
)
def test_a_training_loader_is_recognised(calibration, example):
    assert "(inputs, target) of a training loader" in refusal("inputs", calibration, example).remedy


def test_labels_in_a_dict_are_recognised():
    error = refusal("inputs", [{"x": X, "labels": X}], {"x": torch.zeros(1, 3, 2)})
    assert "calibration needs no labels" in error.remedy and "keywords x, labels" in error.got


def test_a_missing_input_is_an_error():
    assert refusal("inputs", [{"y": X}], {"x": torch.zeros(1, 3, 2)}).code == "inputs"


def test_the_batch_and_the_input_are_named():
    error = refusal("dtype", [{"x": X}, {"x": X}, {"x": X.int()}], {"x": torch.zeros(1, 3, 2)})
    assert "calibration batch 2, input 'x'" in error.what and "int32" in error.got and "float32" in error.expected


@pytest.mark.parametrize(
    ("batch", "code", "got", "expected"),
    [
        (torch.zeros(4, 3), "shape", "(4, 3)", "(any, 3, 2)"),
        (torch.zeros(4, 5, 2), "shape", "(4, 5, 2)", "(any, 3, 2)"),
        (torch.zeros(3, 2), "shape", "(3, 2)", "(any, 3, 2)"),
        (torch.zeros(0, 3, 2), "no-sample", "(0, 3, 2)", "at least one sample"),
    ],
)
def test_shapes(batch, code, got, expected):
    error = refusal(code, [batch])
    assert got in error.got and expected in error.expected
    assert ("stack the samples" in error.remedy) == (batch.shape == (3, 2))


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")])
def test_values_that_are_not_finite(bad, word):
    batch = X.clone()
    batch[1, 2, 0] = bad
    error = refusal("not-finite", [X, batch])
    assert f"1 of 24, the first is {word} at [1, 2, 0]" in error.got and "calibration batch 1, input 0" in error.what


def test_what_is_no_tensor():
    refusal("not-a-tensor", [["a"]])
    refusal("no-numbers", [np.array(["a"])])
    assert "calibration batch 0" in refusal("no-numbers", [np.array([object()])]).what


def test_constants_must_equal_the_example():
    example = {"x": torch.zeros(1, 2), "flag": True}
    assert len(list(calibration_calls(task([{"x": torch.zeros(4, 2), "flag": True}], example)))) == 1
    assert "input 'flag'" in refusal("constant", [{"x": torch.zeros(4, 2), "flag": False}], example).what


def test_dynamic_axes_vary_and_fixed_ones_do_not():
    ids = {"ids": torch.zeros(1, 5, dtype=torch.int64)}
    longer = [{"ids": torch.zeros(2, 9, dtype=torch.int64)}]
    assert "(any, 5)" in refusal("shape", longer, ids).expected
    for dynamic in ({"ids": {0: "batch", 1: "length"}}, {0: {0: "batch", 1: "length"}}):
        assert len(list(calibration_calls(task(longer, ids, dynamic=dynamic)))) == 1
    positional = task([torch.zeros(2, 9)], torch.zeros(1, 5), dynamic={"x": {0: "batch", 1: "length"}})
    assert len(list(calibration_calls(positional))) == 1
    assert "(1, 5)" in refusal("shape", [torch.zeros(2, 5)], torch.zeros(1, 5), dynamic={}).expected


def test_fingerprint_depends_on_values_types_shapes_and_places():
    def of(*calls):
        return fingerprint(calls)

    base = of(((X,), {}))
    assert base == of(((X.clone(),), {})) == of(((X.numpy(),), {}))
    assert base == of(((X.transpose(1, 2).contiguous().transpose(1, 2),), {}))  # strides are no matter
    others = [
        of(((X + 1,), {})),
        of(((X.double(),), {})),
        of(((X.reshape(4, 6),), {})),
        of(((), {"x": X})),
        of(((X[:2],), {}), ((X[2:],), {})),
        of(((X, X), {})),
        of(((X.to(torch.bfloat16),), {})),
        of(((X, True), {})),
    ]
    assert len({base, *others}) == len(others) + 1
    assert of(((), {"a": X, "b": X + 1})) == of(((), {"b": X + 1, "a": X}))


@pytest.mark.parametrize("dynamic", [{"x": {1: "length"}}, {0: {1: "length"}}, {}])
def test_an_axis_of_samples_that_is_not_named_is_told(dynamic):
    batch = torch.zeros(4, 9 if dynamic else 5)
    named = "x" in dynamic
    example = {"x": torch.zeros(1, 5)} if named else torch.zeros(1, 5)
    error = refusal("shape", [{"x": batch} if named else batch], example, dynamic=dynamic)
    assert "axis 0 as well" in error.remedy and "{0: 'batch'" in error.remedy
    other = refusal("shape", [torch.zeros(4, 9)], torch.zeros(1, 5), dynamic={})  # axis 1 differs too
    assert "axis 0 as well" not in other.remedy
