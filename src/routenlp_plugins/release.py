"""A release: one folder with everything that decides, frozen and checked.

release.json         format version, portfolio, policy, certificate
arrays.safetensors   the paths that were searched and tested: the evidence behind the certificate
router.safetensors   the difficulty router, where the policy looks at its predictions
manifest.json        format version and SHA-256 of the other files
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .cascade.certificate import Certificate
from .errors import DataError, PortfolioError, ReleaseError, RouteNLPError
from .evaluate.outcomes import first_problem
from .flow import task_of
from .policy import Policy, Rung
from .portfolio import Portfolio
from .types import Query

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .routing.difficulty import DifficultyRouter
    from .routing.encoders import Encoder

__all__ = ["FORMAT_VERSION", "Release", "fingerprint"]
FORMAT_VERSION = 3
_FILES = ("release.json", "arrays.safetensors")
_ROUTER = "router.safetensors"


@dataclass(frozen=True, slots=True)
class Release:
    """Portfolio, policy and certificate, promoted and rolled back as one.

    Attributes:
        certificate: None where every task stays on the frontier by choice and nothing was tested.
        evidence: task -> name -> array: for the L candidates of its paths ``excess``, ``second_moment`` and
            ``cost_usd`` (L,) on the ordering split.
        router: whose predictions the policy looks at; None where it looks at none.
    """

    portfolio: Portfolio
    policy: Policy
    certificate: Certificate | None = None
    evidence: Mapping[str, Mapping[str, NDArray[np.float64]]] = field(default_factory=dict, compare=False, repr=False)
    router: DifficultyRouter | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.policy.frontier != self.portfolio.frontier:
            raise PortfolioError(
                f"frontier: the policy names {self.policy.frontier!r}, the portfolio {self.portfolio.frontier!r}"
            )
        unknown = [tier for tier in self.policy.tiers if tier not in self.portfolio.names]
        if unknown:
            raise PortfolioError(f"policy: {', '.join(unknown)} is not a tier of the portfolio")
        routed = {task for task, rungs in self.policy.ladders.items() if rungs}
        if self.certificate is None or self.policy.void is not None:
            return
        # pooled tasks are certified together, and some of them may stay where they are
        proven = [proof for proof in self.certificate.proofs if proof.status == "certified"]
        if routed - set(self.certificate.certified) or not all(routed & set(proof.tasks) for proof in proven):
            raise PortfolioError(
                f"policy: leaves the frontier for {', '.join(sorted(routed)) or 'no task'}, the certificate speaks of "
                f"{', '.join(self.certificate.certified) or 'none'}"
            )

    @classmethod
    def frontier_only(cls, portfolio: Portfolio, tasks: tuple[str, ...] = ()) -> Release:
        """The release that routes nothing: every query of every task is answered by the frontier."""
        names = tasks or tuple(task.name for task in portfolio.tasks)
        return cls(portfolio, Policy(portfolio.frontier, dict.fromkeys(names, ())))

    @classmethod
    def given(cls, release: Release | str | Path) -> Release:
        """The release itself, or the one in this folder.

        Raises:
            ReleaseError: it is neither, or the folder cannot be used.
        """
        if isinstance(release, str | Path):
            return cls.load(release)
        if not isinstance(release, Release):
            raise ReleaseError(f"expected a Release or the path of its folder, got {type(release).__name__}")
        return release

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides: two releases with the same one answer alike."""
        return _digest(f"{self.portfolio.fingerprint} {fingerprint(self.policy)}".encode())

    def save(self, path: str | Path) -> Path:
        """Write the folder in one step; an existing folder is never touched.

        Raises:
            ReleaseError: there is something at `path` already, or its parent cannot be written.
        """
        from .arrays import packed

        target = Path(path)
        if target.exists():
            raise ReleaseError(f"{target}: exists already and is not overwritten; choose a new folder")
        arrays = {f"{task}/{name}": array for task, of in self.evidence.items() for name, array in of.items()}
        contents = {"release.json": _dump(self._facts()), "arrays.safetensors": packed({}, arrays)}
        if self.router is not None:
            contents[_ROUTER] = packed(*self.router.parts())
        manifest = {"format_version": FORMAT_VERSION, "sha256": {name: _digest(c) for name, c in contents.items()}}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
                folder = Path(scratch) / "release"
                folder.mkdir()
                for name, content in {**contents, "manifest.json": _dump(manifest)}.items():
                    (folder / name).write_bytes(content)
                folder.rename(target)
        except OSError as error:
            raise ReleaseError(f"{target}: cannot be written ({error.strerror or error})") from None
        return target

    @classmethod
    def load(
        cls,
        path: str | Path,
        portfolio: Portfolio | str | Path | None = None,
        encoder: Encoder | None = None,
    ) -> Release:
        """Read a folder back, checking every byte.

        Args:
            portfolio: the portfolio the caller runs, or the path of its YAML file. Its prices are taken; anything else
                that differs voids the certificate, and the frontier answers everything.
            encoder: that of the router, if it is not the default one.

        Raises:
            ReleaseError: a file is missing, truncated, edited or written by another version.
        """
        folder = Path(path)
        manifest = _json_object(folder / "manifest.json", _read(folder / "manifest.json"))
        _check_version(folder / "manifest.json", manifest.get("format_version"))
        digests = manifest.get("sha256")
        routed = isinstance(digests, dict) and _ROUTER in digests
        contents = {name: _read(folder / name) for name in (*_FILES, *([_ROUTER] if routed else []))}
        for name, content in contents.items():
            if not isinstance(digests, dict) or digests.get(name) != _digest(content):
                raise ReleaseError(f"{folder / name}: truncated or edited (its SHA-256 is not that of manifest.json)")
        release = _parse(folder, contents)
        if routed:
            from .routing.difficulty import DifficultyRouter

            release = replace(release, router=DifficultyRouter.load(folder / _ROUTER, encoder, absent=True))
        release = release.checked()
        if portfolio is None:
            return release
        return release._for(portfolio if isinstance(portfolio, Portfolio) else Portfolio.from_yaml(portfolio))

    def checked(self) -> Release:
        """The release itself if its certificate speaks of its policy and portfolio, else a voided one."""
        if self.certificate is None or self.policy.void is not None:
            return self
        if self.certificate.portfolio != self.portfolio.fingerprint:
            return self.voided("it speaks of another portfolio than the one in the release")
        # what has expired since is no other policy
        if self.certificate.policy != fingerprint(replace(self.policy, expired={})):
            return self.voided("it speaks of another policy than the one in the release")
        if self.policy.router != (None if self.router is None else self.router.digest):
            return self.voided("it speaks of another router than the one in the release")
        return self

    def difficulty(self, queries: Sequence[Query]) -> list[Mapping[str, float] | None]:
        """What the router predicts of each query: tier -> P(good enough); None where the policy looks at none.

        Raises:
            ReleaseError: the encoder of the router is missing.
            DataError: its vectors are not finite.
        """
        if self.router is None or self.policy.router is None or not queries:
            return [None] * len(queries)
        tasks = [task_of(self.policy, query) for query in queries]
        predicted = self.router([query.text for query in queries], tasks).tolist()
        if not all(isfinite(value) for row in predicted for value in row):
            raise DataError(f"the router's encoder {self.router.encoder.name!r} gave vectors that are no numbers")
        return [dict(zip(self.router.tiers, row, strict=True)) for row in predicted]

    def check_task(self, task: str | None) -> None:
        """That the release knows a task that all calls are to have; None leaves it to each call.

        Raises:
            PortfolioError: it does not.
        """
        known = self.policy.ladders
        if task is not None and task not in known:
            raise PortfolioError(f"task={task!r} is unknown to the release; its tasks: {', '.join(known) or 'none'}")

    def voided(self, reason: str, portfolio: Portfolio | None = None) -> Release:
        """The same release with a certificate that holds no more: the frontier answers everything, and says why."""
        portfolio = portfolio or self.portfolio
        nothing: dict[str, tuple[Rung, ...]] = dict.fromkeys(self.policy.ladders, ())
        policy = replace(self.policy, frontier=portfolio.frontier, ladders=nothing, offers={}, void=reason)
        return replace(self, portfolio=portfolio, policy=policy)

    def _for(self, portfolio: Portfolio) -> Release:
        mine, theirs = self.portfolio.identity, portfolio.identity
        different = [name for name in mine if mine[name] != theirs[name]]
        if not different:
            return replace(self, portfolio=portfolio)
        name = different[0]
        return self.voided(
            f"it speaks of another portfolio ({name}: {mine[name]} in the release, {theirs[name]} in yours); fit a new "
            "release on outcomes of this portfolio",
            portfolio,
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "portfolio": self.portfolio.as_dict(),
            "policy": _policy_dict(self.policy),
            "certificate": None if self.certificate is None else self.certificate.as_dict(),
        }


