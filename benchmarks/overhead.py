"""What routing itself costs, in each framework: a routed call beside the bare framework's call, and the import.

Calls of both are made in turn within one run, so that they meet the same machine. Times are noisy; the differences
and ratios are what counts. The models take no time (calls) or 50 ms (concurrent), and burn none.

    python benchmarks/overhead.py [calls] [concurrent] [import]
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, thread_time
from typing import Any

os.environ.setdefault("DSPY_CACHEDIR", tempfile.mkdtemp(prefix="dspy-"))
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, TokenLogprob, Usage
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from llama_index.core.llms import ChatMessage, ChatResponse, MockLLM
from llama_index.core.llms.callbacks import llm_chat_callback
from pydantic import PrivateAttr

from dspy_routenlp import RouterEngine, RouterModule
from langchain_routenlp import RouterChatModel
from llama_index.llms.routenlp import RouterLLM
from routenlp_plugins import Call, Completion, Dispatcher, Policy, Portfolio, Query, Release, Task, Tier
from routenlp_plugins.policy import Confidence, Rung

RESULTS = Path(__file__).parent / "results" / "overhead.json"
CALLS, WARM_UP, IMPORTS = 2000, 200, 11
AT_ONCE, ROUNDS, SECONDS = 1000, 6, 0.05
QUESTION = "Where is my card?"
PORTFOLIO = Portfolio((Tier("small", 0.1, 0.1), Tier("frontier", 1, 1)), "frontier", (Task("t"),))
GATED = Release(
    PORTFOLIO, Policy("frontier", {"t": (Rung("small", 0.5, (Confidence.plain("small", "token_probability"),)),)})
)
"""Looks at every answer of the small tier: sure ones are returned, unsure ones escalate."""
SURE, UNSURE = -0.1, -3.0


def main() -> None:
    parts: dict[str, Callable[[], Any]] = {"calls": calls, "concurrent": concurrent, "import": imports}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = {name: value for name, value in results.items() if name in parts}
    for name in sys.argv[1:] or parts:
        results[name] = parts[name]()
        print(json.dumps({name: results[name]}, indent=2), flush=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Home:
    """A framework: the bare call, sync and async, and the router in front of the same models."""

    bare: Callable[[], Any]
    abare: Callable[[], Awaitable[Any]]
    routed: Callable[[], Any]
    arouted: Callable[[], Awaitable[Any]]


def homes(logprob: float, seconds: float = 0.0) -> dict[str, Home]:
    """Each framework over a small tier with this log-probability and a frontier."""
    chat = [ChatMessage(QUESTION)]
    langchain = QuickChatModel(seconds=seconds, logprob=logprob)
    routed_chain = RouterChatModel(tiers={"small": langchain, "frontier": langchain}, release=GATED)
    index = QuickLLM(seconds, logprob)
    routed_index = RouterLLM({"small": index, "frontier": index}, GATED)
    lm, other = (dspy_lm(name, seconds, logprob) for name in ("small", "frontier"))
    routed_lm = RouterEngine({"small": lm, "frontier": other}, GATED).lm()
    request, routed_request = (Request(one.model, (Message.user(QUESTION),)) for one in (lm, routed_lm))
    program = dspy.Predict("question -> answer")
    module = RouterModule(program, {"small": lm, "frontier": other}, GATED)

    def on(lm: Any) -> Callable[[], Any]:
        def run() -> Any:
            with dspy.context(lm=lm):
                return program(question=QUESTION)

        return run

    async def aprogram() -> Any:
        with dspy.context(lm=lm):
            return await program.acall(question=QUESTION)

    def plain(call: Call) -> Completion:
        return Completion("yes", mean_logprob=logprob, token_logprobs=(logprob,), model="small", input_tokens=3)

    dispatcher, query = Dispatcher(GATED, {"small": plain, "frontier": plain}), Query(QUESTION, "t")
    call = Call("small", query)
    return {
        "LangChain chat model": Home(
            lambda: langchain.invoke(QUESTION),
            lambda: langchain.ainvoke(QUESTION),
            lambda: routed_chain.invoke(QUESTION),
            lambda: routed_chain.ainvoke(QUESTION),
        ),
        "LlamaIndex LLM": Home(
            lambda: index.chat(chat),
            lambda: index.achat(chat),
            lambda: routed_index.chat(chat),
            lambda: routed_index.achat(chat),
        ),
        "DSPy LM": Home(
            lambda: lm(request),
            lambda: lm.acall(request),
            lambda: routed_lm(routed_request),
            lambda: routed_lm.acall(routed_request),
        ),
        "DSPy program": Home(
            on(lm), aprogram, lambda: module(question=QUESTION), lambda: module.acall(question=QUESTION)
        ),
        "plain Dispatcher": Home(
            lambda: plain(call), lambda: asyncio.sleep(0), lambda: dispatcher.run(query), lambda: dispatcher.arun(query)
        ),
    }


def calls() -> dict[str, Any]:
    """Median microseconds a call without concurrency: bare, routed and accepted, routed and escalated."""
    found = {}
    for name in homes(SURE):
        sure, unsure = homes(SURE)[name], homes(UNSURE)[name]
        ways = {"bare": sure.bare, "accepted": sure.routed, "escalated": unsure.routed}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(WARM_UP + CALLS):
            for way, run in ways.items():
                start = perf_counter()
                run()
                if i >= WARM_UP:
                    times[way].append((perf_counter() - start) * 1e6)
        bare, accepted, escalated = (median(times[way]) for way in ways)
        found[name] = {
            "bare_us": round(bare),
            "accepted_us": round(accepted),
            "added_us": round(accepted - bare),
            "ratio": round(accepted / bare, 2),
            # beside the two bare calls that an escalation takes
            "escalated_us": round(escalated),
            "escalated_added_us": round(escalated - 2 * bare),
        }
    return found


def concurrent() -> dict[str, Any]:
    """Many calls at once over models of 50 ms: CPU a call, the longest callback of the event loop, memory.

    Collections of garbage are told apart: a full one goes through all that is loaded and remembered, whoever's callback
    it falls into. What is loaded is frozen, as servers do; else it takes 150 ms with three frameworks.
    """
    found = {}
    # of each object; that of the process fills up to ten thousand calls, then memory is flat
    dspy.configure(max_history_size=100)
    gc.collect()
    gc.freeze()
    for name in ("LangChain chat model", "LlamaIndex LLM", "DSPy LM", "DSPy program"):
        sure, unsure = homes(SURE, SECONDS)[name], homes(UNSURE, SECONDS)[name]
        ways = {"bare": sure.abare, "accepted": sure.arouted, "twice bare": twice(sure), "escalated": unsure.arouted}
        cpu: dict[str, list[float]] = {way: [] for way in ways}
        longest: dict[str, list[float]] = {way: [] for way in ways}
        collection: dict[str, list[float]] = {way: [] for way in ways}
        memory = []
        for round_ in range(ROUNDS):
            for way, run in ways.items():
                with callbacks() as lasted:
                    start = process_time()
                    asyncio.run(many(run))
                    cpu[way].append((process_time() - start) * 1e3 / AT_ONCE)
                longest[way].append(lasted.callback * 1e3)
                collection[way].append(lasted.collection * 1e3)
            gc.collect()
            memory.append(resident())
            print(name, round_, {way: round(of[-1], 3) for way, of in cpu.items()}, memory[-1], flush=True)
        bare, accepted, twice_, escalated = (median(cpu[way][1:]) for way in ways)
        found[name] = {
            "cpu_ms_bare": round(bare, 3),
            "cpu_ms_added_accepted": round(accepted - bare, 3),
            "cpu_ms_added_escalated": round(escalated - twice_, 3),
            "longest_callback_ms": {way: round(median(of[1:]), 2) for way, of in longest.items()},
            "longest_collection_ms": {way: round(median(of[1:]), 2) for way, of in collection.items()},
            "resident_mb": memory,
        }
    return found


def twice(home: Home) -> Callable[[], Awaitable[Any]]:
    """What an escalation takes without us."""

    async def run() -> None:
        await home.abare()
        await home.abare()

    return run


async def many(run: Callable[[], Awaitable[Any]]) -> None:
    async def one() -> None:
        await run()

    tasks = []
    for i in range(AT_ONCE):
        tasks.append(asyncio.create_task(one()))
        if i % 10 == 9:
            # what begins them is no callback of anyone's
            await asyncio.sleep(0)
    await asyncio.gather(*tasks)


@contextmanager
def callbacks() -> Iterator[Lasted]:
    """CPU seconds of each callback that the event loop runs within it, and of each collection of garbage apart."""
    lasted = Lasted()
    run = asyncio.Handle._run
    collected = [0.0]

    def timed(handle: asyncio.Handle) -> None:
        start, before = thread_time(), collected[0]
        run(handle)
        lasted.callback = max(lasted.callback, thread_time() - start - (collected[0] - before))

    def collecting(phase: str, info: Any) -> None:
        if phase == "start":
            lasted.since = thread_time()
        else:
            took = thread_time() - lasted.since
            collected[0] += took
            lasted.collection = max(lasted.collection, took)

    asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]
    gc.callbacks.append(collecting)
    try:
        yield lasted
    finally:
        gc.callbacks.remove(collecting)
        asyncio.Handle._run = run  # type: ignore[method-assign]


@dataclass
class Lasted:
    """The longest, in seconds."""

    callback: float = 0.0
    collection: float = 0.0
    since: float = 0.0


def resident() -> float:
    """Megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


