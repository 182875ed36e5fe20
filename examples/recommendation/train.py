"""Train the NeuMF: ``python examples/recommendation/train.py``. It writes neumf.safetensors next to this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.recommendation.network import WEIGHTS, untrained
from examples.recommendation.task import task
from examples.training import Settings, main

SETTINGS = Settings(epochs=12, learning_rate=3e-3)

if __name__ == "__main__":
    main(untrained, task, SETTINGS, WEIGHTS)
