"""Metrics of the built-in tasks, on NumPy arrays; a family of metrics a file."""

from penjing.tasks.metrics.detection import Detections, Objects, average_precisions, mean_average_precision
from penjing.tasks.metrics.ranking import auc, hit_rate, ndcg
from penjing.tasks.metrics.retrieval import cosine, ndcg_at, ranks, recall_at, reciprocal_rank
from penjing.tasks.metrics.segmentation import confusion, mean_dice, mean_iou
from penjing.tasks.metrics.tagging import entities, entity_f1

__all__ = [
    "Detections",
    "Objects",
    "auc",
    "average_precisions",
    "confusion",
    "cosine",
    "entities",
    "entity_f1",
    "hit_rate",
    "mean_average_precision",
    "mean_dice",
    "mean_iou",
    "ndcg",
    "ndcg_at",
    "ranks",
    "recall_at",
    "reciprocal_rank",
]
