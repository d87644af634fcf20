"""The trainer of transformers for one adapter; loaded only where something is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..collecting import progress_bar
from ..errors import DataError
from .causal import CausalLM, quiet
from .lessons import Lesson
from .training import LoRATraining, encoded

__all__ = ["fine_tuned"]

LOOKS = 2
"""Checkpoints, and looks at what was held out, in an epoch."""


def fine_tuned(
    job: Mapping[str, Any],
    how: LoRATraining,
    taught: Sequence[Lesson],
    judged: Sequence[Lesson],
    checkpoints: Path,
    *,
    progress: bool,
) -> Trainer:
    """Train, from the last checkpoint if there is one; the trainer holds the best adapter."""
    torch.manual_seed(job["seed"])
    loaded = CausalLM.load(job["base"])
    tokenizer = loaded.tokenizer
    with quiet():
        model = _with_adapter(loaded.model, job["adapter"], how)
    teacher = None if job["teacher"] is None else _teacher(job["teacher"], tokenizer)
    steps = max(1, -(-len(taught) // how.batch) // LOOKS)
    looks = bool(judged)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=how.epochs,
        per_device_train_batch_size=how.at_once,
        per_device_eval_batch_size=how.at_once,
        gradient_accumulation_steps=how.batch // how.at_once,
        learning_rate=how.rate,
        warmup_steps=0.05,
        lr_scheduler_type="linear",
        eval_strategy="steps" if looks else "no",
        eval_steps=steps if looks else None,
        save_strategy="steps",
        save_steps=steps,
        save_total_limit=2,
        load_best_model_at_end=looks,
        metric_for_best_model="eval_loss" if looks else None,
        greater_is_better=False if looks else None,
        seed=job["seed"],
        data_seed=job["seed"],
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        label_names=["labels"],
    )
    callbacks: list[TrainerCallback] = [_Bar(wanted=progress)]
    if looks:
        callbacks.append(EarlyStoppingCallback(how.patience))
    trainer = _Distillation(
        model=model,
        args=arguments,
        train_dataset=[encoded(tokenizer, lesson, how.longest) for lesson in taught],
        eval_dataset=[encoded(tokenizer, lesson, how.longest) for lesson in judged] or None,
        data_collator=_Padding(tokenizer.pad_token_id),
        callbacks=callbacks,
    )
    trainer.teacher, trainer.how = teacher, how
    # whatever the model does: the loss is a sum over a part of the step, divided by the tokens of the whole step
    trainer.model_accepts_loss_kwargs = True
    # it would print what it measured
    trainer.remove_callback(PrinterCallback)
    with quiet():
        trainer.train(resume_from_checkpoint=_last(checkpoints))
    return trainer


def _with_adapter(model: Any, adapter: str | None, how: LoRATraining) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    config = LoraConfig(
        r=how.rank,
        lora_alpha=how.alpha,
        lora_dropout=how.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _teacher(folder: str, tokenizer: Any) -> Any:
    loaded = CausalLM.load(folder)
    if loaded.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"{folder}: its tokenizer is not that of the student, so that its distributions mean other words"
        )
    return loaded.model


def _last(checkpoints: Path) -> str | None:
    """The last whole checkpoint."""
    found = [p for p in checkpoints.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return str(max(found, key=lambda p: int(p.name.split("-")[1]))) if found else None


class _Padding:
    """Lessons of one batch, padded on the left, so that all answers stand at the end."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, lessons: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(lesson["input_ids"]) for lesson in lessons)

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([[fill] * (longest - len(lesson[name])) + lesson[name] for lesson in lessons])

        ids, labels = padded("input_ids", self.padding), padded("labels", -100)
        lengths = torch.tensor([[len(lesson["input_ids"])] for lesson in lessons])
        mask = (torch.arange(longest)[None] >= longest - lengths).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class _Distillation(Trainer):
    """Cross-entropy of the teacher's words, and beside it the divergence from the teacher's distributions."""

    teacher: Any = None
    how: LoRATraining = LoRATraining()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Of the tokens of the answers; with a teacher's distributions as Hinton et al. (2015), equation 2."""
        labels, tokens = inputs["labels"], num_items_in_batch
        # distributions over the vocabulary take most of the memory: only those that predict an answer are made
        most = int((labels != -100).sum(dim=1).max())
        asked = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "position_ids": (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0),
            "logits_to_keep": most + 1,
        }
        outputs = model(**asked)
        wanted = labels[:, -most:]
        taught = wanted != -100
        mine = outputs.logits[:, :-1][taught].float()
        loss = torch.nn.functional.cross_entropy(mine, wanted[taught], reduction="sum")
        if self.teacher is not None:
            with torch.no_grad():
                theirs = self.teacher(**asked).logits[:, :-1][taught].float()
            loss = (1 - self.how.logits) * loss + self.how.logits * self._divergence(mine, theirs)
        # gradients of parts are added, those of processes are averaged
        loss = loss / taught.sum() if tokens is None else loss / tokens * self.accelerator.num_processes
        return (loss, {"loss": loss, "logits": mine}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss alone: what was said is looked at by the gate."""
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def _divergence(self, mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        heat = self.how.temperature
        student, teacher = (torch.log_softmax(logits / heat, dim=-1) for logits in (mine, theirs))
        return torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True) * heat**2


class _Bar(TrainerCallback):
    """Steps done, steps in all and the time that is left, on standard error if that is a terminal."""

    def __init__(self, *, wanted: bool) -> None:
        self._bar = progress_bar(wanted)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show it."""
        if state.is_world_process_zero:
            self._bar.start()
            self._task = self._bar.add_task("teaching", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move it."""
        if state.is_world_process_zero:
            self._bar.update(self._task, completed=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it away."""
        if state.is_world_process_zero:
            self._bar.stop()
