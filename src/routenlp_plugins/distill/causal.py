"""A causal language model of transformers in this process: prompts in, answers with log-probabilities out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any
from warnings import catch_warnings

from ..errors import DataError, MissingExtraError
from ..types import Completion, Message

__all__ = ["CausalLM", "base_from_gguf", "need", "prompt_of", "weights_digest"]


def need(*packages: str) -> None:
    """Refuse to go on without these.

    Raises:
        MissingExtraError: names the first that is missing, and what installs it.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"{missing[0]} is not installed: pip install 'routenlp-plugins[train]'")


def base_from_gguf(gguf: str | Path, folder: str | Path) -> Path:
    """The weights and the tokenizer of a GGUF file as a folder of transformers, dequantised; made if it is not there.

    Raises:
        DataError: there is no such file.
        MissingExtraError: torch, transformers or gguf is not installed.
    """
    source, target = Path(gguf), Path(folder)
    if (target / "model.safetensors").exists():
        return target
    if not source.is_file():
        raise DataError(f"{source}: no such GGUF file")
    need("torch", "transformers", "gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # else it would be saved as quantised, which it is no longer
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(target)
    # the weights last: they tell that the folder is whole
    scratch = target / ".new"
    with quiet():
        model.save_pretrained(scratch)
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == "model.safetensors"):
        file.replace(target / file.name)
    scratch.rmdir()
    return target


@dataclass(eq=False)
class CausalLM:
    """A model and its tokenizer; one call at a time.

    Attributes:
        longest: tokens of a prompt that are read: the last ones.
    """

    tokenizer: Any
    model: Any
    longest: int = 1024
    _lock: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def load(cls, base: str | Path, adapter: str | Path | None = None, longest: int = 1024) -> CausalLM:
        """From a folder of transformers, with an adapter of PEFT.

        Raises:
            DataError: there is no model in the folder.
            MissingExtraError: torch, transformers or peft is not installed.
        """
        need("torch", "transformers", "peft")
        if not (Path(base) / "config.json").is_file():
            raise DataError(
                f"{base}: no model of transformers there; base_from_gguf makes such a folder of a GGUF file"
            )
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
            if adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, adapter)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(tokenizer, model.eval(), longest)

    def answers(self, chats: Sequence[Sequence[Message]], most: int, batch: int = 1) -> list[Completion]:
        """What the model says, greedily.

        Args:
            most: tokens of an answer.
            batch: prompts that are run together; those of like length are.
        """
        prompts = [
            self.tokenizer(prompt_of(self.tokenizer, chat), add_special_tokens=False).input_ids for chat in chats
        ]
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        found: dict[int, Completion] = {}
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            some = [prompts[place][-self.longest :] for place in places]
            for place, completion in zip(places, self._generate(some, most), strict=True):
                found[place] = completion
        return [found[place] for place in range(len(prompts))]

    def _generate(self, prompts: Sequence[Sequence[int]], most: int) -> list[Completion]:
        import torch

        longest = max(map(len, prompts))
        padding = self.tokenizer.pad_token_id
        ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with self._lock, torch.inference_mode():
            made = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=most,
                pad_token_id=padding,
                eos_token_id=self.tokenizer.eos_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
            said = made.sequences[:, longest:]
            spread = torch.stack([torch.log_softmax(step.float(), dim=-1) for step in made.logits], dim=1)
            each = spread.gather(2, said.unsqueeze(-1)).squeeze(-1)
        return [self._completion(*row) for row in zip(prompts, said.tolist(), each.tolist(), strict=True)]

    def _completion(self, prompt: Sequence[int], said: list[int], logprobs: list[float]) -> Completion:
        end = said.index(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id in said else len(said)
        kept = tuple(min(value, 0.0) for value in logprobs[:end])
        return Completion(
            self.tokenizer.decode(said[:end], skip_special_tokens=True).strip(),
            mean_logprob=sum(kept) / len(kept) if kept else None,
            token_logprobs=kept or None,
            input_tokens=len(prompt),
            output_tokens=len(kept),
        )


def prompt_of(tokenizer: Any, chat: Sequence[Message]) -> str:
    """A conversation in the model's own form, where the answer begins; plain turns if it has none."""
    messages = [dict(message) for message in chat]
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    turns = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return f"{turns}\nassistant:"


def weights_digest(folder: str | Path) -> str:
    """Of the weights of a model or an adapter, by their content."""
    digest = sha256()
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder}: no weights (.safetensors) there")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and the remarks of transformers, which are as they were afterwards."""
    from transformers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    theirs.set_verbosity(logging.ERROR)
    try:
        # of what PEFT asks of transformers
        with catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()  # type: ignore[no-untyped-call]
