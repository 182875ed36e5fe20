from penjing.records import LayerRow
from penjing.report import skyline
from tests.report import sample_records


def test_heights_are_proportional_and_no_work_is_lost():
    rows = sample_records.deep().layers
    drawn = skyline.skyline(rows)
    panel = drawn.panels[0]
    assert len(panel.columns) == 150 and drawn.shared == 1
    heights = [sum(b.height for b in c.blocks) for c in panel.columns]
    most = max(r.macs for r in rows)
    for height, row in zip(heights, rows, strict=True):
        assert abs(height - (panel.bottom - panel.top) * row.macs / most) < 0.61
    assert max(heights) <= panel.bottom - panel.top + 0.01


def test_thousands_of_layers_share_columns_by_their_arithmetic():
    rows = [LayerRow(name=f"l{i}", kind="conv", macs=1, executed="int8" if i % 2 else "fp32") for i in range(3000)]
    drawn = skyline.skyline(rows)
    panel = drawn.panels[0]
    assert len(panel.columns) <= 220 and drawn.shared == 14
    assert {b.family for b in panel.columns[0].blocks} == {"integer", "float"}
    assert "l0 to l13 (14 layers)" in panel.columns[0].title
    assert panel.total == "3.00 k MACs"
    assert panel.columns[-1].x + panel.columns[-1].width <= drawn.right + 0.1


def test_a_measure_that_is_zero_everywhere_draws_nothing():
    drawn = skyline.skyline([LayerRow(name="relu", kind="relu", activation_bytes=4)] * 61)
    assert not any(c.blocks for c in drawn.panels[0].columns)


def test_shares_add_up_to_one_and_the_heaviest_keep_their_order():
    rows = sample_records.deep().layers
    shares = skyline.shares(rows)
    assert abs(sum(part for _, _, part in shares) - 1) < 1e-9
    assert sum(count for _, count, _ in shares) == 150
    heavy = skyline.heaviest(rows, 20)
    assert [rows.index(r) for r in heavy] == sorted(rows.index(r) for r in heavy)
    assert min(r.macs for r in heavy) >= max(r.macs for r in rows if r not in heavy)
