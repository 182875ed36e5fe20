"""The trials of a search as an Optuna study: in a SQLite file of the run, or in any SQL server by its URL.

Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019. ``optuna-dashboard URL``
shows it. Beside what the search proposes by itself, the tree-structured Parzen estimator (Bergstra et al., NeurIPS
2011; several objectives: Ozaki et al., JAIR 2022) suggests choices from what was tried.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from penjing.errors import MissingDependency, OutputError, PenjingError
from penjing.search.choice import INTEGERS, TECHNIQUES, Choice
from penjing.search.space import Space

if TYPE_CHECKING:
    import optuna

NAME = "penjing"
ANSWER_S = 10.0  # that a database has to answer
_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}
_DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
_ASKED, _CHOICE, _RUN = "penjing: request", "penjing: choice", "penjing: run"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingDependency(
            "a search keeps its trials in Optuna",
            code="not-installed",
            got="no package optuna",
            expected="optuna",
            remedy="pip install 'penjing[search]'",
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Study:
    """The trials of one search.

    Args:
        url: Where they are kept, as SQLAlchemy writes it: ``sqlite:///runs/first/search/study.db``.
        asked: What determines the trials, as plain data; a study of another request is refused.
        axes: The figures of the goal, each with 1 where smaller is better and -1 where larger is.
        space: What may vary.
        seed: Of the suggestions.
        run: Tells the trials of this run from those of others in the same study.
        own: Whether the study lies in the run folder.

    Raises:
        MissingDependency: Optuna is not installed.
        OutputError: The study can't be opened, or is of another network, task or goal.
    """

    def __init__(
        self,
        url: str,
        asked: dict[str, Any],
        axes: Sequence[tuple[str, int]],
        space: Space,
        seed: int,
        *,
        run: str,
        own: bool,
    ) -> None:
        self.url, self.optuna, self.seed, self.axes = url, _optuna(), seed, tuple(axes)
        self.distributions = _distributions(self.optuna, space)
        self.space, self.run, self.own = space, run, own
        self._open: dict[int, Any] = {}
        directions = ["minimize" if sign > 0 else "maximize" for _, sign in axes]
        plain = json.loads(json.dumps(asked))
        with self._answering():
            self.study: optuna.Study = self.optuna.create_study(
                storage=url, study_name=NAME, directions=directions, load_if_exists=True
            )
            before = self.study.user_attrs.get(_ASKED)
            if before is None:
                self.study.set_user_attr(_ASKED, plain)
                with warnings.catch_warnings():  # that names of metrics are experimental
                    warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
                    self.study.set_metric_names([figure for figure, _ in axes])
        changed = [key for key in plain if before is not None and before.get(key) != plain[key]]
        if changed:
            raise OutputError(
                f"the study is of another search: {', '.join(changed)}",
                code="other-study",
                got=self.shown_url,
                expected="a study of the same network, task and goal, or a new one",
                remedy="another --study, or none: then it lies in the run folder",
            )

    @property
    def shown_url(self) -> str:
        """Where the trials are kept, without a password."""
        return _shown(self.url)

    def _answering(self) -> contextlib.AbstractContextManager[None]:
        return _answering(self.url, self.own)

    def begun(self) -> list[tuple[int, Choice]]:
        """Trials that were begun and have not ended: of a search that was interrupted."""
        mine = self._mine(self.optuna.trial.TrialState.RUNNING)
        self._open |= {t.number: self.optuna.trial.Trial(self.study, t._trial_id) for t in mine}
        return [(t.number, Choice(**t.user_attrs[_CHOICE])) for t in mine]

    def ended(self) -> list[tuple[int, Choice]]:
        """Trials that have ended, failed ones among them, in the order of their beginning."""
        states = (self.optuna.trial.TrialState.COMPLETE, self.optuna.trial.TrialState.FAIL)
        return [(t.number, Choice(**t.user_attrs[_CHOICE])) for t in self._mine(*states)]

    def _mine(self, *states: Any) -> list[Any]:
        """Trials of this run; a study in a database may have those of others."""
        with self._answering():
            trials = self.study.get_trials(deepcopy=False, states=states)
        return [t for t in trials if _CHOICE in t.user_attrs and t.user_attrs.get(_RUN, self.run) == self.run]

    def begin(self, choice: Choice) -> int:
        """Begin a trial; returns its number."""
        with self._answering():
            self.study.enqueue_trial({k: v for k, v in choice.data().items() if k in self.distributions})
            trial = self.study.ask(self.distributions)
            trial.set_user_attr(_RUN, self.run)
            trial.set_user_attr(_CHOICE, choice.data())
            trial.set_user_attr("recipe", choice.words())
        self._open[trial.number] = trial
        return trial.number

    def end(self, number: int, figures: dict[str, float | None] | None, notes: dict[str, Any]) -> None:
        """End a trial with the figures of its best artifact; None where it failed.

        Args:
            number: Of `begin`.
            figures: By name; one that was not measured makes the trial a failed one.
            notes: More about it, for the dashboard.
        """
        trial = self._open.pop(number, None)
        if trial is None:  # it had ended before, and was carried out again because its folder was damaged
            return
        values = [None if figures is None else figures.get(figure) for figure, _ in self.axes]
        measured = [value for value in values if value is not None and math.isfinite(value)]
        with self._answering():
            for key, value in notes.items():
                trial.set_user_attr(key, value)
            if len(measured) < len(values):
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)
            else:
                self.study.tell(trial, measured, skip_if_finished=True)

    def suggested(self, count: int) -> list[Choice]:
        """Choices that the sampler suggests after what was tried; the same again after the same trials."""
        with self._answering():
            every = self.study.get_trials(deepcopy=False)
        done = [t for t in every if t.state.is_finished() and t.values is not None]
        if len(done) < 4:
            return []
        scratch = self.optuna.create_study(
            directions=self.study.directions,
            sampler=self.optuna.samplers.TPESampler(seed=self.seed + len(done), n_startup_trials=4, multivariate=True),
        )
        scratch.add_trials([t for t in done if set(t.params) == set(self.distributions)])
        choices = []
        for _ in range(count):
            parameters = scratch.ask(self.distributions).params
            choice = Choice(**(Choice().data() | parameters))
            if choice.technique == "none":
                choice = Choice(**(choice.data() | {"keep": 1.0}))
            if self.space.sensible(choice):
                choices.append(choice)
        return list(dict.fromkeys(choices))


def check_study(url: str | None) -> None:
    """Raise at once what a study would raise later: Optuna is not installed, or the database does not answer.

    Args:
        url: Of the study; None is one in the run folder.
    """
    optuna = _optuna()
    if url is not None:
        with _answering(url, own=False):
            _connect(url)
            optuna.storages.get_storage(url)


def _connect(url: str) -> None:
    """Raise where no server listens: some drivers would wait for minutes."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    port = parsed.port or _PORTS.get(parsed.get_backend_name())
    if parsed.host and port:
        socket.create_connection((parsed.host, port), timeout=ANSWER_S).close()


