from __future__ import annotations

from langchain_core.messages import AIMessage, HumanMessage

from langchain_routenlp.messages import query_of
from routenlp_plugins import Session, turn_key

DECISION = {
    "tier": "strong",
    "attempts": [{"accepted": False, "input_tokens": 1}, {"accepted": True, "input_tokens": 70, "output_tokens": 5}],
}


def test_the_last_decision_in_a_conversation_is_its_session():
    said = AIMessage("answer", response_metadata={"routenlp": DECISION})
    query = query_of([HumanMessage("first"), said, HumanMessage("second")], "t", frozenset(), "", None)
    assert query.session == Session("strong", turn_key([{"role": "user", "content": "first"}]), 70, 5)


def test_messages_without_a_decision_have_no_session():
    other = AIMessage("answer", response_metadata={"routenlp": "mine"})
    query = query_of([HumanMessage("first"), AIMessage("a"), other, HumanMessage("second")], "t", frozenset(), "", None)
    assert query.session is None
