"""Weights & Biases: a run of a project, on their server, on one of your own, or offline in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from penjing.watch.tracker import ANSWER_S, check_server, package, unreachable, within

_OFFLINE = ("offline", "dryrun", "disabled")


class Wandb:
    """A PROJECT, or ENTITY/PROJECT; ``WANDB_MODE=offline`` writes into a folder alone.

    Its own measurements of the machine are turned off: they would run while artifacts are timed.

    Raises:
        MissingDependency: The package is not installed.
        OutputError: The name is none that it takes, nobody is logged in, or its server does not answer in ten seconds.
    """

    def __init__(self, where: str) -> None:
        wandb = package("wandb", "wandb")
        entity, _, project = where.rpartition("/")
        remedy = "WANDB_MODE=offline writes into a folder, and `wandb sync` sends it later"
        try:
            known = wandb.setup().settings
            mode = os.environ.get("WANDB_MODE", known.mode or "online").lower()
            start = time.monotonic()
            if mode not in _OFFLINE:
                check_server(known.base_url)
                if not within(ANSWER_S / 2, lambda: wandb.login(prompt=False)):
                    raise PermissionError("nobody is logged in: `wandb login`, or set WANDB_API_KEY")
            settings = wandb.Settings(
                silent=True,
                console="off",
                x_disable_stats=True,
                x_disable_meta=True,
                save_code=False,
                disable_git=True,
                init_timeout=max(2.0, ANSWER_S - (time.monotonic() - start)),
            )
            self._run: Any = wandb.init(
                project=project, entity=entity or None, mode=mode, settings=settings, reinit="create_new"
            )
        except Exception as error:  # wandb's own, those of its settings, of the network
            raise unreachable(where, error, remedy) from None

    def start(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Name the run, and set its configuration."""
        self._run.name = name
        self._run.define_metric("*", step_metric="step")
        self._run.config.update(dict(parameters), allow_val_change=True)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers; steps of different curves go on at their own pace, so that the step is a number of its own."""
        self._run.log({**values, "step": step})

    def texts(self, values: Mapping[str, str]) -> None:
        """Texts of the summary."""
        self._run.summary.update(dict(values))

    def end(self, failure: str | None) -> None:
        """Finish the run, with an exit code."""
        if failure is not None:
            self.texts({"failure": failure})
        self._run.finish(exit_code=0 if failure is None else 1)


open_tracker = Wandb
