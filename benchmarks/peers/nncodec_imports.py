"""Lets nncodec be imported without the packages that only its data sets, examples and federated learning use.

Imported before nncodec. What is not installed becomes an empty module whose attributes are empty classes; nothing of
them is used in coding. Packages that are installed stay as they are.
"""

import importlib.abc
import importlib.machinery
import sys
import types

UNUSED = set("PIL cv2 flwr h5py matplotlib pandas sentencepiece sklearn timm torchvision wandb".split())


class Empty(type):
    """A class whose attributes are such classes, and which can be called with anything."""

    def __new__(cls, name, bases=(), namespace=None):
        return super().__new__(cls, name, bases, {"__init__": lambda self, *a, **k: None} | (namespace or {}))

    def __init__(cls, name, bases=(), namespace=None):
        super().__init__(name, bases, namespace or {})

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name)


class Absent(types.ModuleType):
    """A package that is not installed."""

    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last one asked, so that it is asked for packages that are not installed alone."""

    def find_spec(self, name, path, target=None):
        unused = name.partition(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if unused else None

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        """An empty module has no code."""


sys.meta_path.append(Finder())
