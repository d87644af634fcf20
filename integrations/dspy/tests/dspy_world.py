"""Small releases, answers in DSPy's form, and language models in front of scripted servers."""

from __future__ import annotations

import re
from typing import Any

import dspy
from helpers import SMALL, gated, release_beyond

from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer

SAID = "the frontier says so"


def fields(**outputs: object) -> str:
    """An answer in the form that DSPy's chat adapter reads."""
    told = "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in outputs.items())
    return f"{told}\n\n[[ ## completed ## ]]"


ALWAYS, GATED = release_beyond(Rung(SMALL)), release_beyond(gated(SMALL, 0.5, "token_probability"))
NEVER = release_beyond(gated(SMALL, 1.0, "confidence"))


def lm(server: ScriptedServer, name: str, **more: object) -> dspy.LM:
    own = {"cache": False, "num_retries": 0, "logprobs": True, **more}
    return dspy.LM(f"openai/{name}", api_base=server.url, api_key="none", **own)


class Double(dspy.Signature):
    """Double the number."""

    question: int = dspy.InputField()
    answer: int = dspy.OutputField()


def number(request: Any) -> int:
    """That is asked to be doubled; 1 where a request asks something else."""
    found = re.findall(r"\[\[ ## question ## \]\]\s*(\d+)", str(request["messages"][-1]["content"]))
    return int(found[-1]) if found else 1


def right(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return prediction.answer == example.question * 2


def examples(start: int, end: int) -> list[dspy.Example]:
    return [dspy.Example(question=n, answer=2 * n).with_inputs("question") for n in range(start, end)]
