"""Train the keyword spotter: ``python examples/keywords/train.py``. It writes spotter.safetensors next to this file."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.keywords.network import WEIGHTS, untrained
from examples.keywords.task import task
from examples.training import save, train
from examples.weights import load
from penjing.tasks.outputs import numpy_predictor


def main() -> None:
    """Train, test, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data = task()
    network = train(untrained(), data.train, data.loss, epochs=arguments.epochs, learning_rate=4e-3)
    save(network, arguments.out)
    print(f"{data.metric_name} {data.evaluate(numpy_predictor(load(untrained(), arguments.out))):.4f}")


if __name__ == "__main__":
    main()
