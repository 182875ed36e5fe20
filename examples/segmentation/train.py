"""Train the U-Net: ``python examples/segmentation/train.py``. It writes unet.safetensors next to this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.segmentation.network import WEIGHTS, untrained
from examples.segmentation.task import task
from examples.training import Settings, main

SETTINGS = Settings(epochs=3, learning_rate=2e-3)

if __name__ == "__main__":
    main(untrained, task, SETTINGS, WEIGHTS)
