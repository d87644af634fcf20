"""Small releases, answers in DSPy's form, and language models in front of scripted servers."""

from __future__ import annotations

import dspy
from helpers import FRONTIER, PRICES, SMALL, gated

from routenlp_plugins import Policy, Portfolio, Release, Task, Tier
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedServer

BEYOND = ("structured output", "tools")
SAID = "the frontier says so"


def fields(**outputs: object) -> str:
    """An answer in the form that DSPy's chat adapter reads."""
    told = "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in outputs.items())
    return f"{told}\n\n[[ ## completed ## ]]"


def release_of(rung: Rung, requires: tuple[str, ...] = (), *tasks: str) -> Release:
    tiers = tuple(Tier(name, PRICES[name], PRICES[name], supports=BEYOND) for name in (SMALL, FRONTIER))
    names = tasks or ("t",)
    portfolio = Portfolio(tiers, FRONTIER, tuple(Task(name, requires=requires) for name in names))
    ladders = {**dict.fromkeys(names, ()), names[0]: (rung,)}
    return Release(portfolio, Policy(FRONTIER, ladders, requires={name: requires for name in names if requires}))


ALWAYS, GATED = release_of(Rung(SMALL)), release_of(gated(SMALL, 0.5, "token_probability"))
NEVER = release_of(gated(SMALL, 1.0, "confidence"))


def lm(server: ScriptedServer, name: str, **more: object) -> dspy.LM:
    own = {"cache": False, "num_retries": 0, "logprobs": True, **more}
    return dspy.LM(f"openai/{name}", api_base=server.url, api_key="none", **own)
