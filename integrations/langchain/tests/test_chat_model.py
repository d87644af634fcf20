"""One run, usage of all attempts counted once, and the decision in the message."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import reduce
from operator import add
from statistics import median
from time import perf_counter
from typing import Any

import openai
import pytest
from helpers import FRONTIER, MIDDLE, SMALL, gated, portfolio, release
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ValidationError

from langchain_routenlp import RouterChatModel
from langchain_routenlp.messages import completion_of, query_of
from routenlp_plugins import (
    Completion,
    DataError,
    Policy,
    PortfolioError,
    Release,
    ReleaseError,
    Task,
    TierError,
)
from routenlp_plugins.policy import Confidence, Rung, Term
from routenlp_plugins.testing import ScriptedServer, ScriptedTier
from routenlp_plugins.tiers.scored import PTrueTier, ScoredTier, SelfConsistentTier


class Scripted(BaseChatModel):
    """Answers with its name, the options it was called with, log-probabilities and seven tokens of usage."""

    model: str
    logprob: float = -0.1

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kw: Any
    ) -> ChatResult:
        message = AIMessage(
            f"{self.model} says",
            usage_metadata=UsageMetadata(input_tokens=3, output_tokens=4, total_tokens=7),
            response_metadata={
                "model_name": self.model,
                "logprobs": {"content": [{"token": "x", "logprob": self.logprob}]},
                "seen": {"stop": stop, **kw},
                "run_manager": run_manager is not None,
            },
        )
        return ChatResult(generations=[ChatGeneration(message=message)])


GATED = release(gated(SMALL, 0.5, "token_probability"))
SURE, UNSURE = Scripted(model="small-model"), Scripted(model="small-model", logprob=-3.0)
STRONG = Scripted(model="strong-model")


def router(small: Any = SURE, frontier: Any = STRONG, used: Release = GATED, **more: Any) -> RouterChatModel:
    return RouterChatModel(tiers={SMALL: small, FRONTIER: frontier}, release=used, **more)


class Runs(BaseCallbackHandler):
    """What handlers see of runs."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: Any, **_: Any) -> None:
        self.events.append("start")

    def on_llm_end(self, response: Any, *, run_id: Any, **_: Any) -> None:
        self.events.append("end")

    def on_llm_error(self, error: BaseException, *, run_id: Any, **_: Any) -> None:
        self.events.append("error")


@pytest.mark.parametrize(("small", "text", "calls"), [(SURE, "small-model says", 1), (UNSURE, "strong-model says", 2)])
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream", "batch", "abatch"])
async def test_a_cascade_is_one_run_and_its_usage_is_counted_once(small, text, calls, way):
    runs = Runs()
    with get_usage_metadata_callback() as usage:
        message = await ask(router(small), way, {"callbacks": [runs]})
    assert message.text == text
    assert runs.events == ["start", "end"]
    assert [one["total_tokens"] for one in usage.usage_metadata.values()] == [7 * calls]
    assert message.usage_metadata["total_tokens"] == 7 * calls
    decision = message.response_metadata["routenlp"]
    assert [attempt["tier"] for attempt in decision["attempts"]] == [SMALL, FRONTIER][:calls]
    assert message.response_metadata["model_name"] == text.removesuffix(" says")
    assert decision["cost_usd"] == pytest.approx(7 * (0.1 if calls == 1 else 10.1) / 1e6)


async def ask(model: Any, way: str, config: Any) -> Any:
    match way:
        case "invoke":
            return model.invoke("hi", config)
        case "ainvoke":
            return await model.ainvoke("hi", config)
        case "stream":
            return added(list(model.stream("hi", config)))
        case "astream":
            return added([chunk async for chunk in model.astream("hi", config)])
        case "batch":
            return model.batch(["hi"], config)[0]
        case _:
            return (await model.abatch(["hi"], config))[0]


def added(chunks: list[Any]) -> Any:
    return reduce(add, chunks)