def fingerprint(policy: Policy) -> str:
    """SHA-256 of everything a policy decides by."""
    return _digest(json.dumps(_policy_dict(policy), sort_keys=True).encode())


_SINCE_3: Mapping[str, object] = {
    "after": None,
    "belief": None,
    "level": 0.0,
    "lossless": None,
    "router": None,
    "offers": {},
    "relative_cost": {},
    "requires": {},
}
"""Fields, and their values where a policy makes no use of them: left out, so that it has the fingerprint it had."""


def _policy_dict(policy: Policy) -> dict[str, Any]:
    def used(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in items if name not in _SINCE_3 or value != _SINCE_3[name]}

    return asdict(policy, dict_factory=used)


def _parse(folder: Path, contents: Mapping[str, bytes]) -> Release:
    from pydantic import TypeAdapter, ValidationError
    from safetensors import SafetensorError
    from safetensors.numpy import load

    where = folder / "release.json"
    facts = _json_object(where, contents["release.json"])
    _check_version(where, facts.get("format_version"))
    try:
        if facts["format_version"] == 1:
            return _parse_format_1(facts)
        policy = TypeAdapter(Policy).validate_json(json.dumps(facts["policy"]), strict=True)
        certificate = None if facts["certificate"] is None else Certificate.from_dict(facts["certificate"])
        evidence: dict[str, dict[str, NDArray[np.float64]]] = {}
        for key, array in load(contents["arrays.safetensors"]).items():
            task, _, name = key.rpartition("/")
            evidence.setdefault(task, {})[name] = array
        portfolio = Portfolio.from_dict(facts["portfolio"], source="portfolio")
        return Release(portfolio, policy, certificate, evidence)
    except ValidationError as error:
        raise ReleaseError(f"{where}: policy: {first_problem(error)}") from None
    except SafetensorError as error:
        raise ReleaseError(f"{folder / 'arrays.safetensors'}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RouteNLPError) as error:
        raise ReleaseError(f"{where}: not a release of format {FORMAT_VERSION} ({error})") from None


def _parse_format_1(facts: Mapping[str, Any]) -> Release:
    """Its certificates name neither the policy nor the models they speak of, so that none of them can be relied on."""
    portfolio = Portfolio.from_dict(facts["portfolio"], source="portfolio")
    release = Release.frontier_only(portfolio, tuple(facts["policy"]["ladders"]))
    return release.voided("the release has format 1, whose certificates cannot be checked; fit the release again")


def _check_version(file: Path, version: object) -> None:
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ReleaseError(
            f"{file}: format {version} is newer than {FORMAT_VERSION}, the newest this version reads; "
            "upgrade routenlp-plugins"
        )
    if isinstance(version, bool) or version not in (1, 2, FORMAT_VERSION):
        raise ReleaseError(f"{file}: format_version: expected {FORMAT_VERSION}, got {version!r}")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ReleaseError(f"{file}: cannot be read ({error.strerror}); a release is a folder written by fit") from None


def _json_object(file: Path, content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"{file}: truncated or edited ({error})") from None
    if not isinstance(data, dict):
        raise ReleaseError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data


def _dump(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()
