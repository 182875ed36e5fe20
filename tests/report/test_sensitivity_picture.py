"""The scan of single groups as text and as a picture."""

import xml.etree.ElementTree as ElementTree

from penjing.records import SensitivityRow
from penjing.report import sensitivity

ROWS = (
    SensitivityRow(name="a<b>", units=16, macs=1000, removed=(2, 8), snr_db=(30.25, -1.5)),
    SensitivityRow(name="conv", units=8, macs=500, removed=(1, 4), snr_db=(None, 12.0)),
)


def test_every_figure_stands_in_the_text():
    lines = sensitivity.text(ROWS).splitlines()
    assert len(lines) == 3
    assert "30.2" in lines[1] and "50%:  −1.5" in lines[1] and "∞" in lines[2]


def test_the_picture_has_a_cell_and_a_title_for_each():
    root = ElementTree.fromstring(sensitivity.picture(ROWS))
    titles = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "a<b>: without 8 of 16: −1.5 dB" in titles and "conv: without 1 of 8: ∞ dB" in titles
    assert len([t for t in titles if t and "without" in t]) == 4
