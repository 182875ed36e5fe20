"""Learning rate schedules: from the completed fraction of the training to a fraction of the peak rate.

Cosine: Loshchilov & Hutter, "SGDR", ICLR 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