class QuickChatModel(BaseChatModel):
    """LangChain's: no work, a given delay, log-probabilities and usage."""

    seconds: float = 0.0
    logprob: float = SURE

    @property
    def _llm_type(self) -> str:
        return "quick"

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        facts = {"model_name": "small", "logprobs": {"content": [{"token": "yes", "logprob": self.logprob}]}}
        usage = {"input_tokens": 3, "output_tokens": 1, "total_tokens": 4}
        message = AIMessage("yes", response_metadata=facts, usage_metadata=usage)
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        await asyncio.sleep(self.seconds)
        return self._generate(messages)


class QuickLLM(MockLLM):
    """LlamaIndex's."""

    _seconds: float = PrivateAttr()
    _logprob: float = PrivateAttr()

    def __init__(self, seconds: float, logprob: float) -> None:
        super().__init__()
        self._seconds, self._logprob = seconds, logprob

    @llm_chat_callback()
    def chat(self, messages: Any, **kwargs: Any) -> ChatResponse:
        return self._answer()

    @llm_chat_callback()
    async def achat(self, messages: Any, **kwargs: Any) -> ChatResponse:
        await asyncio.sleep(self._seconds)
        return self._answer()

    def _answer(self) -> ChatResponse:
        raw = {
            "model": "small",
            "choices": [{"logprobs": {"content": [{"token": "yes", "logprob": self._logprob}]}}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 1},
        }
        return ChatResponse(message=ChatMessage("yes", role="assistant"), raw=raw)