@contextlib.contextmanager
def _answering(url: str, own: bool) -> Iterator[None]:
    """What the database fails at as an OutputError: a file that is damaged or locked, a server that is gone."""
    try:
        yield
    except PenjingError:
        raise
    except ImportError as error:
        raise MissingDependency(
            "the driver of the study's database is missing",
            code="not-installed",
            got=f"{_shown(url)}: {_first_cause(error)}",
            expected="a driver that SQLAlchemy can import",
            remedy=f"pip install {_driver(error)}, or --study sqlite:///study.db",
        ) from None
    except Exception as error:  # of SQLAlchemy and of its many drivers
        cause = _first_cause(error).replace(url, _shown(url)) if url else _first_cause(error)
        passing = any(word in cause for word in ("disk is full", "is locked", "disk I/O"))
        remedy = "--force starts over in this run folder" if own else "another --study, or none"
        if "://" not in url:
            remedy = f"a file is written as --study sqlite:///{url}"
        raise OutputError(
            "the study can't be opened or written",
            code="study",
            got=f"{_shown(url)}: {cause[:300]}",
            expected="a file that Optuna wrote, on a disk with free space, or a database that answers",
            remedy="when that is over, --resume goes on" if passing else remedy,
        ) from error


def _shown(url: str) -> str:
    """Without a password."""
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)


def _driver(error: ImportError) -> str:
    """The package to install for a module that was not there."""
    name = getattr(_root(error), "name", None) or "the driver that the URL names"
    return _DRIVERS.get(name, name)


def _root(error: BaseException) -> BaseException:
    """What an error began with: Optuna and SQLAlchemy raise others from it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_cause(error: BaseException) -> str:
    return " ".join(str(_root(error)).split())


def _distributions(optuna: Any, space: Space) -> dict[str, Any]:
    """Of every field of a choice that varies."""
    categorical = optuna.distributions.CategoricalDistribution
    fields: dict[str, Any] = {
        "technique": categorical([t for t in TECHNIQUES if t in space.techniques]),
        "keep": optuna.distributions.FloatDistribution(0.1, 1.0),
        "blocks": optuna.distributions.IntDistribution(0, max(space.blocks)),
        "epochs": categorical([0.0, *space.epochs]),
        "integers": categorical([i for i in INTEGERS if i in space.integers]),
        "weight_bits": categorical(list(space.weight_bits)),
    }
    return fields
