"""Train the demo's ResNet-20 with Penjing's own loop: ``python examples/fashion_mnist/train.py [--epochs 20]``.

It prints the test accuracy and writes resnet20.safetensors next to this file. If interrupted, it resumes.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.fashion_mnist.network import WEIGHTS, untrained
from examples.fashion_mnist.task import task as fashion_mnist_task
from penjing.network.capture import capture_network
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.train.finetune import Finetune
from penjing.train.loop import seed_everything


def main() -> None:
    """Train, test, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "penjing-train-resnet20")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    arguments.state.mkdir(parents=True, exist_ok=True)
    task = fashion_mnist_task()
    seed_everything(arguments.seed)
    source = untrained()
    started, shown = time.monotonic(), 0.0

    def show(kind: str, *, done: int, total: int, loss: float, **_: object) -> None:
        nonlocal shown
        if time.monotonic() - shown > 10 or done == total:
            shown = time.monotonic()
            print(f"step {done}/{total}  loss {loss:.4f}  {shown - started:.0f} s", flush=True)

    step = Finetune(epochs=arguments.epochs, learning_rate=0.2, weight_decay=5e-4)
    context = Context(task=task, seed=arguments.seed, events=show, folder=arguments.state)
    network = step(Draft(capture_network(source, *task.call())), context).network

    def predict(images):
        with torch.no_grad():
            return network(torch.from_numpy(images)).numpy()

    print(f"held-out accuracy {task.select(predict):.4f}, test accuracy {task.evaluate(predict):.4f}")
    state = {key: network.state_dict()[key].contiguous() for key in source.state_dict()}
    save_file(state, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