class QuickEngine:
    """DSPy's."""

    def __init__(self, seconds: float, logprob: float) -> None:
        self.seconds, self.logprob = seconds, logprob

    def complete(self, request: Request) -> Response:
        said = "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant([TextPart(said)]),
            finish_reason="stop",
            usage=Usage(input_tokens=3, output_tokens=1),
            logprobs=(TokenLogprob("yes", self.logprob),),
        )

    def close(self) -> None: ...


class AsyncQuickEngine(QuickEngine):
    async def complete(self, request: Request) -> Response:
        await asyncio.sleep(self.seconds)
        return QuickEngine.complete(self, request)

    async def aclose(self) -> None: ...


def dspy_lm(name: str, seconds: float, logprob: float) -> dspy.LM:
    engines = QuickEngine(seconds, logprob), AsyncQuickEngine(seconds, logprob)
    return dspy.LM(f"quick/{name}", engine=engines[0], async_engine=engines[1], cache=False, num_retries=0)


def imports() -> dict[str, Any]:
    """Milliseconds to import the package, beside numpy, each in a new process."""
    code = "import time; start = time.perf_counter(); import {}; print((time.perf_counter() - start) * 1e3)"
    times: dict[str, list[float]] = {"routenlp_plugins": [], "numpy": []}
    for _ in range(IMPORTS):
        for name, of in times.items():
            of.append(float(output(code.format(name))))
    ours, numpy = median(times["routenlp_plugins"]), median(times["numpy"])
    loaded = output("import sys, routenlp_plugins; print(*{m.split('.')[0] for m in sys.modules})").split()
    heavy = ("numpy", "torch", "sklearn", "pydantic", "langchain_core", "llama_index", "dspy")
    return {
        "median_ms": round(ours, 2),
        "numpy_median_ms": round(numpy, 2),
        "ratio_to_numpy": round(ours / numpy, 3),
        "frameworks_or_arrays_loaded": [name for name in loaded if name in heavy],
    }


def output(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
