"""How four numbers describe a box, and how to tell that they describe it in another way."""

from __future__ import annotations

import torch

from penjing.errors import SourceError, UsageError

CONVENTIONS = {
    "xyxy": "left, top, right, bottom",
    "yxyx": "top, left, bottom, right",
    "xywh": "left, top, width, height",
    "cxcywh": "centre x, centre y, width, height",
}
ENOUGH = 8  # boxes that a judgement takes


def known(convention: str) -> str:
    """Return the convention.

    Raises:
        UsageError: It is none of `CONVENTIONS`.
    """
    if convention not in CONVENTIONS:
        raise UsageError(
            "boxes can't be read in this way",
            code="unknown-convention",
            field="boxes",
            got=repr(convention),
            expected=" or ".join(f"{name!r} ({words})" for name, words in CONVENTIONS.items()),
        )
    return convention


def corners(boxes: torch.Tensor, convention: str) -> torch.Tensor:
    """Return boxes (…, 4) as left, top, right, bottom."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if convention == "yxyx":
        return torch.cat([first.flip(-1), second.flip(-1)], -1)
    if convention == "xywh":
        return torch.cat([first, first + second], -1)
    if convention == "cxcywh":
        return torch.cat([first - second / 2, first + second / 2], -1)
    return boxes


def check(boxes: torch.Tensor, convention: str) -> None:
    """Refuse boxes (n, 4) that look like another convention; few boxes, and those of no convention, are not judged.

    Raises:
        SourceError: They do; it names the other convention.
    """
    if len(boxes) < ENOUGH:
        return
    first, second = boxes.detach()[:, :2], boxes.detach()[:, 2:]
    turned = float((second < first).any(1).float().mean())
    if convention in ("xyxy", "yxyx") and turned > 0.5 and bool((second > 0).all()):
        got, looks = f"{turned:.0%} of {len(boxes)} boxes end before they begin", "cxcywh"
    elif convention in ("xywh", "cxcywh") and turned == 0 and _scattered(boxes.detach()):
        got, looks = f"all of {len(boxes)} boxes would reach far beyond the left and the top", "xyxy"
    else:
        return
    raise SourceError(
        f"the network's boxes are not {CONVENTIONS[convention]}",
        code="boxes",
        field="boxes",
        got=f"{got}: they look like {looks!r}{' or xywh' if looks == 'cxcywh' else ''}",
        expected=f"boxes={convention!r}, {CONVENTIONS[convention]}",
        remedy=f"boxes={looks!r}",
    )


def _scattered(boxes: torch.Tensor) -> bool:
    """Whether boxes (n, 4), read as corners, are those of several objects: one that fills the image has alike ones."""
    first, second = boxes[:, :2], boxes[:, 2:]
    inner = (torch.minimum(second[0], second) - torch.maximum(first[0], first)).clamp(min=0).prod(1)
    areas = (second - first).clamp(min=0).prod(1)
    return float((inner / (areas[0] + areas - inner).clamp(min=1e-12)).median()) < 0.1


__all__ = ["CONVENTIONS", "check", "corners", "known"]
