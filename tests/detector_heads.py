"""The heads of well-known detectors on a small trunk: what they join, split and decode on the way to the outputs.

Weights are random, but magnitudes are those of trained detectors: boxes in pixels, scores that are mostly far below 1.
"""

import torch
import torch.nn.functional as F
from torch import nn

SIDE = 64
STRIDES = (8, 16, 32)
CLASSES = 3
WIDTH = 16


def conv(inputs, outputs, kernel=3, stride=1, groups=1):
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
    nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def scaled(layer, size, shift=0.0):
    """The layer with results of about this standard deviation, around `shift`."""
    with torch.no_grad():
        layer.weight.mul_(size / 2**0.5)
        layer.bias.fill_(shift)
    return layer


class Trunk(nn.Module):
    """Images to three maps at strides 8, 16 and 32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.down = conv(3, WIDTH, stride=2), conv(WIDTH, WIDTH, stride=2)
        self.levels = nn.ModuleList(conv(WIDTH, WIDTH, stride=2) for _ in STRIDES)

    def maps(self, x):
        x = F.relu(self.down(F.relu(self.stem(x))))
        maps = []
        for level in self.levels:
            x = F.relu(level(x))
            maps.append(x)
        return maps


def heads(outputs, size, shift=0.0):
    return nn.ModuleList(scaled(conv(WIDTH, outputs, 1), size, shift) for _ in STRIDES)


def grid(stride):
    side = SIDE // stride
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2).float()


class Yolox(Trunk):
    """Boxes, objectness and classes of every level in one tensor, as the network gives them."""

    def __init__(self):
        super().__init__()
        self.boxes, self.objects = heads(4, 1.0), heads(1, 2.0, -4.6)
        self.kinds = heads(CLASSES, 2.0, -3.0)

    def forward(self, x):
        rows = zip(self.maps(x), self.boxes, self.objects, self.kinds, strict=True)
        levels = [torch.cat([b(m), o(m).sigmoid(), k(m).sigmoid()], 1) for m, b, o, k in rows]
        return torch.cat([level.flatten(2) for level in levels], 2).permute(0, 2, 1)


class YoloxDecoded(Yolox):
    """The same with its boxes in pixels."""

    def __init__(self):
        super().__init__()
        self.register_buffer("grids", torch.cat([grid(s) for s in STRIDES]))
        strides = [torch.full((len(grid(s)), 1), float(s)) for s in STRIDES]
        self.register_buffer("strides", torch.cat(strides))

    def forward(self, x):
        raw = super().forward(x)
        centres = (raw[..., :2] + self.grids) * self.strides
        return torch.cat([centres, raw[..., 2:4].exp() * self.strides, raw[..., 4:]], -1)


class Yolov5(Trunk):
    """One convolution a level gives everything of three anchors; decoded by parts."""

    def __init__(self):
        super().__init__()
        self.all = heads(3 * (5 + CLASSES), 1.5)
        for layer in self.all:
            with torch.no_grad():
                layer.bias.view(3, -1)[:, 4:] -= 4.6

    def forward(self, x):
        levels = []
        for m, head, stride in zip(self.maps(x), self.all, STRIDES, strict=True):
            side = SIDE // stride
            y = head(m).view(-1, 3, 5 + CLASSES, side, side).permute(0, 1, 3, 4, 2).sigmoid()
            xy, wh, rest = y.split((2, 2, 1 + CLASSES), 4)
            xy = (xy * 2 - 0.5 + grid(stride).view(side, side, 2)) * stride
            y = torch.cat((xy, (wh * 2) ** 2 * 4 * stride, rest), 4)
            levels.append(y.reshape(-1, 3 * side * side, 5 + CLASSES))
        return torch.cat(levels, 1)


class Yolov4(Yolov5):
    """Decoded in place."""

    def forward(self, x):
        levels = []
        for m, head, stride in zip(self.maps(x), self.all, STRIDES, strict=True):
            side = SIDE // stride
            y = head(m).view(-1, 3, 5 + CLASSES, side, side).permute(0, 1, 3, 4, 2).sigmoid().clone()
            y[..., 0:2] = (y[..., 0:2] * 2 - 0.5 + grid(stride).view(side, side, 2)) * stride
            y[..., 2:4] = (y[..., 2:4] * 2) ** 2 * 4 * stride
            levels.append(y.reshape(-1, 3 * side * side, 5 + CLASSES))
        return torch.cat(levels, 1)


class Yolov8(Trunk):
    """Distances to the four sides as distributions over bins, and anchors."""

    BINS = 16

    def __init__(self):
        super().__init__()
        self.boxes, self.kinds = heads(4 * self.BINS, 2.0), heads(CLASSES, 2.0, -4.6)
        self.expect = nn.Conv2d(self.BINS, 1, 1, bias=False).requires_grad_(False)
        self.expect.weight.data[:] = torch.arange(self.BINS).view(1, self.BINS, 1, 1)
        self.register_buffer("anchors", torch.cat([grid(s) + 0.5 for s in STRIDES]).t())
        strides = [torch.full((len(grid(s)), 1), float(s)) for s in STRIDES]
        self.register_buffer("strides", torch.cat(strides).t())

    def forward(self, x):
        rows = zip(self.maps(x), self.boxes, self.kinds, strict=True)
        raw = torch.cat([torch.cat([b(m), k(m)], 1).flatten(2) for m, b, k in rows], 2)
        boxes, scores = raw.split((4 * self.BINS, CLASSES), 1)
        n, _, places = boxes.shape
        sides = self.expect(boxes.view(n, 4, self.BINS, places).transpose(2, 1).softmax(1)).view(n, 4, places)
        first, last = sides.chunk(2, 1)
        low, high = self.anchors - first, self.anchors + last
        boxes = torch.cat([(low + high) / 2, high - low], 1) * self.strides
        return torch.cat([boxes, scores.sigmoid()], 1)


class Yolov8Product(Yolov8):
    """The expected bin as a product with their numbers."""

    def forward(self, x):
        rows = zip(self.maps(x), self.boxes, self.kinds, strict=True)
        raw = torch.cat([torch.cat([b(m), k(m)], 1).flatten(2) for m, b, k in rows], 2)
        boxes, scores = raw.permute(0, 2, 1).split((4 * self.BINS, CLASSES), -1)
        sides = boxes.reshape(-1, 84, 4, self.BINS).softmax(-1).matmul(torch.arange(self.BINS).float())
        anchors = self.anchors.t()
        corners = torch.cat([anchors - sides[..., :2], anchors + sides[..., 2:]], -1) * self.strides.t()
        return torch.cat([corners, scores.sigmoid()], -1)


class Pose(Yolov8):
    """Boxes, a score and five points with their visibility in one tensor."""

    def __init__(self):
        super().__init__()
        self.points = heads(15, 1.5)

    def forward(self, x):
        detections = super().forward(x)
        points = torch.cat([h(m).flatten(2) for m, h in zip(self.maps(x), self.points, strict=True)], 2)
        points = points.view(-1, 5, 3, points.shape[-1])
        xy = (points[:, :, :2] * 2 + (self.anchors - 0.5)) * self.strides
        points = torch.cat([xy, points[:, :, 2:].sigmoid()], 2).flatten(1, 2)
        return torch.cat([detections, points], 1)


class Ssd(Trunk):
    """Offsets from default boxes, and classes by softmax, joined over levels."""

    def __init__(self):
        super().__init__()
        self.offsets, self.kinds = heads(2 * 4, 1.0), heads(2 * (1 + CLASSES), 2.0)
        centres = torch.cat([(grid(s) + 0.5).repeat_interleave(2, 0) * s for s in STRIDES])
        sizes = torch.cat([torch.tensor([[2.0, 2.0], [3.0, 1.5]]).repeat(len(grid(s)), 1) * s for s in STRIDES])
        self.register_buffer("centres", centres / SIDE)
        self.register_buffer("sizes", sizes / SIDE)
        for layer in self.kinds:
            with torch.no_grad():
                layer.bias.view(2, -1)[:, 0] += 5.0  # background

    def forward(self, x):
        maps = self.maps(x)
        offsets, kinds = (
            torch.cat(
                [h(m).permute(0, 2, 3, 1).reshape(m.shape[0], -1, last) for m, h in zip(maps, some, strict=True)], 1
            )
            for some, last in ((self.offsets, 4), (self.kinds, 1 + CLASSES))
        )
        centres = self.centres + offsets[..., :2] * 0.1 * self.sizes
        sizes = self.sizes * (offsets[..., 2:] * 0.2).exp()
        corners = torch.cat([centres - sizes / 2, centres + sizes / 2], -1) * SIDE
        return torch.cat([corners, kinds.softmax(-1)], -1)


class RetinaNet(Trunk):
    """Two outputs, each joined over levels."""

    def __init__(self):
        super().__init__()
        self.offsets, self.kinds = heads(3 * 4, 0.3), heads(3 * CLASSES, 1.5, -4.6)

    def forward(self, x):
        maps = self.maps(x)
        offsets, kinds = (
            torch.cat(
                [h(m).permute(0, 2, 3, 1).reshape(m.shape[0], -1, last) for m, h in zip(maps, some, strict=True)], 1
            )
            for some, last in ((self.offsets, 4), (self.kinds, CLASSES))
        )
        return {"boxes": offsets, "scores": kinds.sigmoid()}


class CenterNet(Trunk):
    """A heat map, its local maxima, and what stands at the best of them."""

    def __init__(self):
        super().__init__()
        self.heat, self.size, self.shift = (
            scaled(conv(WIDTH, n, 1), size, shift)
            for n, size, shift in ((CLASSES, 1.5, -3.0), (2, 10.0, 20.0), (2, 0.3, 0.5))
        )

    def forward(self, x):
        m = self.maps(x)[0]
        heat = self.heat(m).sigmoid()
        heat = heat * (F.max_pool2d(heat, 3, 1, 1) == heat)
        scores, places = heat.flatten(1).topk(8)
        area = m.shape[2] * m.shape[3]
        kinds, places = places // area, places % area
        both = torch.cat([self.size(m), self.shift(m)], 1).flatten(2).transpose(1, 2)
        both = both.gather(1, places.unsqueeze(-1).expand(-1, -1, 4))
        x, y = (places % m.shape[3]).float(), torch.div(places, m.shape[3], rounding_mode="floor").float()
        x, y = (x + both[..., 2]) * 8, (y + both[..., 3]) * 8
        w, h = both[..., 0], both[..., 1]
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        return torch.cat([corners, scores.unsqueeze(-1), kinds.unsqueeze(-1).float()], -1)


class CenterMaps(CenterNet):
    """The maps themselves, in one tensor."""

    def forward(self, x):
        m = self.maps(x)[0]
        return torch.cat([self.heat(m).sigmoid(), self.size(m), self.shift(m)], 1)


class Fcos(Trunk):
    """Distances by exp, scores weighed by how central a place is."""

    def __init__(self):
        super().__init__()
        self.sides, self.centre, self.kinds = heads(4, 0.7), heads(1, 1.0), heads(CLASSES, 1.5, -4.6)
        self.factors = nn.Parameter(torch.tensor([1.0, 1.2, 0.9]))

    def forward(self, x):
        levels = []
        for i, m in enumerate(self.maps(x)):
            sides = (self.sides[i](m) * self.factors[i]).exp() * STRIDES[i]
            scores = (self.kinds[i](m).sigmoid() * self.centre[i](m).sigmoid()).sqrt()
            sides, scores = (v.flatten(2).transpose(1, 2) for v in (sides, scores))
            at = (grid(STRIDES[i]) + 0.5) * STRIDES[i]
            levels.append(torch.cat([at - sides[..., :2], at + sides[..., 2:], scores], -1))
        return torch.cat(levels, 1)


class Detr(Trunk):
    """Queries that attend to the picture."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(6, WIDTH))
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kinds, self.boxes = nn.Linear(WIDTH, CLASSES + 1), nn.Linear(WIDTH, 4)

    def forward(self, x):
        m = self.maps(x)[1].flatten(2).transpose(1, 2)
        q = self.queries.expand(m.shape[0], -1, -1)
        h = self.norm(q + self.attend(q, m, m, need_weights=False)[0])
        h = F.relu(self.mix(h)) + h
        return torch.cat([self.boxes(h).sigmoid() * SIDE, self.kinds(h).softmax(-1)], -1)


