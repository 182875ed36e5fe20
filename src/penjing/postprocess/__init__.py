"""Decoding and non-maximum suppression inside the artifact, as a module around a detector.

>>> from penjing import postprocess
>>> postprocess.Detections.__name__, postprocess.GridBoxes.__name__
('Detections', 'GridBoxes')
"""

from penjing.postprocess.decoding import GridBoxes
from penjing.postprocess.detections import Detections

__all__ = ["Detections", "GridBoxes"]
