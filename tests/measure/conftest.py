import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def openers(monkeypatch):
    """Let worker processes import `tiny_openers`."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in paths if p))


@pytest.fixture
def tray(tmp_path):
    """Make an artifact folder with a small matrix and further text files in it."""

    def make(name: str, size: int = 8, **files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        np.save(folder / "matrix.npy", np.eye(size, dtype=np.float32))
        for file, text in files.items():
            (folder / f"{file}.txt").write_text(text)
        return folder

    return make
