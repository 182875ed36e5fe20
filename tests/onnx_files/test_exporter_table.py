import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from penjing.onnx_files.exporter_table import read_once
from penjing.onnx_files.write import OPSET


def rows(table):
    return {target: [(f.onnx_function, f.is_complex) for f in entries] for target, entries in table.functions.items()}


def test_it_is_the_table_that_torch_builds():
    built = ONNXRegistry.from_torchlib(OPSET)
    with read_once(OPSET):
        copied = ONNXRegistry().from_torchlib(opset_version=OPSET)  # as the exporter calls it
    assert copied.opset_version == built.opset_version == OPSET
    assert len(built.functions) > 300 and rows(copied) == rows(built)


def test_operators_that_are_registered_later_get_their_rows():
    with read_once(OPSET):
        before = ONNXRegistry.from_torchlib(OPSET)
    import torch.ao.quantization.fx._decomposed  # noqa: F401  registers quantized_decomposed

    with read_once(OPSET):
        after = ONNXRegistry.from_torchlib(OPSET)
    assert any(str(name).startswith("quantized_decomposed") for name in after.functions)
    assert before.functions.keys() <= after.functions.keys()


def test_what_one_export_writes_into_its_table_no_other_reads():
    with read_once(OPSET):
        one = ONNXRegistry.from_torchlib(OPSET)
        name = next(iter(one.functions))
        one.functions[name].clear()
        one.functions["another"] = []
        other = ONNXRegistry.from_torchlib(OPSET)
    assert other.functions[name] and "another" not in other.functions


def test_outside_of_the_block_torch_builds_its_own():
    before = ONNXRegistry.__dict__["from_torchlib"]
    with pytest.raises(KeyError), read_once(OPSET):
        assert ONNXRegistry.__dict__["from_torchlib"] is not before
        raise KeyError
    assert ONNXRegistry.__dict__["from_torchlib"] is before