def test_a_rejected_tier_opens_no_run_of_its_own():
    message = router(UNSURE).invoke("hi")
    assert message.response_metadata["run_manager"] is False


TWO = Release(portfolio(Task("a"), Task("b")), Policy(FRONTIER, {"a": (Rung(SMALL),), "b": ()}))


@pytest.mark.parametrize(
    ("own", "of_the_call", "tier", "reason"),
    [
        ("a", None, SMALL, "every answer is accepted"),
        ("b", None, FRONTIER, "task 'b' stays on the frontier"),
        ("b", "a", SMALL, "every answer is accepted"),
        (None, "a", SMALL, "every answer is accepted"),
        (None, None, FRONTIER, "the query names no task; known tasks: a, b"),
        ("a", "c", FRONTIER, "unknown task 'c'"),
    ],
)
def test_the_task_comes_from_the_call_or_from_the_model(own, of_the_call, tier, reason):
    metadata = {} if of_the_call is None else {"routenlp_task": of_the_call}
    decision = router(used=TWO, task=own).invoke("hi", {"metadata": metadata}).response_metadata["routenlp"]
    assert decision["tier"] == tier
    assert reason in decision["reason"]


def test_the_query_is_the_last_message_of_the_user():
    small = ScriptedTier(default=Completion("yes"))
    model = router(small, used=release(Rung(SMALL)))
    model.invoke([SystemMessage("be brief"), HumanMessage("first"), AIMessage("ok"), HumanMessage("second")])
    (call,) = small.calls
    assert call.query.text == "second"
    assert [message["role"] for message in call.query.chat] == ["system", "user", "assistant", "user"]


def test_a_core_tier_becomes_a_message_with_its_evidence():
    completion = Completion("yes", token_logprobs=(-0.1, -0.2), input_tokens=2, output_tokens=5)
    message = router(ScriptedTier(default=completion), used=release(Rung(SMALL))).invoke("hi")
    assert message.usage_metadata["total_tokens"] == 7
    assert [token["logprob"] for token in message.response_metadata["logprobs"]["content"]] == [-0.1, -0.2]
    assert message.response_metadata["model_name"] == SMALL


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_a_chat_model_inside_a_tier_that_adds_scores(way):
    """The scores are evidence, and what they took is in the usage: an answer, a second one, a question about it."""
    judged = ScoredTier(PTrueTier(SelfConsistentTier(UNSURE, samples=2)), {"short": lambda query, answer: 0.9})
    message = await ask(router(judged, used=release(gated(SMALL, 0.8, "short"))), way, {})
    scores = message.response_metadata["routenlp"]["attempts"][0]["scores"]
    assert (message.text, scores["short"], scores["self_consistency"]) == ("small-model says", 0.9, 1.0)
    assert message.usage_metadata["total_tokens"] == 7 * 4


def test_tiers_are_compared_by_the_user_s_own_comparator():
    def same_first_word(one: str, other: str) -> float:
        return float(one.split()[0] == other.split()[0])

    agreeing = Confidence(MIDDLE, (Term(1.0, MIDDLE, None, SMALL),))
    policy = Policy(FRONTIER, {"t": (Rung(SMALL, 1.0), Rung(MIDDLE, 0.6, (agreeing,)))}, comparators={"t": "mine"})
    tiers = {SMALL: ScriptedTier(default="yes, so"), MIDDLE: ScriptedTier(default="yes, indeed"), FRONTIER: STRONG}
    used = Release(portfolio(Task("t")), policy)
    routed = RouterChatModel(tiers=tiers, release=used, comparators={"mine": same_first_word})
    assert routed.invoke("x").text == "yes, indeed"
    with pytest.raises(DataError, match="comparator 'mine' is unknown"):
        RouterChatModel(tiers=tiers, release=used)


