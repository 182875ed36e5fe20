"""The detector's loss: GIoU for boxes, and a focal loss whose target is the box's quality.

Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019; Li et al., "Generalized Focal Loss", NeurIPS 2020.
"""

import torch

FINE_CELLS = 400  # the first rows of the output, 8 pixels a cell
LARGE = 44.0  # boxes with a longer side belong to the coarse grid, in pixels
REACH = 1.5  # cells around an object's centre that have to find it


def detection_loss(output: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the loss as a scalar.

    Args:
        output: (N, 500, 4 + classes): centre, width, height in pixels, and scores from 0 to 1.
        truth: (N, M, 5): left, top, right, bottom in pixels, class; unused rows are -1.
    """
    output = output.float()
    boxes, scores = _corners(output[..., :4]), output[..., 4:].clamp(1e-6, 1 - 1e-6)
    responsible = _responsible(truth, len(output[0]))  # (N, 500), the row of truth or -1
    image, cell = (responsible >= 0).nonzero(as_tuple=True)
    aims = truth[image, responsible[image, cell]]
    overlap, generalized = _overlaps(boxes[image, cell], aims[:, :4])
    quality = torch.zeros_like(scores)
    quality[image, cell, aims[:, 4].long()] = overlap.detach().clamp(0.1, 1)
    surprise = -(quality * scores.log() + (1 - quality) * (1 - scores).log())
    focal = ((scores - quality).abs().square() * surprise).sum()
    return (focal + 2 * (1 - generalized).sum()) / max(1, len(image))


def _responsible(truth: torch.Tensor, cells: int) -> torch.Tensor:
    """The object that each cell has to find: the smallest whose centre is near, of the size of the cell's grid."""
    centres, strides = _grid(cells)
    valid = truth[..., 4] >= 0
    middle, sides = (truth[..., :2] + truth[..., 2:4]) / 2, truth[..., 2:4] - truth[..., :2]
    near = (centres[:, None] - middle[:, None]).abs().amax(-1) < REACH * strides[:, None]  # (N, cells, M)
    right_grid = (sides.amax(-1)[:, None] > LARGE) == (strides[:, None] > 8)
    areas = sides.prod(-1)[:, None].expand(near.shape)
    areas = areas.masked_fill(~(near & right_grid & valid[:, None]), torch.inf)
    smallest, row = areas.min(-1)
    return row.masked_fill(smallest.isinf(), -1)


def _grid(cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres (cells, 2) and strides (cells,) in pixels."""
    parts = []
    for count, stride in ((FINE_CELLS, 8.0), (cells - FINE_CELLS, 16.0)):
        side = round(count**0.5)
        index = torch.arange(count)
        parts.append(torch.stack([index % side + 0.5, index // side + 0.5, torch.ones(count)], -1) * stride)
    rows = torch.cat(parts)
    return rows[:, :2], rows[:, 2]


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def _overlaps(boxes: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row: intersection over union, and its generalized form, which also tells how far boxes are apart."""
    shared = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(0).prod(-1)
    hull = (torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])).prod(-1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(-1) + (others[:, 2:] - others[:, :2]).prod(-1) - shared
    overlap = shared / union.clamp(1e-6)
    return overlap, overlap - (hull - union) / hull.clamp(1e-6)
