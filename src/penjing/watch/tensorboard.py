"""TensorBoard: a folder of event files for every run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penjing.errors import OutputError
from penjing.records.folder import writing
from penjing.watch.tracker import package, safe_name


class TensorBoard:
    """A folder for ``tensorboard --logdir``; each run has a folder of its own in it.

    Raises:
        MissingDependency: The package is not installed.
        OutputError: The folder can't be written.
    """

    def __init__(self, where: str) -> None:
        package("tensorboard", "tensorboard")
        self._writer = package("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._folder = Path(where).expanduser()
        if self._folder.exists() and not self._folder.is_dir():
            raise OutputError("the log can't be written to", code="log", got=f"{where} is a file", expected="a folder")
        with writing(self._folder, what="the folder of the log", remedy="tensorboard:DIR names another"):
            self._folder.mkdir(parents=True, exist_ok=True)
            probe = self._folder / ".penjing"
            probe.write_text("")
            probe.unlink()
        self._open: Any = None
        self._parameters: dict[str, Any] = {}
        self._last: dict[str, float] = {}

    def start(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Begin a folder of event files, with the parameters as a table."""
        self._open = self._writer(str(self._folder / safe_name(name)))
        rows = "\n".join(f"| {key} | {value} |" for key, value in parameters.items())
        self._open.add_text("parameters", f"| parameter | value |\n|---|---|\n{rows}")
        self._parameters = dict(parameters)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Add scalars."""
        for name, value in values.items():
            self._open.add_scalar(safe_name(name), value, step)
            if "/" not in name:  # a figure of the artifact, not a curve
                self._last[safe_name(name)] = value
        self._open.flush()

    def texts(self, values: Mapping[str, str]) -> None:
        """Add texts."""
        for name, text in values.items():
            self._open.add_text(safe_name(name), text)
        self._open.flush()

    def end(self, failure: str | None) -> None:
        """Close the file; the parameters and the artifact's figures also go to the tab of hyperparameters."""
        if failure is not None:
            self.texts({"failure": failure})
        if self._last:
            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self._parameters.items()}
            self._open.add_hparams(plain, {f"hparam/{k}": v for k, v in self._last.items()}, run_name=".")
        self._open.close()


open_tracker = TensorBoard
