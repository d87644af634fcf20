"""Fine-tuning by LoRA, as a job in a folder: run in this process, or by several under accelerate.

    accelerate launch -m routenlp_plugins.distill.training FOLDER

FOLDER/job.json          base model, adapter to go on from, teacher, settings
FOLDER/lessons.jsonl     what is taught        FOLDER/rehearsal.jsonl   what should not be forgotten
FOLDER/checkpoints/      from which an interrupted training goes on; gone at the end
FOLDER/adapter/          what comes out
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evaluate.units import unit_interval
from .causal import need, prompt_of, quiet
from .files import read_json, write_json
from .lessons import Lesson, read_lessons, write_lessons

__all__ = ["LoRATraining", "begin", "train"]


@dataclass(frozen=True, slots=True)
class LoRATraining:
    """How an adapter is trained.

    Attributes:
        rank, alpha, dropout: of the low-rank updates of all linear layers (Hu et al. 2022).
        epochs, batch: passes over the lessons, and lessons in a step.
        at_once: lessons that are run together, of which those of a step are made up: fewer take less memory, and the
            result is the same.
        rate: peak learning rate; it rises over the first twentieth of the steps and falls to 0.
        longest: tokens of a lesson; the beginning of a longer prompt is cut off.
        held_out: share of the lessons on which it is seen when to stop.
        patience: looks, two an epoch, without improvement after which it stops.
        temperature, logits: of the teacher's distribution, and its weight in the loss beside that of the teacher's
            words (Hinton et al. 2015), where a teacher with the same tokenizer is given.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    epochs: int = 3
    batch: int = 8
    rate: float = 2e-3
    longest: int = 512
    held_out: float = 0.1
    patience: int = 2
    temperature: float = 2.0
    logits: float = 0.5
    at_once: int = 2

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "epochs", "batch", "longest", "patience", "at_once"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DataError(f"training: {name} must be 1, 2, ..., got {value!r}")
        for name, most in (("dropout", 1.0), ("held_out", 1.0), ("logits", 1.0), ("rate", 1.0)):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < most + (name == "logits")
            ):
                raise DataError(f"training: {name} must be in [0, {most:g}), got {value!r}")
        if not self.temperature > 0:
            raise DataError(f"training: temperature must be above 0, got {self.temperature!r}")
        if self.batch % self.at_once:
            raise DataError(f"training: batch {self.batch} is not made up of parts of at_once={self.at_once} lessons")


FEWEST = 20
"""Lessons held out with which it is seen when to stop."""
JOB, ADAPTER, CHECKPOINTS = "job.json", "adapter", "checkpoints"


def begin(
    folder: Path,
    base: Path,
    lessons: Sequence[Lesson],
    rehearsal: Sequence[Lesson],
    training: LoRATraining,
    *,
    seed: int,
    adapter: Path | None = None,
    teacher: Path | None = None,
) -> None:
    """Write a job; the same one again changes nothing.

    Args:
        adapter: that is trained on; None begins a new one.
        teacher: folder of a model of the same tokenizer, whose distributions are learned too.

    Raises:
        DataError: another job was begun in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "base": str(base),
        "adapter": None if adapter is None else str(adapter),
        "teacher": None if teacher is None else str(teacher),
        "training": asdict(training),
        "seed": seed,
        "lessons": [lesson.id for lesson in lessons],
        "rehearsal": [lesson.id for lesson in rehearsal],
    }
    file = folder / JOB
    if file.exists():
        if read_json(file) != facts:
            raise DataError(f"{folder}: another training was begun here; choose a new folder, or delete it")
        return
    write_lessons(folder / "lessons.jsonl", lessons)
    write_lessons(folder / "rehearsal.jsonl", rehearsal)
    write_json(file, facts)


def train(folder: Path, *, progress: bool = False) -> Path:
    """Do the job of a folder, or what is left of it.

    Returns:
        The folder of the adapter.

    Raises:
        DataError: there is no job, or the teacher's tokenizer is another one.
        MissingExtraError: torch, transformers, peft or accelerate is not installed.
    """
    done = folder / ADAPTER
    if (done / "adapter_config.json").exists():
        return done
    need("torch", "transformers", "peft", "accelerate")
    if not (folder / JOB).exists():
        raise DataError(f"{folder / JOB}: no such file; a training is begun by begin()")
    job = read_json(folder / JOB)
    from .trainer import fine_tuned

    lessons = [*read_lessons(folder / "lessons.jsonl"), *read_lessons(folder / "rehearsal.jsonl")]
    how = LoRATraining(**{field.name: job["training"][field.name] for field in fields(LoRATraining)})
    taught, judged = _split(lessons, how, job["seed"])
    trainer = fine_tuned(job, how, taught, judged, folder / CHECKPOINTS, progress=progress)
    if trainer.is_world_process_zero():
        scratch = folder / f".{ADAPTER}.new"
        shutil.rmtree(scratch, ignore_errors=True)
        trainer.save_model(str(scratch))
        scratch.replace(done)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return done


def _split(lessons: Sequence[Lesson], how: LoRATraining, seed: int) -> tuple[list[Lesson], list[Lesson]]:
    """What is learned from, and what tells when to stop; all of it is learned where that would be too little."""
    draws = unit_interval([lesson.id for lesson in lessons], seed, "early stopping").tolist()
    judged = [lesson for lesson, draw in zip(lessons, draws, strict=True) if draw < how.held_out]
    if len(judged) < FEWEST:
        return list(lessons), []
    return [lesson for lesson, draw in zip(lessons, draws, strict=True) if draw >= how.held_out], judged


def encoded(tokenizer: Any, lesson: Lesson, longest: int) -> Mapping[str, list[int]]:
    """Tokens of a lesson; those of the prompt are not to be learned."""
    prompt = tokenizer(prompt_of(tokenizer, lesson.query.chat), add_special_tokens=False).input_ids
    answer = [*tokenizer(lesson.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    answer = answer[: longest - 1]
    prompt = prompt[-(longest - len(answer)) :]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def main() -> None:
    """Do the job of the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with quiet():
        train(Path(sys.argv[1]), progress=True)


if __name__ == "__main__":
    main()
