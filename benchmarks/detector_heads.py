"""Three heads of other kinds on the example detector's trunk: does INT8 keep their mAP, and does `inspect` say where?

Anchors with exponential sizes (SSD), distances to four sides with a centre-ness (FCOS), and peaks of a heat map
(CenterNet). The trunk is the trained one of examples/detection and stays as it is; the heads are trained for some
epochs on the same scenes, and judged on the same test scenes. Penjing's INT8 is what `compress` tries first.

    python benchmarks/detector_heads.py [--only anchors] [--epochs 2] [--folder DIR]

A head whose weights lie in --folder is not trained again.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fields
from safetensors.torch import load_file

import penjing as pj
from examples.detection.loss import _grid, _overlaps, _responsible
from examples.detection.network import STRIDES, Convolution, detector
from examples.detection.task import CALIBRATION, Batches
from examples.stamps import CLASSES, SELECT_SCENES, SIDE, TEST_SCENES, TRAIN_SCENES, normalise, scenes
from examples.training import Settings, save, train
from penjing import measure
from penjing.network.capture import capture_network
from penjing.quantize.output_branches import meeting
from penjing.tasks.outputs import numpy_predictor

CELLS = tuple(SIDE // stride for stride in STRIDES)
RUNTIMES = ("onnxruntime", "openvino")
LIMIT = 0.005  # of mAP, that INT8 may lose without `inspect` having named layers


class Trunk(nn.Module):
    """The trained detector without its heads: (N, 3, 160, 160) to (N, 64, 20, 20) and (N, 64, 10, 10)."""

    def __init__(self) -> None:
        super().__init__()
        trained = detector()
        self.stem, self.middle, self.deep = trained.stem, trained.middle, trained.deep
        self.narrow, self.merge = trained.narrow, trained.merge
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "Trunk":
        """Stay in eval mode: the trunk is trained already."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        middle = self.middle(self.stem(images))
        deep = self.narrow(self.deep(middle))
        return self.merge(middle + nn.functional.interpolate(deep, scale_factor=2.0, mode="nearest")), deep


