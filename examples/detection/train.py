"""Train the detector: ``python examples/detection/train.py``. It writes detector.safetensors next to this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.detection.network import WEIGHTS, untrained
from examples.detection.task import task
from examples.training import Settings, main

SETTINGS = Settings(epochs=9, learning_rate=2e-3)

if __name__ == "__main__":
    main(untrained, task, SETTINGS, WEIGHTS)
