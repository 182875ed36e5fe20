import xml.etree.ElementTree as ET

from penjing.records import CutRow, GroupRow
from penjing.report import strips


def row(**more):
    cuts = (
        CutRow(tensor="a.weight", axis=0, role="its outputs", length=4, positions=(0, 1, 3), units=(0, 1, 2)),
        CutRow(tensor="a.bias", axis=0, role="its outputs", length=4, positions=(0, 1, 3), units=(0, 1, 2)),
        CutRow(tensor="b.weight", axis=1, role="its inputs", length=8, positions=(0, 1, 2, 3), units=(0, 0, 2, 2)),
    )
    told = {"name": "a", "units": 3, "macs": 10, "parameters": 20, "cuts": cuts, "because": ("b reads it",)}
    return GroupRow(**told | {"statistics": ()} | more)


def test_the_text_has_every_tensor_and_reason():
    text = strips.text(row(statistics=("norm",)))
    assert "a: 3 units" in text
    assert "b.weight axis 1 (its inputs): 4 of 8 positions" in text
    assert "because b reads it" in text
    assert "approximate: norm takes statistics over them" in text


def test_the_picture_is_svg_with_a_strip_for_every_weight():
    root = ET.fromstring(strips.picture(row()))
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("makes") == texts.count("reads") == 1
    assert "and 1 more tensors, cut in the same way" in texts
    assert "4 of 8" in texts


def test_one_colour_is_one_unit_and_neighbours_are_one_block():
    root = ET.fromstring(strips.picture(row()))
    filled = [r.attrib for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.attrib["fill"].startswith("hsl")]
    assert len(filled) == 3 + 2
    assert filled[0]["fill"] == filled[3]["fill"] != filled[4]["fill"] == filled[2]["fill"]


def test_names_are_escaped():
    assert "<script>" not in strips.picture(row(name="<script>"))
