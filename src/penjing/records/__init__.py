"""What a run writes: the record and its figures, manifest, events, run folder. Opens without torch."""

from penjing.records.json_form import from_dict, read, to_json
from penjing.records.layers import BranchesRow, CutRow, GroupRow, LayerRow, NoiseRow, SensitivityRow
from penjing.records.parity import Parity, ParityRow, Rejection
from penjing.records.record import (
    FORMAT,
    MOST_THREADS,
    WEIGHTS_FILE,
    Candidate,
    CurvePoint,
    Energy,
    GoalLimit,
    GoalResult,
    Latency,
    Machine,
    Measured,
    Record,
    Reference,
    StepCost,
    Training,
    Zeros,
)

__all__ = [
    "BranchesRow",
    "Candidate",
    "CurvePoint",
    "CutRow",
    "Energy",
    "FORMAT",
    "GoalLimit",
    "GoalResult",
    "GroupRow",
    "Latency",
    "LayerRow",
    "MOST_THREADS",
    "Machine",
    "Measured",
    "NoiseRow",
    "Parity",
    "ParityRow",
    "Record",
    "Reference",
    "Rejection",
    "SensitivityRow",
    "StepCost",
    "Training",
    "WEIGHTS_FILE",
    "Zeros",
    "from_dict",
    "read",
    "to_json",
]
