"""The distillation loop: round after round, what had to be escalated is taught, judged, certified and promoted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import time

from filelock import FileLock, Timeout

from ..dispatch import Dispatcher, Listener
from ..errors import DataError, PortfolioError
from ..release import Release
from ..signals.store import TraceStore
from ..tiers.boundary import TierCallable
from ..types import new_id
from .files import read_json, write_json
from .options import LoopOptions, Promise
from .parts import Shares
from .registry import ReleaseRegistry, Version
from .results import Round
from .rounds import run_round
from .student import Student
from .work import Work

__all__ = ["DistillationLoop"]

_BEGUN = ("id", "since", "until", "version", "seed", "shares", "options")
"""What a round's beginning says."""


class _NoTrafficError(DataError):
    """There is too little to begin a round with; nothing was begun."""


class DistillationLoop:
    """Teaches the students among some tiers what they had to escalate, and promotes them only through a gate.

    All that a round does is kept in its folder. A round that was killed goes on where it was, with the same traffic;
    until its last step, the version that served before serves.

    Args:
        folder: of versions and rounds; is made if it is not there.
        store: of the traffic that the serving version had.
        tiers: name -> what answers, the frontier among them; those that are a `Student` are taught. Once a version
            serves, its students take their places.
        release: the first version, with these students; not needed once a version serves.
        options: how rounds are run.

    Raises:
        DataError: no version serves yet and no release is given, or nothing says what is to be promised.
        PortfolioError: a tier of the portfolio is missing, or a student is the frontier.
    """

    def __init__(
        self,
        folder: str | Path,
        store: TraceStore,
        tiers: Mapping[str, TierCallable],
        release: Release | str | Path | None = None,
        options: LoopOptions | None = None,
    ) -> None:
        self.folder = _checked_folder(folder)
        self.store = store
        self.options = options or LoopOptions()
        self.registry = ReleaseRegistry(self.folder)
        self._given = dict(tiers)
        if not isinstance(store, TraceStore):
            raise DataError(f"store must be a TraceStore, got {store!r}: open one on its URL")
        if not isinstance(self.options, LoopOptions):
            raise DataError(f"options must be LoopOptions, got {options!r}")
        for name, tier in self._given.items():
            if not callable(tier):
                raise PortfolioError(f"tiers: {name} must be a callable Call -> Completion, got {type(tier).__name__}")
        given = None if release is None else Release.given(release)
        with FileLock(self.folder / ".first.lock"):
            serving = self.registry.serving or self._first(given)
        served = self._release(serving)
        if given is not None:
            self._compare(given, served, serving)
        self._check(served, serving.students())

    @property
    def serving(self) -> Version:
        """The version that serves."""
        version = self.registry.serving
        if version is None:
            raise DataError(f"{self.folder}: no version serves")
        return version

    @property
    def tiers(self) -> dict[str, TierCallable]:
        """What answers now: the tiers that were given, with the students of the version that serves."""
        return {**self._given, **self.serving.students()}

    def dispatcher(self, listeners: Sequence[Listener] = ()) -> Dispatcher:
        """The version that serves, with its students: make another one when another version serves.

        Args:
            listeners: see `routenlp_plugins.Dispatcher`; ``store.record`` keeps the traffic of the next round.
        """
        version = self.serving
        tiers = {**self._given, **version.students()}
        return Dispatcher(self._release(version), tiers, self.options.fit.comparators, listeners)

    @property
    def rounds(self) -> tuple[Round, ...]:
        """Those that are finished."""
        files = sorted((self.folder / "rounds").glob("[0-9]*/round.json"))
        return tuple(Round.from_dict(read_json(file)) for file in files)

    def round(self, until: float | None = None) -> Round:
        """Run a round over the traffic since the last one, or finish the one that was interrupted.

        Args:
            until: seconds since 1970; None is now.

        Raises:
            DataError: there is too little new traffic, another process runs a round, an interrupted round was begun
                with other options, or the rounds that share delta have all been run.
            TierError: the frontier, or a tier, failed ten times in a row; run again to go on.
        """
        with self._alone():
            return self._round(until)

    def run(self, rounds: int = 3, between: Callable[[Round], None] | None = None) -> Iterator[Round]:
        """Run rounds until the cost ratio changes by less than `LoopOptions.least_change`.

        Args:
            rounds: at most; a later one for which there is too little new traffic is not begun.
            between: called after each but the last, for example to serve the traffic that the next one looks at.

        Raises:
            DataError, TierError: as `round` does.
        """
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise DataError(f"rounds must be 1, 2, ..., got {rounds!r}")
        for number in range(rounds):
            try:
                done = self.round()
            except _NoTrafficError:
                # only the first round must find some
                if not number:
                    raise
                return
            yield done
            if self.settled(done):
                return
            if between is not None and number < rounds - 1:
                between(done)

    def abandon(self) -> Path:
        """Give up a round that was begun and not finished; its files are kept, and the next one begins anew.

        What it looked at is looked at again: give up for what happened, such as wrong options, not for what was seen.

        Returns:
            Where its files are.

        Raises:
            DataError: no round was begun that is not finished, or it is running.
        """
        with self._alone():
            begun = self.folder / "rounds" / f"{self._number():04}"
            if not (begun / "begun.json").exists():
                raise DataError(f"{self.folder}: no round was begun that is not finished")
            return begun.rename(begun.with_name(f"abandoned-{begun.name}-{new_id()}"))

    def settled(self, done: Round) -> bool:
        """Whether a round changed too little, or nothing, for another one to be worth it."""
        return done.change is None or abs(done.change) < self.options.least_change

    def work(self, number: int) -> Work:
        """The traffic, the parts and the clusters of a round that was begun.

        Raises:
            ReleaseError: the version it began with is not there, or not whole.
        """
        folder = self.folder / "rounds" / f"{number:04}"
        facts = read_json(folder / "begun.json", *_BEGUN)
        base = self.registry.version(facts["version"])
        tiers = {**self._given, **base.students()}
        # the cut is that of the round, whoever looks at it
        cut = {"seed": facts["seed"], "shares": Shares(**facts["shares"])}
        options = replace(self.options, promise=self._promise, **cut)
        window = (facts["since"], facts["until"])
        return Work(number, facts["id"], folder, self.store, base, tiers, window, options)

    def _round(self, until: float | None) -> Round:
        number = self._number()
        folder = self.folder / "rounds" / f"{number:04}"
        begun = folder / "begun.json"
        if not begun.exists():
            self._begin(number, folder, until)
        facts = read_json(begun, *_BEGUN)
        mine, theirs = self.options.digests, facts["options"]
        other = [name for name in mine if mine[name] != theirs.get(name)]
        if other:
            raise DataError(
                f"{folder}: this round was begun with other options ({', '.join(other)}); finish it with those, or "
                "give it up: loop.abandon(), routenlp distill --abandon"
            )
        if until is not None and until != facts["until"]:
            raise DataError(f"{folder}: this round was begun with the traffic until {facts['until']}; leave until out")
        work = self.work(number)
        self.store.flush()
        if (lacking := self._lacking(work)) is not None:
            shutil.rmtree(folder)
            raise _NoTrafficError(f"{self.folder}: {lacking}")
        done = run_round(work, self.registry)
        self.store.flush()
        return done

    def _begin(self, number: int, folder: Path, until: float | None) -> None:
        serving = self.serving
        release = self._release(serving)
        if not any(isinstance(tier, Student) for tier in self.tiers.values()):
            raise DataError(
                f"{self.folder}: no tier below the frontier can be taught; give one as a student, such as a "
                "ClassifierStudent, and begin a new folder with it"
            )
        replace(self.options, promise=self._promise).promised(release, number)
        since = max((one.until for one in self.rounds), default=self.options.since)
        folder.mkdir(parents=True, exist_ok=True)
        beginning = {
            "id": new_id(),
            "since": since,
            "until": _checked_time(until, since),
            "version": serving.number,
            "seed": self.options.seed,
            "shares": asdict(self.options.shares),
            "options": self.options.digests,
        }
        write_json(folder / "begun.json", beginning)

    def _number(self) -> int:
        """Of the round that was begun and is not finished, else of the next one."""
        known = [int(file.parent.name) for file in (self.folder / "rounds").glob("[0-9]*/begun.json")]
        last = max(known, default=0)
        unfinished = last and not (self.folder / "rounds" / f"{last:04}" / "round.json").exists()
        return last if unfinished else last + 1

    def _lacking(self, work: Work) -> str | None:
        """Why a round would be of no use; nothing was looked at for it that a later one must not see."""
        served = work.harvested.served
        if not served:
            why = "; ".join(f"{n} left out: {reason}" for reason, n in work.harvested.left_out.items()) or "none at all"
            return f"no traffic to look at since the last round ({why})"
        judging = len({one.unit for one in work.parts["gate"]})
        if judging >= self.options.gate.fewest:
            return None
        units = len({one.unit for one in served})
        return (
            f"too little traffic since the last round: {len(served)} queries of {units} independent units, {judging} "
            f"of which would judge what is taught; at least {self.options.gate.fewest} are needed"
        )

    @property
    def _promise(self) -> Promise:
        file = self.folder / "promise.json"
        if self.options.promise is not None:
            return self.options.promise
        if not file.exists():
            raise DataError(f"{file}: is gone; say what releases have to keep: LoopOptions(promise=...)")
        return Promise(**read_json(file))

    def _release(self, version: Version) -> Release:
        return version.release(*self.options.encoders, portfolio=self.options.portfolio)

    def _first(self, release: Release | None) -> Version:
        if release is None:
            raise DataError(f"{self.folder}: no version serves yet; give the release that the store's traffic had")
        self._check(release, {})
        students = {name: tier for name, tier in self._given.items() if isinstance(tier, Student)}
        for name, student in students.items():
            certified = release.policy.models.get(name, ())
            if certified and student.model is not None and student.model not in certified:
                raise DataError(
                    f"tiers: the release was fitted with {name} as {', '.join(certified)}, this student is "
                    f"{student.model!r}: its certificate says nothing of it; give the student that the outcomes are "
                    "of, or fit a release on outcomes of this one"
                )
        self.options.promised(release, 1)
        first = self.registry.add(release, students, "given")
        write_json(self.folder / "promise.json", asdict(self.options.promise_of(release)))
        self.registry.promote(first.number)
        return first

    def _compare(self, given: Release, served: Release, serving: Version) -> None:
        """That a release which is given again is of the loop's kind."""
        if given.portfolio.fingerprint != served.portfolio.fingerprint:
            raise DataError(
                f"{self.folder}: version {serving.number}, which serves, has another portfolio than the release "
                "that is given; choose another folder, or leave the release out"
            )
        if given.portfolio != served.portfolio and self.options.portfolio is None:
            raise DataError(
                f"{self.folder}: version {serving.number}, which serves, has other prices than the release that is "
                "given; today's are those of LoopOptions(portfolio=...), or leave the release out"
            )
        if given.certificate is not None and self.options.promise is None:
            mine, theirs = self._promise, Promise.of(given, self.options.fit)
            if mine != theirs:
                raise DataError(
                    f"{self.folder}: the loop keeps {mine}, the release that is given {theirs}; leave the release out, "
                    "or say what is to be kept from now on: LoopOptions(promise=...)"
                )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = FileLock(self.folder / ".round.lock")
        try:
            with lock.acquire(timeout=0):
                yield
        except Timeout:
            raise DataError(f"{self.folder}: a round is running in another process") from None

    def _check(self, release: Release, students: Mapping[str, Student]) -> None:
        missing = [name for name in release.portfolio.names if name not in self._given and name not in students]
        if missing:
            raise PortfolioError(
                f"tiers: {', '.join(missing)} is missing; releases are fitted on answers of every tier of the portfolio"
            )
        unknown = [name for name in self._given if name not in release.portfolio.names]
        if unknown:
            raise PortfolioError(f"tiers: {', '.join(unknown)} is not in the portfolio of the release")
        if isinstance(self._given.get(release.portfolio.frontier), Student):
            raise PortfolioError(f"tiers: the frontier {release.portfolio.frontier!r} teaches; it cannot be a student")


def _checked_time(until: float | None, since: float | None) -> float:
    now = time()
    if until is None:
        return now
    if isinstance(until, bool) or not isinstance(until, int | float) or not (since or 0) < until <= now:
        raise DataError(f"until must be after the last round, and not in the future, got {until!r}")
    return float(until)


def _checked_folder(folder: str | Path) -> Path:
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise DataError(f"{path}: is a file; choose a folder")
    path.mkdir(parents=True, exist_ok=True)
    return path
