"""A student behind an OpenAI-compatible endpoint that fine-tunes its models."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..errors import DataError, ReleaseError, TierError
from ..tiers.openai_compatible import OpenAICompatibleTier, openai_package
from ..types import Call, Completion
from .files import read_json, write_json
from .lessons import Lesson, read_lessons, write_lessons
from .student import Course, is_student, new_student_folder, read_facts, repeated, write_facts

if TYPE_CHECKING:
    from openai import OpenAI

__all__ = ["Endpoint", "HostedStudent"]

JOB, LESSONS = "job.json", "lessons.jsonl"
ENDED = ("failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model is hosted, and what its fine-tuning costs.

    Attributes:
        base_url: None takes ``OPENAI_BASE_URL``, else OpenAI's own. The key is always ``OPENAI_API_KEY``, and never
            written.
        request: fields of every chat request.
        hyperparameters: of fine-tuning, as the endpoint names them.
        usd_per_mtok: USD per million trained tokens; None where that is not known.
        interval: seconds between looks at a job.
    """

    base_url: str | None = None
    request: Mapping[str, Any] = field(default_factory=lambda: {"logprobs": True})
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    usd_per_mtok: float | None = None
    interval: float = 10.0


@dataclass(frozen=True, eq=False)
class HostedStudent:
    """A hosted model, and what it was taught beside.

    Attributes:
        name: the model that answers.
        base: the model that is fine-tuned, each time on all lessons: what is paid for twice is not forgotten.
        training_usd: what its last teaching cost; None where that is not known, 0 for one that was never taught.
    """

    name: str
    base: str
    endpoint: Endpoint = field(default_factory=Endpoint)
    lessons: tuple[Lesson, ...] = field(default=(), repr=False)
    training_usd: float | None = 0.0

    @property
    def model(self) -> None:
        """Not known beforehand: answers name the version that the endpoint ran."""
        return None

    def __call__(self, call: Call) -> Completion:
        """The endpoint's answer."""
        return self._tier(call)

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        return await self._tier.acall(call)

    def taught(self, course: Course, folder: Path) -> HostedStudent:
        """Another student, fine-tuned on all lessons; a job that runs already is waited for, and not begun again.

        Raises:
            TierError: the job failed, or was cancelled; the next attempt begins another one.
        """
        if is_student(folder):
            return self.load(folder)
        folder.mkdir(parents=True, exist_ok=True)
        known = repeated((*self.lessons, *course.rehearsal, *course.lessons))
        job = self._finished(self._begun(folder, known, course.seed), folder, progress=course.progress)
        tokens, price = job.trained_tokens, self.endpoint.usd_per_mtok
        usd = None if tokens is None or price is None else tokens * price / 1e6
        made = replace(self, name=job.fine_tuned_model, lessons=known, training_usd=usd)
        made.save(folder)
        return made

    def save(self, folder: str | Path) -> Path:
        """Write lessons and names; the model stays at its endpoint.

        Raises:
            ReleaseError: there is a student already.
        """
        folder = new_student_folder(folder)
        write_lessons(folder / LESSONS, self.lessons)
        where = self.endpoint
        write_facts(
            folder,
            "hosted",
            name=self.name,
            base=self.base,
            training_usd=self.training_usd,
            endpoint={
                "base_url": where.base_url,
                "request": dict(where.request),
                "hyperparameters": dict(where.hyperparameters),
                "usd_per_mtok": where.usd_per_mtok,
                "interval": where.interval,
            },
        )
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> HostedStudent:
        """Read what `save` wrote.

        Raises:
            ReleaseError: the folder holds another student, or none.
        """
        folder, facts = Path(folder), read_facts(folder)
        try:
            endpoint = Endpoint(**facts["endpoint"])
            return cls(facts["name"], facts["base"], endpoint, read_lessons(folder / LESSONS), facts["training_usd"])
        except (KeyError, TypeError) as error:
            raise ReleaseError(f"{folder}: not a saved hosted student ({error})") from None

    def _begun(self, folder: Path, lessons: Sequence[Lesson], seed: int) -> str:
        """The id of the job, begun if it was not."""
        file = folder / JOB
        facts: dict[str, Any] = read_json(file) if file.exists() else {}
        jobs = self._client.fine_tuning.jobs
        if "file" not in facts:
            content = "".join(json.dumps(_example(lesson), ensure_ascii=False) + "\n" for lesson in lessons)
            sent = self._client.files.create(
                file=("lessons.jsonl", BytesIO(content.encode("utf-8", "replace"))), purpose="fine-tune"
            )
            facts = {"file": sent.id}
            write_json(file, facts)
        if "job" not in facts:
            # the answer to an earlier request may have been lost
            running = next((job.id for job in jobs.list() if job.training_file == facts["file"]), None)
            facts["job"] = running or self._create(facts["file"], seed)
            write_json(file, facts)
        return str(facts["job"])

    def _create(self, file: str, seed: int) -> str:
        asked: dict[str, Any] = {"hyperparameters": dict(self.endpoint.hyperparameters)}
        given = asked if self.endpoint.hyperparameters else {}
        return str(self._client.fine_tuning.jobs.create(model=self.base, training_file=file, seed=seed, **given).id)

    def _finished(self, job_id: str, folder: Path, *, progress: bool) -> Any:
        console = Console(stderr=True)
        with console.status(f"fine-tuning {self.base}") if progress and console.is_terminal else nullcontext():
            while True:
                job = self._client.fine_tuning.jobs.retrieve(job_id)
                if job.status == "succeeded":
                    return job
                if job.status in ENDED:
                    (folder / JOB).unlink()
                    why = job.error.message if job.error is not None else "no reason given"
                    raise TierError(f"fine-tuning job {job_id} of {self.base!r} {job.status}: {why}", self.base)
                time.sleep(self.endpoint.interval)

    @cached_property
    def _tier(self) -> OpenAICompatibleTier:
        return OpenAICompatibleTier(self.name, base_url=self.endpoint.base_url, request=self.endpoint.request)

    @cached_property
    def _client(self) -> OpenAI:
        client: OpenAI = openai_package().OpenAI(base_url=self.endpoint.base_url)
        return client


def _example(lesson: Lesson) -> dict[str, Any]:
    """One line of a training file: the conversation with the answer as its end."""
    if not lesson.answer:
        raise DataError(f"lesson {lesson.id!r}: an empty answer cannot be taught")
    said = [dict(message) for message in lesson.query.chat]
    return {"messages": [*said, {"role": "assistant", "content": lesson.answer}]}
