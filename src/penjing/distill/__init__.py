"""Distillation: one loss per file. Each is a setting of `penjing.Finetune(distill=...)`.

`FewerLayers` and `Student` are steps that create a student; `TeacherCache` is a teacher.
"""

from penjing.distill.attention import AttentionTransfer
from penjing.distill.crd import CRD
from penjing.distill.dist import DIST
from penjing.distill.dkd import DKD
from penjing.distill.fewer_layers import FewerLayers
from penjing.distill.hard import HardLabels
from penjing.distill.hints import Hints
from penjing.distill.logits import Logits
from penjing.distill.outputs import Outputs
from penjing.distill.rkd import RKD
from penjing.distill.similarity import SimilarityPreserving
from penjing.distill.standardized import StandardizedLogits
from penjing.distill.stored import TeacherCache
from penjing.distill.student import Student
from penjing.distill.tinybert import TinyBERT

__all__ = [
    "CRD",
    "DIST",
    "DKD",
    "RKD",
    "AttentionTransfer",
    "FewerLayers",
    "HardLabels",
    "Hints",
    "Logits",
    "Outputs",
    "SimilarityPreserving",
    "StandardizedLogits",
    "TeacherCache",
    "Student",
    "TinyBERT",
]
