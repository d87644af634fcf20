"""A tier behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..errors import MissingExtraError
from ..types import Call, Completion, Delta
from .openai_format import StreamedText, request_body, text_completion

if TYPE_CHECKING:
    from types import ModuleType

    from openai import AsyncOpenAI, OpenAI

__all__ = ["OpenAICompatibleTier", "openai_package"]


class OpenAICompatibleTier:
    """Answers through the ``openai`` client, sync and async, whole and streamed.

    Args:
        model: name of the model at the endpoint.
        base_url: of the endpoint; None takes ``OPENAI_BASE_URL``, else OpenAI's own.
        api_key: None takes ``OPENAI_API_KEY``.
        timeout: seconds of one attempt.
        max_retries: hidden retries of the client. 0 by default: on a cheap tier a failure is passed on at once,
            and every call is an attempt in the trace.
        request: fields every request is made with. ``{"logprobs": True}`` by default; give ``{}`` for endpoints
            that refuse it. Streams ask for ``stream_options`` with the usage; ``{"stream_options": None}`` does not.

    Raises:
        MissingExtraError: the package ``openai`` is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 30.0,
        max_retries: int = 0,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.request = {"logprobs": True} if request is None else dict(request)
        self._openai = openai_package()
        self._options: dict[str, Any] = {
            "base_url": base_url,
            "api_key": api_key,
            "timeout": timeout,
            "max_retries": max_retries,
        }
        # connections of an async client belong to the event loop that opened them
        self._async_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncOpenAI] = WeakKeyDictionary()

    def __call__(self, call: Call) -> Completion:
        """The endpoint's answer to the query's chat."""
        response = self._client.chat.completions.create(model=self.model, **request_body(call.query, self.request))
        return _completion(response)

    async def acall(self, call: Call) -> Completion:
        """As calling it, without blocking the event loop."""
        body = request_body(call.query, self.request)
        response = await self._async_client.chat.completions.create(model=self.model, **body)
        return _completion(response)

    def stream(self, call: Call) -> Iterator[Delta | Completion]:
        """The answer piece by piece, and at last the whole of it."""
        text = StreamedText()
        with self._client.chat.completions.create(model=self.model, **self._streaming(call)) as chunks:
            for chunk in chunks:
                if (delta := text.after(chunk.model_dump(warnings=False))) is not None:
                    yield delta
        yield text.completion()

    async def astream(self, call: Call) -> AsyncIterator[Delta | Completion]:
        """As `stream`, without blocking the event loop."""
        text = StreamedText()
        async with await self._async_client.chat.completions.create(
            model=self.model, **self._streaming(call)
        ) as chunks:
            async for chunk in chunks:
                if (delta := text.after(chunk.model_dump(warnings=False))) is not None:
                    yield delta
        yield text.completion()

    async def aclose(self) -> None:
        """Close the connections that the running event loop opened; a later call opens new ones."""
        client = self._async_clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

    def _streaming(self, call: Call) -> dict[str, Any]:
        fields = {"stream_options": {"include_usage": True}, **self.request, "stream": True}
        return request_body(call.query, {name: value for name, value in fields.items() if value is not None})

    @property
    def _async_client(self) -> AsyncOpenAI:
        loop = asyncio.get_running_loop()
        if loop not in self._async_clients:
            self._async_clients[loop] = self._openai.AsyncOpenAI(**self._options)
        return self._async_clients[loop]

    @cached_property
    def _client(self) -> OpenAI:
        client: OpenAI = self._openai.OpenAI(**self._options)
        return client


def openai_package() -> ModuleType:
    """The package ``openai``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import openai
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise MissingExtraError("openai is not installed: pip install 'routenlp-plugins[openai]'") from None
    return openai


def _completion(response: object) -> Completion:
    # an endpoint that answers something else than JSON comes back as text
    if isinstance(response, str) or not hasattr(response, "model_dump"):
        raise ValueError(f"expected a chat completion, got {str(response)[:80]!r}")
    return text_completion(response.model_dump(warnings=False))
