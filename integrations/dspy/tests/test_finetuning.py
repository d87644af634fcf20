"""Students of the distillation loop, taught by `dspy.BootstrapFinetune`."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import pytest
from dspy_world import fields, lm
from helpers import FRONTIER, SMALL

from dspy_routenlp import RouterModule, StudentProvider, decision_of, student_lm
from routenlp_plugins import ClassifierStudent, DataError, Lesson, Portfolio, Release, ReleaseError, Tier, load_student
from routenlp_plugins.testing import ScriptedServer

INTENTS = {"card": "lost card", "rate": "exchange rate", "fee": "charges"}
WORDS = tuple(INTENTS)


class Intent(dspy.Signature):
    """What is the customer about?"""

    question: str = dspy.InputField()
    intent: str = dspy.OutputField()


def examples(start: int, end: int) -> list[dspy.Example]:
    asked = [
        (f"{number}: what about the {WORDS[number % 3]}, please?", WORDS[number % 3]) for number in range(start, end)
    ]
    return [dspy.Example(question=text, intent=INTENTS[word]).with_inputs("question") for text, word in asked]


def right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return prediction.intent == example.intent


def program(of: dspy.LM) -> dspy.Predict:
    made = dspy.Predict(Intent)
    made.set_lm(of)
    return made


@pytest.fixture
def model(tmp_path) -> dspy.LM:
    """A student that knows cards only."""
    said = fields(intent="lost card"), fields(intent="charges")
    given = [Lesson(str(n), "intent", f"{n} {('card', 'sum')[n % 2]}", said[n % 2], "given") for n in range(6)]
    return student_lm(ClassifierStudent.train(given), tmp_path / "students")


@pytest.fixture
def teacher() -> Any:
    def reply(request: Any) -> str:
        asked = request["messages"][-1]["content"]
        return fields(intent=next(name for word, name in INTENTS.items() if f"the {word}," in asked))

    with ScriptedServer(reply) as server:
        yield lm(server, FRONTIER)


def test_an_optimiser_teaches_it_and_the_loop_can_go_on_from_there(model, teacher, tmp_path):
    before = dspy.Evaluate(devset=examples(60, 90), metric=right, num_threads=1, display_progress=False)
    optimiser = dspy.BootstrapFinetune(metric=right, num_threads=1)
    made = optimiser.compile(program(model), trainset=examples(0, 60), teacher=program(teacher))
    assert before(program(model)).score < 50
    assert before(made).score == 100
    folder = tmp_path / "students" / made.lm.model.partition(":")[2]
    student = load_student(folder)
    assert fields(intent="exchange rate") in {lesson.answer.strip() for lesson in student.lessons}
    # the same lessons are not taught twice, and what answered before still does
    again = dspy.BootstrapFinetune(metric=right, num_threads=1).compile(
        program(model), trainset=examples(0, 60), teacher=program(teacher)
    )
    assert again.lm.model == made.lm.model
    assert len(list((tmp_path / "students").iterdir())) == 1
    assert asyncio.run(made.acall(question="what about the rate, please?")).intent == "exchange rate"


def test_it_is_a_tier_as_any_other(model, teacher):
    portfolio = Portfolio((Tier(SMALL, 0, 0), Tier(FRONTIER, 10, 10)), FRONTIER)
    routed = RouterModule(dspy.Predict(Intent), {SMALL: model, FRONTIER: teacher}, Release.frontier_only(portfolio))
    assert decision_of(routed(question="what about the fee, please?")).accepted.tier == FRONTIER


def test_what_it_cannot_do_it_says(model):
    with pytest.raises(dspy.LMUnsupportedFeatureError, match="gives its best answer and draws none"):
        model("hi", temperature=1.0)
    provider = model.provider
    assert isinstance(provider, StudentProvider)
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    with pytest.raises(DataError, match="epochs is unknown; a student takes seed, progress and task"):
        provider.finetune(None, model.model, rows, "chat", {"epochs": 3})
    with pytest.raises(DataError, match="got data of the format 'completion'"):
        provider.finetune(None, model.model, rows, "completion")
    with pytest.raises(DataError, match=r"train_data\[0\]: expected"):
        provider.finetune(None, model.model, [{"messages": []}], "chat")
    with pytest.raises(dspy.LMUnexpectedError) as caught:
        model.copy(model=f"{model.model}:nothing")("hi")
    assert isinstance(caught.value.__cause__, ReleaseError)


def test_a_teaching_that_fails_is_an_error_of_the_optimiser(model, teacher, tmp_path):
    (tmp_path / "students").write_text("no folder")
    with pytest.raises(Exception, match="students"):
        dspy.BootstrapFinetune(metric=right, num_threads=1).compile(
            program(model), trainset=examples(0, 60), teacher=program(teacher)
        )