class Anchors(nn.Module):
    """Liu et al., "SSD", ECCV 2016: three boxes a cell, moved and scaled; one layer gives all columns of a level."""

    boxes = "cxcywh"
    shapes = (((32.0, 32.0), (26.0, 42.0), (42.0, 26.0)), ((68.0, 68.0), (52.0, 88.0), (88.0, 52.0)))  # in pixels

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.levels = nn.ModuleList(
            nn.Sequential(Convolution(64, 64), nn.Conv2d(64, 3 * (4 + len(CLASSES)), 1)) for _ in STRIDES
        )
        for level in self.levels:
            with torch.no_grad():
                level[-1].bias.view(3, -1)[:, 4:] = -4.0  # few boxes hold an object
        centres, _ = _grid(sum(cells**2 for cells in CELLS))
        sides = torch.cat(
            [torch.tensor(shape).repeat(cells**2, 1) for shape, cells in zip(self.shapes, CELLS, strict=True)]
        )
        self.register_buffer("priors", torch.cat([centres.repeat_interleave(3, 0), sides], 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 160, 160) to (N, 1500, 4 + classes)."""
        rows = [
            level(features).float().permute(0, 2, 3, 1).reshape(images.shape[0], -1, 4 + len(CLASSES))
            for level, features in zip(self.levels, self.trunk(images), strict=True)
        ]
        rows = torch.cat(rows, 1)
        centres = self.priors[:, :2] + 0.1 * rows[..., :2] * self.priors[:, 2:]
        sides = self.priors[:, 2:] * (0.2 * rows[..., 2:4].clamp(-8, 8)).exp()
        return torch.cat([centres, sides, rows[..., 4:].sigmoid()], -1)

    def loss(self, output: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Boxes belong to the object that they overlap by a half, and to that which overlaps them most."""
        priors = torch.cat(
            [self.priors[:, :2] - self.priors[:, 2:] / 2, self.priors[:, :2] + self.priors[:, 2:] / 2], 1
        )
        pairs = truth[:, None, :, :4].expand(-1, len(priors), -1, -1), priors[:, None].expand(len(truth), -1, 4, -1)
        overlap = _overlaps(pairs[0].reshape(-1, 4), pairs[1].reshape(-1, 4))[0].reshape(*pairs[0].shape[:3])
        overlap = overlap.masked_fill(truth[:, None, :, 4] < 0, 0)
        best = overlap == overlap.amax(1, keepdim=True).clamp(min=0.1)
        most, row = torch.where(best, 1.0, overlap).max(-1)
        boxes = torch.cat([output[..., :2] - output[..., 2:4] / 2, output[..., :2] + output[..., 2:4] / 2], -1)
        return rows_loss(boxes, output[..., 4:], row.masked_fill(most < 0.5, -1), truth)


class Distances(nn.Module):
    """Tian et al., "FCOS", ICCV 2019: distances to the four sides of the box, and how central a cell is."""

    boxes = "xyxy"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.sides = nn.ModuleList(nn.Sequential(Convolution(64, 64), nn.Conv2d(64, 5, 1)) for _ in STRIDES)
        self.scores = nn.ModuleList(nn.Sequential(Convolution(64, 64), nn.Conv2d(64, len(CLASSES), 1)) for _ in STRIDES)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        for level, scores in zip(self.sides, self.scores, strict=True):
            nn.init.constant_(level[-1].bias, 2.0)
            nn.init.constant_(scores[-1].bias, -4.0)
        centres, strides = _grid(sum(cells**2 for cells in CELLS))
        self.register_buffer("centres", centres)
        self.register_buffer("strides", strides[:, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 160, 160) to (N, 500, 4 + classes)."""
        distances, central, scores = [], [], []
        for i, features in enumerate(self.trunk(images)):
            sides = self.sides[i](features).float().flatten(2).transpose(1, 2)
            distances.append(nn.functional.relu(sides[..., :4] * self.scales[i]))
            central.append(sides[..., 4:].sigmoid())
            scores.append(self.scores[i](features).float().flatten(2).transpose(1, 2).sigmoid())
        away = torch.cat(distances, 1) * self.strides
        boxes = torch.cat([self.centres - away[..., :2], self.centres + away[..., 2:]], -1)
        return torch.cat([boxes, (torch.cat(scores, 1) * torch.cat(central, 1) + 1e-6).sqrt()], -1)

    def loss(self, output: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Cells near the centre of an object of their level's size find it, as in the example."""
        return rows_loss(output[..., :4], output[..., 4:], _responsible(truth, output.shape[1]), truth)


class Peaks(nn.Module):
    """Zhou et al., "Objects as Points", 2019 (CenterNet): peaks of a heat map, a shift and a size each."""

    boxes = "cxcywh"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.heat = nn.Sequential(Convolution(64, 64), nn.Conv2d(64, len(CLASSES), 1))
        self.places = nn.Sequential(Convolution(64, 64), nn.Conv2d(64, 4, 1))
        nn.init.constant_(self.heat[-1].bias, -3.0)
        self.register_buffer("cells", _grid(CELLS[0] ** 2)[0] / STRIDES[0] - 0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 160, 160) to (N, 400, 4 + classes)."""
        features, _ = self.trunk(images)
        heat = self.heat(features).float().sigmoid()
        if not self.training:
            heat = heat * (nn.functional.max_pool2d(heat, 3, 1, 1) == heat)
        places = self.places(features).float().flatten(2).transpose(1, 2)
        boxes = torch.cat([(self.cells + places[..., :2]) * STRIDES[0], places[..., 2:] * 10 * STRIDES[0]], -1)
        return torch.cat([boxes, heat.flatten(2).transpose(1, 2)], -1)

    def loss(self, output: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """A focal loss against bells of the objects' sizes, and how far the boxes of the central cells are away."""
        centres = _grid(output.shape[1])[0]
        middle, sides = (truth[..., :2] + truth[..., 2:4]) / 2, truth[..., 2:4] - truth[..., :2]
        valid = truth[..., 4] >= 0
        own = ((centres[:, None] - middle[:, None]).abs() <= STRIDES[0] / 2).all(-1) & valid[:, None]  # (N, cells, M)
        away = ((centres[:, None] - middle[:, None]) / (sides[:, None].clamp(min=1) / 6)).square().sum(-1)
        bells = torch.where(own, 1.0, (-away / 2).exp() * valid[:, None])
        kinds = nn.functional.one_hot(truth[..., 4].clamp(min=0).long(), len(CLASSES))  # (N, M, classes)
        target = (bells[..., None] * kinds[:, None]).amax(2)
        heat = output[..., 4:].float().clamp(1e-4, 1 - 1e-4)
        right = (target == 1) * (1 - heat).square() * heat.log()
        wrong = (target < 1) * (1 - target).pow(4) * heat.square() * (1 - heat).log()
        image, cell, row = own.nonzero(as_tuple=True)
        aims = torch.cat([middle, sides], -1)[image, row]
        return (0.1 * (output[image, cell, :4] - aims).abs().sum() - (right + wrong).sum()) / max(1, len(image))


def rows_loss(
    boxes: torch.Tensor, scores: torch.Tensor, responsible: torch.Tensor, truth: torch.Tensor
) -> torch.Tensor:
    """GIoU for the boxes of responsible rows, and a focal loss of the scores against the boxes' quality."""
    scores = scores.float().clamp(1e-6, 1 - 1e-6)
    image, cell = (responsible >= 0).nonzero(as_tuple=True)
    aims = truth[image, responsible[image, cell]]
    overlap, generalized = _overlaps(boxes[image, cell].float(), aims[:, :4])
    quality = torch.zeros_like(scores)
    quality[image, cell, aims[:, 4].long()] = overlap.detach().clamp(0.1, 1)
    surprise = -(quality * scores.log() + (1 - quality) * (1 - scores).log())
    return (((scores - quality).square() * surprise).sum() + 2 * (1 - generalized).sum()) / max(1, len(image))


HEADS = {"anchors": Anchors, "distances": Distances, "peaks": Peaks}


def trained(name: str, folder: Path, epochs: int) -> tuple[nn.Module, float | None]:
    """A head with its weights, trained where they are missing, and the processor's seconds of the training."""
    torch.manual_seed(0)
    network, file, seconds = HEADS[name](), folder / f"{name}.safetensors", None
    if not file.is_file():
        start = time.process_time()
        train(network, Batches(scenes("train", TRAIN_SCENES)), network.loss, Settings(epochs, learning_rate=3e-3))
        seconds = time.process_time() - start
        save(network, file)
    network.load_state_dict(load_file(file))
    return network.eval(), seconds


def main() -> None:
    """Run all, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "penjing-detector-heads")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/detector_heads.json")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(fields.THREADS)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"heads": {}}
    results |= {"machine": dataclasses.asdict(measure.machine(fields.THREADS)), "versions": measure.versions()}
    test = scenes("test", SELECT_SCENES + TEST_SCENES).part(SELECT_SCENES, SELECT_SCENES + TEST_SCENES)
    calibration = normalise(scenes("train", TRAIN_SCENES).images[:CALIBRATION])
    for name in arguments.only:
        network, seconds = trained(name, arguments.folder, arguments.epochs)
        task = pj.tasks.detection(
            (normalise(test.images), test.boxes), boxes=network.boxes, calibration=calibration, name=name
        )
        row = results["heads"].setdefault(name, {})
        if seconds is not None:
            row |= {"epochs": arguments.epochs, "processor_seconds": seconds}
        row["fp32"] = task.evaluate(numpy_predictor(network))
        row["named"] = [
            {"at": branch.name, "layers": list(branch.layers), "decoded": list(branch.decoded)}
            for branch in meeting(capture_network(network, *task.call()))
        ]
        for runtime in RUNTIMES:
            with tempfile.TemporaryDirectory() as aside:
                case = fields.Case("detection", network, task, Path(aside))
                row[runtime] = task.evaluate(fields.penjing(runtime)(case))
            lost = row["fp32"] - row[runtime]
            print(f"{name:<10} {runtime:<12} mAP {row['fp32']:.4f} → {row[runtime]:.4f}, lost {100 * lost:.2f} points; "
                  f"inspect names {len(row['named'])} places", flush=True)  # fmt: skip
            if lost > LIMIT and not row["named"]:
                print(f"{name}: a loss that inspect did not announce", flush=True)
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
