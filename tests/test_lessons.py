"""What is taught: parts without leaks, clusters, selections, filters."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routenlp_plugins import (
    Budget,
    Clustering,
    Completion,
    DataError,
    FailureClusters,
    Filters,
    HashedNgrams,
    Lesson,
    Query,
    ReleaseError,
    Shares,
)
from routenlp_plugins.comparing import same_text
from routenlp_plugins.distill.clusters import ELSEWHERE
from routenlp_plugins.distill.dataset import Taught, lessons_of, rehearsal
from routenlp_plugins.distill.harvest import Harvest, Served, read_harvest, write_harvest
from routenlp_plugins.distill.lessons import read_lessons, write_lessons
from routenlp_plugins.distill.parts import asked_by_many, check_leaks, leaks, near_duplicates, parts_of
from routenlp_plugins.distill.selection import SELECTIONS, Candidates, coverage, covered
from routenlp_plugins.evaluate.outcomes import Outcome, OutcomeRow


def served(name: str, text: str, unit: str | None = None, returned: str = "big") -> Served:
    outcomes = {
        "small": Outcome(None, Completion("a", confidence=0.4, model="s-1")),
        "big": Outcome(1.0, Completion("b", input_tokens=3, cost_usd=0.5)),
    }
    row = OutcomeRow(Query(text, "t", name, messages=({"role": "user", "content": text},)), outcomes)
    return Served(row, returned, unit or f"query {name}", name)


TOPICS = {
    "money": ["transfer money abroad", "money transfer to a friend", "send money to my bank", "transfer money today"],
    "card": ["my card was stolen", "the card is lost", "stolen card block", "lost my new card"],
    "login": ["forgot the password", "password reset link", "reset my login password", "cannot login password"],
}


def topics(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    kinds = [sorted(TOPICS)[rng.integers(3)] for _ in range(n)]
    return [f"{TOPICS[k][rng.integers(4)]} {rng.integers(1000)}" for k in kinds], kinds


class TestLessons:
    def test_are_read_back(self, tmp_path):
        chat = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hé\ud800"})
        lessons = (Lesson("a", "t", "one", "yes"), Lesson("b", "t", "two", "no", "rehearsal", messages=chat))
        found = read_lessons(write_lessons(tmp_path / "l.jsonl", lessons))
        assert found[0] == lessons[0]
        assert found[1].query.chat[1]["content"] == "hé?"

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ('{"query_id": "a", "task": "t", "text": "x"}', "answer: Field required"),
            ('{"query_id": "", "task": "t", "text": "x", "answer": "y"}', "query_id"),
            ('{"query_id": "a", "task": "t", "text": "x", "answer": "y", "kind": "told"}', "kind"),
            ("nonsense", "Invalid JSON"),
        ],
    )
    def test_a_bad_line_is_told_with_its_place(self, tmp_path, line, problem):
        (tmp_path / "l.jsonl").write_text(f"\n{line}\n".lstrip("\n"))
        with pytest.raises(DataError, match=f"l.jsonl:1: .*{problem}"):
            read_lessons(tmp_path / "l.jsonl")


class TestHarvest:
    def test_is_read_back_whole(self, tmp_path):
        found = Harvest((served("a", "one", unit="u"), served("b", "two")), unreadable=1, beyond_text=2, unanswered=3)
        again = read_harvest(write_harvest(tmp_path / "h.jsonl", found))
        assert [one.row.query for one in again.served] == [one.row.query for one in found.served]
        assert [one.row.outcomes for one in again.served] == [one.row.outcomes for one in found.served]
        assert [(one.returned, one.unit, one.trace_id) for one in again.served] == [
            ("big", "u", "a"),
            ("big", "query b", "b"),
        ]
        assert sum(again.left_out.values()) == 6


class TestParts:
    def test_are_the_same_again_and_have_their_shares(self):
        traffic = [served(str(i), f"question number {i} about {i * 7919}") for i in range(2000)]
        parts = parts_of(traffic, Shares(), seed=3)
        assert parts_of(traffic, Shares(), seed=3) == parts
        sizes = {name: len(of) / 2000 for name, of in parts.items()}
        assert sizes == pytest.approx({"teaching": 0.5, "gate": 0.2, "certification": 0.3}, abs=0.05)
        assert parts_of(traffic, Shares(), seed=4) != parts

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, 5), min_size=2))
    def test_units_stay_together(self, units):
        traffic = [served(str(i), f"question {i}", unit=f"u{unit}") for i, unit in enumerate(units)]
        parts = parts_of(traffic, Shares(), seed=0)
        where = {one.trace_id: name for name, of in parts.items() for one in of}
        assert len(where) == len(units)
        assert len({(one.unit, where[one.trace_id]) for one in traffic}) == len(set(units))

    def test_a_question_that_many_ask_is_in_every_part(self):
        traffic = [served(str(i), "hello" if i % 3 else f"question {i} of {i * 7919}") for i in range(600)]
        parts = parts_of(traffic, Shares(), seed=0)
        for of in parts.values():
            assert np.mean([one.row.query.text == "hello" for one in of]) == pytest.approx(2 / 3, abs=0.1)
        common = asked_by_many(traffic)
        assert common == {"hello"}
        gate = [served("g", "hello")]
        check_leaks([Lesson("x", "t", "Hello!", "hi")], {"gate": gate}, common)
        with pytest.raises(DataError, match="is nearly the same"):
            check_leaks([Lesson("x", "t", "Hello!", "hi")], {"gate": gate}, frozenset())

    def test_one_who_asks_often_is_not_many(self):
        assert asked_by_many([served(str(i), "hello", unit="one") for i in range(20)]) == frozenset()

    def test_conversations_are_compared_as_a_whole(self):
        def turn(name: str, before: str) -> Query:
            said = ({"role": "assistant", "content": before}, {"role": "user", "content": "yes please"})
            return Query("yes please", "t", name, said)

        one, other = turn("a", "Shall I block the card?"), turn("b", "Do you want a new account with us?")
        assert leaks([one], [other], frozenset()) == []
        assert leaks([one], [replace(one, id="c")], frozenset()) == [(0, 0)]
        made = lessons_of([Taught(one, Completion("blocked")), Taught(other, Completion("opened"))])
        assert len(made.lessons) == 2 and made.dropped == {}

    def test_thousands_of_the_same_question_take_no_time(self):
        begun = time.perf_counter()
        assert len(near_duplicates(["hi"] * 20_000)) == 19_999
        assert time.perf_counter() - begun < 5

    def test_near_duplicates_are_found_among_texts_of_any_length(self):
        long = " ".join(f"word{i}" for i in range(300))
        texts = ["How do I pay?", "how do i pay", "How do we pay?", long, long.replace("word7 ", "word8 "), "", ""]
        assert near_duplicates(texts) == [(0, 1), (3, 4), (5, 6)]

    def test_a_leak_is_an_error(self):
        held_out = {"gate": [served("g", "What does it cost?")]}
        check_leaks([Lesson("x", "t", "Something else", "y")], held_out, frozenset())
        with pytest.raises(DataError, match="leak: query 'g' is both taught and in the gate part"):
            check_leaks([Lesson("g", "t", "Something else", "y")], held_out, frozenset())
        with pytest.raises(DataError, match="'x', which is taught, is nearly the same as 'g'"):
            check_leaks([Lesson("x", "t", "what does it cost", "y")], held_out, frozenset())

    def test_shares_leave_something_to_certify(self):
        with pytest.raises(DataError, match="leave nothing to certify on"):
            Shares(0.8, 0.2)
        with pytest.raises(DataError, match="teaching must be"):
            Shares(teaching=0)


class TestClusters:
    @pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
    def test_find_what_belongs_together_and_name_it(self, method):
        texts, kinds = topics(240)
        found = FailureClusters.fit(texts, ["t"] * 240, HashedNgrams(), Clustering(method))
        number = found.assign(texts, ["t"] * 240)
        inside = number != ELSEWHERE
        assert inside.mean() > 0.6
        # nearly all of a cluster are of one topic
        purity = [
            np.unique(np.array(kinds)[number == c], return_counts=True)[1].max() / (number == c).sum()
            for c in range(len(found))
            if (number == c).any()
        ]
        assert np.mean(purity) > 0.9
        assert any("password" in label for label in found.labels)
        assert all(exemplar in texts for of in found.exemplars for exemplar in of)

    def test_are_frozen_and_read_back(self, tmp_path):
        texts, _ = topics(100)
        found = FailureClusters.fit(texts, ["t"] * 50 + ["other"] * 50, HashedNgrams())
        again = FailureClusters.load(found.save(tmp_path / "c"), HashedNgrams())
        fresh, _ = topics(60, seed=1)
        tasks = ["t", "other", "unknown"] * 20
        assert (again.assign(fresh, tasks) == found.assign(fresh, tasks)).all()
        assert (again.assign(fresh, ["unknown"] * 60) == ELSEWHERE).all()
        assert (again.labels, again.exemplars, again.tasks) == (found.labels, found.exemplars, found.tasks)
        assert again.map(fresh, "t").shape == (60, 2)
        with pytest.raises(ReleaseError, match="not of 'hashed n-grams 1, 512'"):
            FailureClusters.load(tmp_path / "c", HashedNgrams(512))

    def test_what_is_unlike_all_of_them_is_elsewhere(self):
        texts, _ = topics(240)
        found = FailureClusters.fit(texts, ["t"] * 240, HashedNgrams())
        assert (found.assign(["zebra giraffe xylophone", "0x00ff"], ["t", "t"]) == ELSEWHERE).all()

    @pytest.mark.parametrize("texts", [["same"] * 40, ["one"], ["a", "b"], ["", "  "], ["the of and"] * 30])
    def test_too_little_to_tell_apart_is_one_cluster(self, texts):
        found = FailureClusters.fit(texts, ["t"] * len(texts), HashedNgrams())
        assert len(found) == 1
        assert set(found.assign(texts, ["t"] * len(texts)).tolist()) == {0}

    def test_nothing_cannot_be_clustered(self):
        with pytest.raises(DataError, match="n > 0 texts"):
            FailureClusters.fit([], [], HashedNgrams())
        with pytest.raises(DataError, match="method must be"):
            Clustering("ward")


def candidates(n: int = 200, seed: int = 0, price: float = 0.0) -> Candidates:
    """Two topics that can be learned and one whose answers are idiosyncratic."""
    texts, kinds = topics(n, seed)
    rng = np.random.default_rng(seed)
    answers = [f"only {i}" if kind == "login" else kind for i, kind in enumerate(kinds)]
    escalated = rng.random(n) < 0.7
    right = np.where(escalated, (rng.random(n) < 0.3).astype(float), np.nan)
    return Candidates(
        queries=[Query(text, "t") for text in texts],
        vectors=HashedNgrams()(texts),
        answers=answers,
        right=right,
        confidence=rng.random(n),
        escalated=escalated,
        saving=np.full(n, 0.01),
        price=np.where(escalated, 0.0, price),
        cluster=np.array([sorted(TOPICS).index(kind) for kind in kinds]),
        agreement=lambda task, one, other: same_text(one, other),
    )


class TestSelection:
    @pytest.mark.parametrize("name", sorted(SELECTIONS))
    def test_keeps_to_the_budget_without_repeating(self, name):
        of = candidates(price=0.02)
        chosen = SELECTIONS[name](of, Budget(30, usd=0.1), 0)
        assert len(chosen) == len(set(chosen)) <= 30
        assert of.price[chosen].sum() <= 0.1
        assert SELECTIONS[name](of, Budget(30, usd=0.1), 0) == chosen
        assert len(SELECTIONS[name](of, Budget(1000), 0)) <= len(of)

    def test_coverage_teaches_what_can_be_learned(self):
        of = candidates()
        chosen = coverage(of, Budget(10), 0)
        assert of.escalated[chosen].all()
        assert not any((of.answers[i] or "").startswith("only") for i in chosen)

    def test_coverage_is_the_greedy_maximum(self):
        of = candidates(60)
        chosen = coverage(of, Budget(5), 0)
        weight = of.saving * of.escalated
        value = [float((weight * covered(of, chosen[:k])).sum()) for k in range(6)]
        gains = np.diff(value)
        assert (gains > 0).all() and (np.diff(gains) <= 1e-12).all()
        for k in range(5):
            best = max(float((weight * covered(of, [*chosen[:k], i])).sum()) for i in range(60) if of.escalated[i])
            assert value[k + 1] == pytest.approx(best)

    def test_what_is_known_already_is_not_taught_again(self):
        of = candidates()
        known = of.vectors, [answer or "" for answer in of.answers]
        before = covered(of, [], known)
        assert (before[of.escalated] >= 0.8 - 1e-6).all() and (before[~of.escalated] == 0).all()
        some = [i for i, kind in enumerate(of.answers) if kind == "card"]
        chosen = coverage(of, Budget(6), 0, (of.vectors[some], [of.answers[i] or "" for i in some]))
        assert all(of.answers[i] == "money" for i in chosen)

    def test_within_a_budget_it_is_at_least_as_good_as_either_rule(self):
        for seed in range(5):
            of = candidates(seed=seed, price=1.0)
            # failures that audits found, whose answers are still to be paid, some of them dear
            of.right[~of.escalated] = 0.0
            of.price[:] = np.random.default_rng(seed).choice([0.0, 0.1, 1.0], len(of))
            weight = of.saving * of.escalated

            def worth(chosen: list[int], of=of, weight=weight) -> float:
                return float((weight * covered(of, chosen)).sum())

            chosen = coverage(of, Budget(40, usd=2.0), 0)
            assert of.price[chosen].sum() <= 2.0
            free = [i for i in coverage(of, Budget(40), 0) if of.price[i] == 0]
            assert worth(chosen) >= worth(free) - 1e-12
            (single,) = coverage(of, Budget(1, usd=2.0), 0)
            assert worth(chosen) >= worth([single]) - 1e-12

    def test_nothing_that_saves_nothing_is_taught(self):
        of = candidates(40)
        of.saving[:] = 0.0
        of.saving[np.flatnonzero(of.escalated)[0]] = 1.0
        of.vectors[:] = np.eye(40, of.vectors.shape[1], dtype=np.float32)
        assert coverage(of, Budget(30), 0) == [int(np.flatnonzero(of.escalated)[0])]

    def test_nothing_escalated_teaches_nothing(self):
        of = candidates()
        of.escalated[:] = False
        of.right[:] = 1.0
        assert coverage(of, Budget(10), 0) == [] == SELECTIONS["random failures"](of, Budget(10), 0)

    def test_a_budget_is_a_number(self):
        for bad in (0, -1, 1.5, True):
            with pytest.raises(DataError, match="lessons must be"):
                Budget(bad)
        with pytest.raises(DataError, match="usd must be"):
            Budget(1, usd=-1)


def taught(*pairs: tuple[str, str], **changes: float) -> list[Taught]:
    return [Taught(Query(text, "t", str(i)), Completion(answer, **changes)) for i, (text, answer) in enumerate(pairs)]


class TestDataset:
    def test_empty_answers_and_refusals_are_left_out(self):
        given = taught(
            ("a one", ""),
            ("b two", "  "),
            ("c three", "I'm sorry, but I cannot do that."),
            ("d four", "I can do that."),
            ("e five", "As an AI language model, no."),
            ("f six", "Sorry, no."),
            ("g seven", "Sorry about that: it is open."),
        )
        made = lessons_of(given)
        assert [lesson.text for lesson in made.lessons] == ["d four", "g seven"]
        assert made.dropped == {"empty": 2, "refusal": 3}
        assert len(lessons_of(given, Filters(refusals=False)).lessons) == 5

    def test_validators_confidence_and_audits_decide(self):
        given = taught(("one a", "yes"), ("two b", "maybe"), confidence=0.6)
        made = lessons_of(given, Filters(validators={"words": lambda query, answer: answer in ("yes", "no")}))
        assert [lesson.answer for lesson in made.lessons] == ["yes"] and made.dropped == {"validator words": 1}
        assert lessons_of(given, Filters(confidence=0.7)).dropped == {"teacher unsure": 2}
        assert lessons_of(taught(("one a", "yes"), mean_logprob=-1.0), Filters(confidence=0.5)).dropped == {
            "teacher unsure": 1
        }
        assert lessons_of(taught(("one a", "yes")), Filters(confidence=0.5)).dropped == {}
        doubted = [Taught(Query("one", "t", "0"), Completion("yes"), audit=0.0)]
        assert lessons_of(doubted).dropped == {"audits disagree": 1}

    def test_a_question_is_taught_once_and_not_with_two_answers(self):
        given = taught(
            ("Is it open?", "yes"), ("is it open", "Yes."), ("Why not?", "a"), ("why not", "b"), ("Now when", "c")
        )
        made = lessons_of(given, known=[Lesson("k", "t", "now when?", "c", "given")])
        assert [lesson.answer for lesson in made.lessons] == ["yes"]
        assert made.dropped == {"duplicate": 1, "contradiction": 2, "taught before": 1}
        # another answer corrects what was known
        corrected = lessons_of(given[-1:], known=[Lesson("k", "t", "now when?", "z", "given")])
        assert len(corrected.lessons) == 1

    def test_rehearsal_is_drawn_by_chance(self):
        known = [Lesson(str(i), "t", f"q{i}", "a") for i in range(100)]
        drawn = rehearsal(known, 10, seed=1)
        assert len(drawn) == 10 and set(drawn) <= set(known) and drawn == rehearsal(known, 10, seed=1)
        assert rehearsal(known, 1000, seed=1) == tuple(known)

    def test_filters_take_shares(self):
        with pytest.raises(DataError, match="floor must be in"):
            Filters(floor=2)