def test_calls_with_tools_or_a_response_format_go_to_the_frontier():
    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return city

    neutral = router().bind_tools([weather]).kwargs["tools"]
    message = router().bind(tools=neutral).invoke("hi")
    assert message.response_metadata["seen"]["tools"][0]["function"]["name"] == "weather"
    assert message.response_metadata["routenlp"]["reason"].endswith("calls that need tools")
    message = router().bind(response_format={"type": "json_object"}).invoke("hi")
    assert message.response_metadata["routenlp"]["reason"].endswith("calls that need structured output")


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CALL = AIMessage("", tool_calls=[{"name": "weather", "args": {}, "id": "1"}])


@pytest.mark.parametrize(
    ("messages", "needed"),
    [
        ([HumanMessage([{"type": "text", "text": "what is this?"}, IMAGE])], "image"),
        ([HumanMessage("hi"), CALL, ToolMessage("sunny", tool_call_id="1")], "tools"),
        ([HumanMessage([{"type": "text", "text": "only text"}])], None),
    ],
)
def test_conversations_with_more_than_text_go_to_the_frontier(messages, needed):
    decision = router().invoke(messages).response_metadata["routenlp"]
    assert decision["tier"] == (FRONTIER if needed else SMALL)
    assert needed is None or decision["reason"].endswith(f"calls that need {needed}")


def test_an_answer_of_one_task_is_never_served_for_another_from_a_cache():
    set_llm_cache(InMemoryCache())
    try:
        model = router(used=TWO)
        tiers = [
            model.invoke("hi", {"metadata": {"routenlp_task": task}}).response_metadata["routenlp"]["tier"]
            for task in ("a", "b", "a")
        ]
    finally:
        set_llm_cache(None)
    assert tiers == [SMALL, FRONTIER, SMALL]


class Reply(BaseModel):
    """A reply."""

    text: str


def test_a_structured_answer_is_the_frontier_s():
    with ScriptedServer(lambda request: '{"text": "hello"}') as server:
        model = ChatOpenAI(model="m", base_url=server.url, api_key="none")
        routed = router(frontier=model)
        structured = routed.bind(response_format={"type": "json_object"}) | RunnableLambda(lambda m: m.text)
        assert Reply.model_validate_json(structured.invoke("hi")) == Reply(text="hello")
        assert server.requests[0]["response_format"] == {"type": "json_object"}


def test_options_of_the_call_come_before_those_of_the_router_and_those_before_the_tier_s():
    bound = SURE.bind(temperature=0.1, stop=["tier"], seed=1)
    assert router(bound).invoke("hi").response_metadata["seen"] == {"temperature": 0.1, "stop": ["tier"], "seed": 1}
    own = router(bound, temperature=0.2, stop=["router"], max_tokens=5)
    expected = {"temperature": 0.2, "stop": ["router"], "seed": 1, "max_tokens": 5}
    assert own.invoke("hi").response_metadata["seen"] == expected
    called = own.invoke("hi", stop=["call"], temperature=0.3).response_metadata["seen"]
    assert (called["stop"], called["temperature"]) == (["call"], 0.3)


def test_a_call_may_name_its_tier():
    assert router().invoke("hi", model=FRONTIER).text == "strong-model says"
    assert router(UNSURE).invoke("hi", model=SMALL).text == "small-model says"
    other = router().bind(model="strong-model-2").invoke("hi")
    assert other.response_metadata["seen"] == {"stop": None, "model": "strong-model-2"}
    assert other.response_metadata["routenlp"]["reason"].endswith("calls that need another model")
    with pytest.raises(PortfolioError, match="model='gpt' is not a tier; tiers: small, frontier"):
        router(frontier=ScriptedTier(default="x")).invoke("hi", model="gpt")


