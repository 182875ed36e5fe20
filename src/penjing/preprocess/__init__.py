"""Resizing and normalizing inside the artifact, as a module around a network.

>>> from penjing import preprocess
>>> preprocess.Images.__name__
'Images'
"""

from penjing.preprocess.images import Images

__all__ = ["Images"]
