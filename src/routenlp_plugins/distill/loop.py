"""The distillation loop: round after round, what had to be escalated is taught, judged, certified and promoted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from time import time

from filelock import FileLock, Timeout

from ..errors import DataError, PortfolioError
from ..release import Release
from ..signals.store import TraceStore
from ..tiers.boundary import TierCallable
from ..types import new_id
from .files import read_json, write_json
from .options import LoopOptions, Promise
from .registry import ReleaseRegistry, Version
from .results import Round
from .rounds import run_round
from .student import Student
from .work import Work

__all__ = ["DistillationLoop"]


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
        self.folder = Path(folder)
        self.store = store
        self.options = options or LoopOptions()
        self.registry = ReleaseRegistry(self.folder)
        self._given = dict(tiers)
        serving = self.registry.serving
        if serving is None:
            if release is None:
                raise DataError(f"{self.folder}: no version serves yet; give the release that the store's traffic had")
            first = Release.given(release)
            self._check(first)
            students = {name: tier for name, tier in self._given.items() if isinstance(tier, Student)}
            self.options.promised(first, 1)
            serving = self.registry.add(first, students, "given")
            write_json(self.folder / "promise.json", asdict(self.options.promise_of(first)))
            self.registry.promote(serving.number)
        served = serving.release(*self.options.encoders)
        if release is not None and Release.given(release).portfolio.fingerprint != served.portfolio.fingerprint:
            raise DataError(
                f"{self.folder}: version {serving.number}, which serves, has another portfolio than the release "
                "that is given; choose another folder, or leave the release out"
            )
        self._check(served)

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
            DataError: there was no traffic, another process runs a round, or an interrupted round was begun otherwise.
            TierError: the frontier, or a tier, failed ten times in a row; run again to go on.
        """
        lock = FileLock(self.folder / ".round.lock")
        try:
            with lock.acquire(timeout=0):
                return self._round(until)
        except Timeout:
            raise DataError(f"{self.folder}: a round is running in another process") from None

    def run(self, rounds: int = 3, between: Callable[[Round], None] | None = None) -> Iterator[Round]:
        """Run rounds until the cost ratio changes by less than `LoopOptions.least_change`.

        Args:
            rounds: at most.
            between: called after each but the last, for example to serve the traffic that the next one looks at.
        """
        for number in range(rounds):
            done = self.round()
            yield done
            if self.settled(done):
                return
            if between is not None and number < rounds - 1:
                between(done)

    def settled(self, done: Round) -> bool:
        """Whether a round changed too little, or nothing, for another one to be worth it."""
        return done.change is None or abs(done.change) < self.options.least_change

    def work(self, number: int) -> Work:
        """The traffic, the parts and the clusters of a round that was begun.

        Raises:
            ReleaseError: the version it began with is not there, or not whole.
        """
        folder = self.folder / "rounds" / f"{number:04}"
        facts = read_json(folder / "begun.json")
        base = self.registry.version(facts["version"])
        tiers = {**self._given, **base.students()}
        promise = Promise(**read_json(self.folder / "promise.json"))
        options = replace(self.options, promise=self.options.promise or promise)
        window = (facts["since"], facts["until"])
        return Work(number, facts["id"], folder, self.store, base, tiers, window, options)

    def _round(self, until: float | None) -> Round:
        finished = self.rounds
        number = len(finished) + 1
        folder = self.folder / "rounds" / f"{number:04}"
        begun = folder / "begun.json"
        if not begun.exists():
            folder.mkdir(parents=True, exist_ok=True)
            since = finished[-1].until if finished else None
            beginning = {
                "id": new_id(),
                "since": since,
                "until": _checked_time(until, since),
                "version": self.serving.number,
                "options": self.options.digest,
            }
            write_json(begun, beginning)
        facts = read_json(begun)
        if facts["options"] != self.options.digest:
            raise DataError(f"{folder}: this round was begun with other options; finish it with those")
        if until is not None and until != facts["until"]:
            raise DataError(f"{folder}: this round was begun with the traffic until {facts['until']}; leave until out")
        work = self.work(number)
        self.store.flush()
        if not work.harvested.served:
            why = "; ".join(f"{n} left out: {reason}" for reason, n in work.harvested.left_out.items()) or "none at all"
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
            raise DataError(f"{self.folder}: no traffic to look at since the last round ({why})")
        done = run_round(work, self.registry)
        self.store.flush()
        return done

    def _check(self, release: Release) -> None:
        missing = [name for name in release.portfolio.names if name not in self._given]
        if missing:
            raise PortfolioError(
                f"tiers: {', '.join(missing)} is missing; releases are fitted on answers of every tier of the portfolio"
            )
        unknown = [name for name in self._given if name not in release.portfolio.names]
        if unknown:
            raise PortfolioError(f"tiers: {', '.join(unknown)} is not in the portfolio of the release")
        if isinstance(self._given[release.portfolio.frontier], Student):
            raise PortfolioError(f"tiers: the frontier {release.portfolio.frontier!r} teaches; it cannot be a student")


def _checked_time(until: float | None, since: float | None) -> float:
    now = time()
    if until is None:
        return now
    if isinstance(until, bool) or not isinstance(until, int | float) or not (since or 0) < until <= now:
        raise DataError(f"until must be after the last round, and not in the future, got {until!r}")
    return float(until)