async def test_a_failing_frontier_ends_the_run_with_the_attempts():
    runs = Runs()
    model = router(UNSURE, ScriptedTier(default=OSError("refused")))
    with pytest.raises(TierError, match=r"small: answer rejected; frontier: OSError: refused"):
        model.invoke("hi", {"callbacks": [runs]})
    with pytest.raises(TierError) as caught:
        await model.ainvoke("hi", {"callbacks": [runs]})
    assert runs.events == ["start", "error"] * 2
    assert [attempt.tier for attempt in caught.value.attempts] == [SMALL, FRONTIER]


async def test_a_failing_chat_model_raises_what_it_raised_without_us():
    with ScriptedServer({}) as server:
        model = router(UNSURE, ChatOpenAI(model="m", base_url=server.url, api_key="none", max_retries=0))
        with pytest.raises(openai.NotFoundError) as caught:
            model.invoke("hi")
        assert caught.value.__notes__[0].startswith("routenlp: no tier answered (small: answer rejected; frontier: ")
        server.fail(500, times=2)
        patient = model.with_retry(retry_if_exception_type=(openai.InternalServerError,), stop_after_attempt=2)
        with pytest.raises(openai.InternalServerError):
            patient.invoke("hi")
        assert len(server.requests) == 3
        spare = model.with_fallbacks([SURE], exceptions_to_handle=(openai.NotFoundError,))
        assert spare.invoke("hi").text == "small-model says"


async def test_many_calls_at_once_keep_their_decisions_apart():
    def echo(call: Any) -> Completion:
        return Completion(call.query.text, confidence=float(call.query.text) / 100)

    model = router(echo, echo, release(gated(SMALL, 0.5, "confidence")))
    messages = await asyncio.gather(*(model.ainvoke(str(i)) for i in range(100)))
    assert [message.text for message in messages] == [str(i) for i in range(100)]
    tiers = [message.response_metadata["routenlp"]["tier"] for message in messages]
    assert tiers == [FRONTIER] * 50 + [SMALL] * 50


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tiers": {FRONTIER: STRONG}}, PortfolioError, "no callable for small, which the release can call"),
        ({"tiers": {SMALL: SURE, FRONTIER: STRONG, "x": STRONG}}, PortfolioError, "x is not in the portfolio"),
        ({"tiers": {SMALL: "gpt", FRONTIER: STRONG}}, PortfolioError, "tiers: small must be a chat model"),
        ({"tiers": {SMALL: RunnableLambda(len), FRONTIER: STRONG}}, PortfolioError, "got RunnableLambda"),
        ({"release": 3}, ValidationError, "expected a Release or the path of its folder, got int"),
        ({"release": "nowhere"}, ReleaseError, "nowhere/manifest.json: cannot be read"),
        ({"task": "c"}, PortfolioError, "task='c' is unknown to the release; its tasks: t"),
        ({"taks": "a"}, ValidationError, "unknown argument taks; known: .*task"),
    ],
)
def test_bad_arguments_are_named_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        RouterChatModel(**{"tiers": {SMALL: SURE, FRONTIER: STRONG}, "release": GATED, **arguments})


def test_tiers_that_the_policy_never_calls_may_be_left_out():
    assert MIDDLE not in router().tiers
    assert router().invoke("hi").text == "small-model says"


def test_two_policies_have_different_cache_keys():
    one, other = router(), router(used=release(gated(SMALL, 0.6, "token_probability")))
    assert one._get_llm_string() != other._get_llm_string()
    assert one._get_llm_string() == router()._get_llm_string()


def test_routing_adds_at_most_a_millisecond_to_the_bare_model():
    def milliseconds(model: Any) -> float:
        start = perf_counter()
        model.invoke("hi")
        return (perf_counter() - start) * 1e3

    routed, bare = router(), SURE
    pairs = [(milliseconds(routed), milliseconds(bare)) for _ in range(300)]
    assert median(with_router - alone for with_router, alone in pairs) <= 1.0


