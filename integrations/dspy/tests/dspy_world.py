"""Small releases, answers in DSPy's form, and language models in front of scripted servers."""

from __future__ import annotations

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
