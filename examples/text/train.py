"""Train the transformer: ``python examples/text/train.py``. It writes transformer.safetensors next to this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.text.network import WEIGHTS, untrained
from examples.text.task import task
from examples.training import Settings, main

SETTINGS = Settings(epochs=6, learning_rate=2e-3)

if __name__ == "__main__":
    main(untrained, task, SETTINGS, WEIGHTS)
