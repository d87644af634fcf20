from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import FRONTIER, QUESTION, SMALL, portfolio, rows

from routenlp_plugins import (
    Completion,
    DataError,
    Dispatcher,
    Portfolio,
    PortfolioError,
    Query,
    Session,
    Tier,
    fit,
    session_after,
    turn_key,
)

FIRST = {"role": "user", "content": "first"}
SAID = {"role": "assistant", "content": "answer"}
NEXT = {"role": "user", "content": QUESTION}


def with_cache(cached: float | None) -> Portfolio:
    tiers = tuple(
        replace(t, cached_input_usd_per_mtok=cached if t.name == FRONTIER else None) for t in portfolio().tiers
    )
    return replace(portfolio(), tiers=tiers)


@pytest.fixture(scope="module")
def release():
    return fit(rows(600), portfolio(), alpha=0.1)


def dispatcher(release, cached: float | None = 1.0) -> Dispatcher:
    used = release._for(with_cache(cached))
    return Dispatcher(used, dict.fromkeys(used.portfolio.names, lambda call: Completion("a", confidence=1.0)))


def query(session: Session | None, *messages) -> Query:
    return Query(QUESTION, "t", messages=(FIRST, SAID, *messages), session=session)


ON_FRONTIER = Session(FRONTIER, turn_key([FIRST]), input_tokens=10_000, output_tokens=100)


def test_a_conversation_stays_where_its_cache_saves_more_than_a_switch(release):
    answer = dispatcher(release).run(query(ON_FRONTIER, NEXT))
    assert answer.tier == FRONTIER
    assert "its prompt cache saves 0.09" in answer.trace.reason


@pytest.mark.parametrize(
    "session",
    [
        None,
        replace(ON_FRONTIER, tier=SMALL),
        replace(ON_FRONTIER, input_tokens=0, output_tokens=0),  # nobody counted
        replace(ON_FRONTIER, input_tokens=100, output_tokens=10_000),  # hardly anything is in the cache
    ],
)
def test_a_switch_that_pays_is_made(release, session):
    assert dispatcher(release).run(query(session, NEXT)).tier == SMALL


def test_without_a_price_for_cached_tokens_there_is_no_reason_to_stay(release):
    assert dispatcher(release, None).run(query(ON_FRONTIER, NEXT)).tier == SMALL


def test_a_turn_that_the_frontier_answered_in_stays_there(release):
    again = {"role": "tool", "content": "result"}
    assert dispatcher(release, None).run(query(ON_FRONTIER, again)).trace.reason == (
        "frontier: it answered in this turn already"
    )


def test_other_promises_say_nothing_of_conversations_that_stay():
    kept = fit(rows(600), portfolio(), retention=0.9)
    assert dispatcher(kept).run(query(ON_FRONTIER, NEXT)).tier == SMALL


def test_an_answer_leaves_its_session_behind(release):
    answer = dispatcher(release).run(query(None, NEXT))
    assert session_after(answer) == Session(SMALL, turn_key([FIRST, SAID, NEXT]))


def test_a_cached_token_is_not_dearer_than_another():
    with pytest.raises(PortfolioError, match="cached_input_usd_per_mtok is above"):
        Tier("a", 1.0, 1.0, cached_input_usd_per_mtok=2.0)


@pytest.mark.parametrize("tokens", [float("nan"), -1, True, 2.5])
def test_tokens_that_are_no_number_are_told(tokens):
    with pytest.raises(DataError, match="session: input_tokens must be a whole number of tokens, got"):
        Session("frontier", "turn", tokens)