class YuNet(Trunk):
    """Twelve outputs, each of one meaning and one level; one convolution gives all of a level."""

    def __init__(self):
        super().__init__()
        self.all = heads(1 + 1 + 4 + 10, 1.0)

    def forward(self, x):
        kinds, objects, boxes, points = [], [], [], []
        for m, head in zip(self.maps(x), self.all, strict=True):
            k, o, b, p = head(m).permute(0, 2, 3, 1).flatten(1, 2).split((1, 1, 4, 10), -1)
            kinds, objects = [*kinds, (k - 3).sigmoid()], [*objects, (o - 3).sigmoid()]
            boxes, points = [*boxes, b], [*points, p * 5]
        return (*kinds, *objects, *boxes, *points)


class BlazeFace(Trunk):
    """Boxes and six points in one tensor, raw scores in another, clipped."""

    def __init__(self):
        super().__init__()
        self.regressions, self.scores = heads(16, 20.0), heads(1, 3.0, -7.0)
        self.register_buffer("anchors", torch.cat([(grid(s) + 0.5) * s for s in STRIDES]) / SIDE)

    def forward(self, x):
        maps = self.maps(x)
        regressions, scores = (
            torch.cat([h(m).permute(0, 2, 3, 1).flatten(1, 2) for m, h in zip(maps, some, strict=True)], 1)
            for some in (self.regressions, self.scores)
        )
        xy = regressions[..., :2] / SIDE + self.anchors
        wh = regressions[..., 2:4] / SIDE
        points = regressions[..., 4:].unflatten(-1, (6, 2)) / SIDE + self.anchors.unsqueeze(1)
        boxes = torch.cat([xy - wh / 2, xy + wh / 2, points.flatten(-2)], -1)
        return boxes, scores.clamp(-100, 100).sigmoid().squeeze(-1)


class Classes(Trunk):
    """Segmentation that gives the class of every pixel."""

    def __init__(self):
        super().__init__()
        self.kinds = conv(WIDTH, 5, 1)

    def forward(self, x):
        return F.interpolate(self.kinds(self.maps(x)[0]), scale_factor=8.0, mode="bilinear").argmax(1)


HEADS = [
    Yolox, YoloxDecoded, Yolov4, Yolov5, Yolov8, Yolov8Product, Pose, Ssd, RetinaNet, CenterNet, CenterMaps, Fcos, Detr,
    YuNet, BlazeFace,
]  # fmt: skip
