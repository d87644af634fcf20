from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import FRONTIER, portfolio, row, rows

from routenlp_plugins import FitOptions, Policy, Query, Release, fit, replay
from routenlp_plugins.cascade.ladders import climb
from routenlp_plugins.evaluate.table import task_tables
from routenlp_plugins.flow import plan
from routenlp_plugins.policy import Rung
from routenlp_plugins.replaying import replayed
from routenlp_plugins.support import novelty, support_of, supported

TEXTS = [
    f"please {verb} my {thing} number {i}"
    for i in range(40)
    for verb, thing in (("close", "card"), ("open", "account"))
]


def test_what_was_seen_is_not_new_and_everything_else_is():
    support = support_of(TEXTS, 0.01, TEXTS)
    assert novelty(support.trigrams, TEXTS[3]) == 0
    assert novelty(support.trigrams, "PLEASE  close my card") < 0.2
    assert novelty(support.trigrams, "def f(x): return x ** 2") > 0.7
    assert novelty(support.trigrams, "") == novelty(support.trigrams, " \n") == 1
    assert supported(support, "please open my card number 7")
    assert not supported(support, "\u041f\u0440\u0438\u0432\u0435\u0442, \u043a\u0430\u043a \u0434\u0435\u043b\u0430?")


@pytest.mark.parametrize("texts", [TEXTS[:49], [*TEXTS, ""]])
def test_too_few_or_unknown_texts_support_nothing(texts):
    assert support_of(texts, 0.01, texts) is None


def test_turns_of_a_dialogue_do_not_vouch_for_each_other():
    """Each dialogue has words of its own that all its turns repeat: a new dialogue is as new as these were."""
    rng = np.random.default_rng(0)
    names = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 12)) for _ in range(80)]
    turns = [(name, f"{name} please, turn {i}") for name in names[:60] for i in range(4)]
    texts, dialogues = [text for _, text in turns], [name for name, _ in turns]
    new = [f"{name} please, turn 1" for name in names[60:]]
    alone, together = support_of(texts, 0.1, texts), support_of(texts, 0.1, dialogues)
    assert sum(supported(alone, text) for text in new) == 0
    assert sum(supported(together, text) for text in new) > 14


def test_a_query_unlike_the_certified_ones_goes_to_the_frontier_and_says_so():
    policy = Policy(FRONTIER, {"t": (Rung("small"),), "u": ()}, support={"t": support_of(TEXTS, 0.01, TEXTS)})
    assert plan(policy, Query(TEXTS[0], "t"))[1] == policy.ladders["t"]
    assert plan(policy, Query("SELECT * FROM q", "t"))[1:] == ((), "the query is unlike those of the certificate")
    assert "stays on the frontier" in plan(policy, Query("SELECT * FROM q", "u"))[2]


def test_the_arrays_see_it_as_the_flow_does():
    members = [
        replace(member, query=replace(member.query, text="SELECT * FROM q" if i % 3 == 0 else TEXTS[0]))
        for i, member in enumerate(row(f"q{i:02}", small=(1.0, 0.5), frontier=(1.0, None)) for i in range(30))
    ]
    policy = Policy(FRONTIER, {"t": (Rung("small"),)}, support={"t": support_of(TEXTS, 0.01, TEXTS)})
    table = task_tables(members, portfolio(), policy=policy)["t"]
    answered, cost = climb(table, policy.ladders["t"])
    release = Release(portfolio(), policy)
    for i, member in enumerate(members):
        answer = replayed(member, release)
        assert table.tiers[answered[i]] == answer.tier
        assert cost[i] == pytest.approx(answer.trace.cost_usd)
    assert (answered == 1).sum() == 10


def test_a_fitted_policy_knows_its_queries_unless_told_not_to():
    release = fit(rows(800), portfolio(), alpha=0.1)
    assert replay([replace(m, query=replace(m.query, text="\u4f60\u597d")) for m in rows(50)], release).cost_ratio == 1
    assert fit(rows(800), portfolio(), alpha=0.1, options=FitOptions(unlike=0)).policy.support == {}


def test_real_queries_of_another_task_are_unlike_and_fresh_ones_are_not(data_folder):
    def texts(task: str, part: str) -> list[str]:
        with gzip.open(data_folder / "tasks" / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
            found = [r["text"] for r in map(json.loads, lines) if r["split"] == part]
        return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:1500]]

    known = texts("cs_intent", "train")
    support = support_of(known, 0.01, known)
    fresh = np.mean([not supported(support, text) for text in texts("cs_intent", "test")])
    assert fresh < 0.03
    others = {task: texts(task, "test") for task in ("legal_clause", "finance_ner")}
    assert min(np.mean([not supported(support, text) for text in of]) for of in others.values()) > 0.6
