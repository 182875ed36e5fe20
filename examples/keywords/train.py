"""Train the keyword spotter: ``python examples/keywords/train.py``. It writes spotter.safetensors next to this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.keywords.network import WEIGHTS, untrained
from examples.keywords.task import task
from examples.training import Settings, main

SETTINGS = Settings(epochs=20, learning_rate=4e-3)

if __name__ == "__main__":
    main(untrained, task, SETTINGS, WEIGHTS)
