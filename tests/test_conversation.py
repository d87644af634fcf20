"""Decisions are about the user's words, not about what a harness adds to them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routenlp_plugins import DataError, turn_key, user_words
from routenlp_plugins.conversation import HARNESS_TAGS, REQUEST_TAGS


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Where is my card?", "Where is my card?"),
        (" a < b and c > d ", " a < b and c > d "),
        ("<div><my-widget>fix this</my-widget></div>", "<div><my-widget>fix this</my-widget></div>"),
        ("<system-reminder>be brief</system-reminder>\nFix the test.", "Fix the test."),
        ("Fix it.<Context kind='x'>a <context>b</context> c</Context> Now.", "Fix it. Now."),
        ("<context><system-reminder>x</context>Fix it.", "Fix it."),
        ("<system-reminder>never closed. Fix it.", "<system-reminder>never closed. Fix it."),
        ("</context>Fix it.", "</context>Fix it."),
        ("<contextual>Fix it.</contextual>", "<contextual>Fix it.</contextual>"),
        ("<open_files/>Fix it.", "<open_files/>Fix it."),
        ("<user_info>OS</user_info><user_query>Fix\n it.</user_query> tail", "Fix\n it."),
        ("<user_query>One</user_query> and <user_query>two</user_query>", "One\ntwo"),
        ("<user_query><context>x</context></user_query>Fix it.", "Fix it."),
    ],
)
def test_what_a_harness_adds_is_stripped_and_nothing_else(text, words):
    found = user_words([{"role": "system", "content": "You are an agent."}, user(text)])
    assert found.strip() == words.strip()
    if "<" not in text:
        assert found == text


def test_tool_results_and_empty_messages_are_not_the_users_turn():
    turn = [
        {"role": "system", "content": "S"},
        user("first"),
        {"role": "assistant", "content": "calling"},
        user("<tool_result>42</tool_result>"),
        {"role": "tool", "content": "43"},
        user(""),
    ]
    assert user_words(turn) == "first"
    assert user_words([*turn, user("second")]) == "second"


def test_a_conversation_without_words_of_a_user_has_its_last_message():
    assert user_words([user("<context>only</context>")]) == "<context>only</context>"
    assert user_words([{"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}]) == "A"


def test_a_turn_has_one_key_and_the_next_another():
    turn = [{"role": "system", "content": "S"}, user("<context>v1</context>first")]
    later = [
        {"role": "system", "content": "S, and the time"},
        user("<context>v2</context>first "),
        {"role": "tool", "content": "5"},
        user("<system-reminder>go on</system-reminder>"),
    ]
    assert turn_key(turn) == turn_key(later)
    assert turn_key([*turn, user("first")]) != turn_key(turn)
    assert turn_key([user("a"), user("bc")]) != turn_key([user("ab"), user("c")])


def test_tags_are_configuration():
    assert user_words([user("<memo>x</memo>do")], harness=("memo",)) == "do"
    assert user_words([user("<context>x</context>do")], harness=()) == "<context>x</context>do"
    assert user_words([user("< a ></ a >")], harness=(), requests=()) == "< a ></ a >"


@given(
    st.lists(
        st.sampled_from(
            [f"<{t}>" for t in (*HARNESS_TAGS[:3], "task")] + [f"</{t}>" for t in HARNESS_TAGS[:3]] + ["a"]
        ),
        max_size=30,
    )
)
def test_any_nesting_ends_in_words_of_the_text_without_a_closed_element(parts):
    text = "".join(parts)
    words = user_words([user(text)])
    assert set(words) <= set(text)
    assert words.count("a") <= text.count("a")


@pytest.mark.parametrize(
    "attack", ["<context>", "</context>", "<context", "<context><user_query>", "<user_query ", "<"]
)
def test_no_message_takes_more_than_linear_time(attack):
    def seconds(repeats: int) -> float:
        started = time.perf_counter()
        user_words([user(attack * repeats)])
        return time.perf_counter() - started

    small = min(seconds(2_000) for _ in range(3))
    assert min(seconds(20_000) for _ in range(3)) < 40 * small + 0.05


def test_the_rule_names_no_tag_twice():
    names = [tag.lower() for tag in (*HARNESS_TAGS, *REQUEST_TAGS)]
    assert len(set(names)) == len(names)


def test_content_in_parts_is_read_and_other_forms_are_told():
    parts = [
        {"type": "text", "text": "What is"},
        {"type": "image_url", "image_url": {}},
        {"type": "text", "text": "this?"},
    ]
    asked = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    assert user_words(asked) == "What is\nthis?"
    assert turn_key(asked) == turn_key([user("What is\nthis?")])
    for wrong, message in (([], "at least one"), (["hello"], "got str"), ([{"role": "user", "content": 3}], "got int")):
        with pytest.raises(DataError, match=message):
            user_words(wrong)