def test_a_copy_with_another_release_uses_it():
    always = router(used=release(Rung(SMALL)))
    assert always.invoke("hi").text == "small-model says"
    assert always.model_copy(update={"release": release()}).invoke("hi").text == "strong-model says"
    other = {SMALL: Scripted(model="other"), FRONTIER: STRONG}
    assert always.model_copy(update={"tiers": other}).invoke("hi").text == "other says"


def test_tools_bound_to_the_router_are_sent_in_the_frontier_s_own_form():
    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return city

    with ScriptedServer(lambda request: "sunny") as server:
        model = ChatOpenAI(model="m", base_url=server.url, api_key="none")
        for choice in ("any", "weather"):
            model.bind_tools([weather], tool_choice=choice).invoke("hi")
            router(frontier=model).bind_tools([weather], tool_choice=choice).invoke("hi")
        plain_any, ours_any, plain_named, ours_named = server.requests
        server.requests.clear()
        model.bind_tools([weather], strict=True, parallel_tool_calls=False).invoke("hi")
        router(frontier=model).bind_tools([weather], strict=True, parallel_tool_calls=False).invoke("hi")
        assert server.requests[0] == server.requests[1]
    assert ours_any == plain_any
    assert ours_named == plain_named


def test_a_plain_callable_cannot_be_the_frontier_of_calls_with_tools():
    model = router(frontier=ScriptedTier(default="x"))
    with pytest.raises(PortfolioError, match="tier 'frontier' is a plain callable, and the call needs tools"):
        model.bind(tools=[{"type": "function"}]).invoke("hi")


@pytest.mark.parametrize(
    ("reported", "score"),
    [
        ([{"token": "a", "logprob": -0.1}], 0.9048),
        ({"content": ["a"]}, None),
        ({"content": [{"logprob": float("nan")}]}, None),
        ({"content": [{"logprob": -0.1}, {}]}, None),
        ("none", None),
    ],
)
def test_log_probabilities_that_cannot_be_read_are_missing_evidence(reported, score):
    class Odd(Scripted):
        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kw: Any) -> ChatResult:
            message = AIMessage("odd", response_metadata={"logprobs": reported})
            return ChatResult(generations=[ChatGeneration(message=message)])

    attempt = router(Odd(model="odd")).invoke("hi").response_metadata["routenlp"]["attempts"][0]
    assert attempt["error"] is None
    assert attempt["calibrated_confidence"] == (None if score is None else pytest.approx(score, abs=1e-4))
    assert router(UNSURE, Odd(model="odd")).invoke("hi").text == "odd"


def test_listeners_of_a_tier_would_hear_nothing_and_are_refused():
    with pytest.raises(PortfolioError, match="tiers: small is bound to callbacks or listeners"):
        router(SURE.with_config(callbacks=[Runs()]))
    with pytest.raises(PortfolioError, match="tiers: small has callbacks"):
        router(SURE.model_copy(update={"callbacks": [Runs()]}))
    with pytest.raises(PortfolioError, match="tiers: small is bound to callbacks or listeners"):
        router(SURE.with_listeners(on_start=lambda run: None))
    assert router(SURE.with_config(tags=["mine"])).invoke("hi").text == "small-model says"


@pytest.mark.parametrize(
    ("messages", "metadata", "message"),
    [
        ([], {}, "messages: empty"),
        ("hi", {"routenlp_task": ["t"]}, r"routenlp_task must be the name of a task, got \['t'\]"),
    ],
)
def test_calls_that_make_no_sense_are_named(messages, metadata, message):
    with pytest.raises(DataError, match=message):
        router().invoke(messages, {"metadata": metadata})


PROMPTED = replace(GATED, policy=replace(GATED.policy, prompts={"t": ("none",)}))


