"""Handing the events of a run to what watches it from outside: MLflow, TensorBoard, Weights & Biases.

>>> from penjing import watch
>>> watch.KINDS
('mlflow', 'tensorboard', 'wandb')
"""

from penjing.watch.log import KINDS, Log, logging, open_log

__all__ = ["KINDS", "Log", "logging", "open_log"]
