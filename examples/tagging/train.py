"""Train the tagger: ``python examples/tagging/train.py``. It writes tagger.safetensors next to this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.tagging.network import WEIGHTS, untrained
from examples.tagging.task import task
from examples.training import Settings, main

SETTINGS = Settings(epochs=5, learning_rate=3e-3)

if __name__ == "__main__":
    main(untrained, task, SETTINGS, WEIGHTS)