@pytest.mark.parametrize(
    "messages",
    [
        [HumanMessage("Translate what follows."), HumanMessage("q")],
        [HumanMessage("first"), AIMessage("answer"), HumanMessage("q")],
        [HumanMessage("q"), AIMessage("Sure: ")],
        [ChatMessage(role="developer", content="Rhyme."), HumanMessage("q")],
        [SystemMessage("Rhyme."), HumanMessage("q")],
    ],
)
def test_another_form_of_conversation_is_another_prompt(messages):
    assert decided(router(used=PROMPTED), [HumanMessage("q")])["tier"] == SMALL
    decision = decided(router(used=PROMPTED), messages)
    assert decision["tier"] == FRONTIER
    assert "prompt, form or options of this call of task 't' are not those" in decision["reason"]


@pytest.mark.parametrize(
    ("options", "tier"),
    [
        ({"temperature": 2.0}, FRONTIER),
        ({"max_tokens": 1}, FRONTIER),
        ({"stop": ["a"]}, FRONTIER),
        ({"extra_body": {"tools": [1]}}, FRONTIER),
        ({"instructions": "be a pirate"}, FRONTIER),
        ({"response_mime_type": "application/json"}, FRONTIER),
        ({"model_name": "other"}, FRONTIER),
        ({"tools": []}, SMALL),
        ({"response_format": None}, SMALL),
        ({"user": "me", "timeout": 3}, SMALL),
    ],
)
def test_options_that_change_answers_are_part_of_the_prompt(options, tier):
    assert decided(router(used=PROMPTED).bind(**options), [HumanMessage("q")])["tier"] == tier


def decided(model, messages) -> dict[str, Any]:
    return model.invoke(messages).response_metadata["routenlp"]


def test_the_user_s_turn_may_be_a_chat_message():
    messages = [HumanMessage("first"), ChatMessage(role="user", content="second")]
    assert query_of(messages, None, frozenset(), "", None).text == "second"


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": {"a": -0.1, "b": -2.0}}]},
        {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": [-0.1, -2.0]}]},
        {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": [{"logprob": None}, {"token": "b"}]}]},
        {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": [{"logprob": 1e9}, {"logprob": float("nan")}]}]},
        {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": "none"}]},
    ],
)
def test_evidence_in_another_form_keeps_no_answer_from_the_user(logprobs):
    usage = UsageMetadata(input_tokens=10**16, output_tokens=1, total_tokens=1)
    message = AIMessage("x", response_metadata={"logprobs": logprobs}, usage_metadata=usage)
    completion = completion_of(message)
    assert (completion.text, completion.scores, completion.input_tokens) == ("x", {}, None)


def test_tokens_are_counted_as_the_frontier_does():
    class Counting(Scripted):
        def get_token_ids(self, text: str) -> list[int]:
            return [len(text)]

    model = router(frontier=Counting(model="strong-model"))
    assert (model.get_num_tokens("abc"), model.get_token_ids("abc")) == (1, [3])
    assert model.get_num_tokens_from_messages([HumanMessage("abc")]) == 1


def test_a_cache_does_not_answer_for_the_samples_of_a_tier():
    class Wavering(Scripted):
        asked: list[int] = []

        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kw: Any) -> ChatResult:
            self.asked.append(1)
            return ChatResult(generations=[ChatGeneration(message=AIMessage(f"answer {len(self.asked)}"))])

    wavering = Wavering(model="m")
    set_llm_cache(InMemoryCache())
    try:
        llm = router(SelfConsistentTier(wavering, samples=3), used=release(Rung(SMALL)))
        attempt = decided(llm, [HumanMessage("q")])["attempts"][0]
    finally:
        set_llm_cache(None)
    assert (len(wavering.asked), attempt["scores"]) == (3, {"self_consistency": 0.0})


def test_a_frontier_inside_a_tier_that_adds_scores_raises_its_own_error():
    class Limited(Scripted):
        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kw: Any) -> ChatResult:
            raise PermissionError("quota")

    with pytest.raises(PermissionError, match="quota"):
        router(frontier=ScoredTier(Limited(model="m"), {}), used=release()).invoke("q")
