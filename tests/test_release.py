from __future__ import annotations

import json
from hashlib import sha256

import pytest
from helpers import FRONTIER, ROOT, SMALL, portfolio, rows

from routenlp_plugins import (
    Dispatcher,
    Policy,
    Portfolio,
    PortfolioError,
    Query,
    Release,
    ReleaseError,
    Task,
    Tier,
    fit,
)
from routenlp_plugins.policy import Rung
from routenlp_plugins.testing import ScriptedTier


@pytest.fixture(scope="module")
def fitted() -> Release:
    return fit(rows(800), portfolio(), alpha=0.1)


@pytest.fixture
def folder(fitted, tmp_path):
    return fitted.save(tmp_path / "release")


def test_a_release_survives_saving_and_loading(fitted, folder):
    loaded = Release.load(folder)
    assert loaded == fitted
    assert loaded.evidence["t"].keys() == {"excess", "second_moment", "cost_usd"}
    assert (loaded.evidence["t"]["excess"] == fitted.evidence["t"]["excess"]).all()
    assert len(loaded.evidence["t"]["excess"]) == fitted.certificate.proofs[0].candidates


def test_the_folder_holds_json_and_safetensors_only(folder):
    assert {f.name for f in folder.iterdir()} == {"release.json", "arrays.safetensors", "manifest.json"}
    assert not [f for f in folder.parent.iterdir() if f != folder]


def test_an_existing_folder_is_never_overwritten(fitted, folder):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(ReleaseError, match="release: exists already and is not overwritten"):
        Release.frontier_only(portfolio()).save(folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["release.json", "arrays.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "edited", "missing", "empty"])
def test_a_damaged_file_is_named(folder, name, damage):
    file = folder / name
    content = file.read_bytes()
    match damage:
        case "truncated":
            file.write_bytes(content[: len(content) // 2])
        case "edited":
            file.write_bytes(content.replace(b"0", b"1"))
        case "empty":
            file.write_bytes(b"")
        case "missing":
            file.unlink()
    with pytest.raises(ReleaseError, match=r"release\.json|arrays\.safetensors|manifest\.json"):
        Release.load(folder)


def test_every_edited_byte_of_the_content_is_noticed(folder):
    for name in ("release.json", "arrays.safetensors"):
        file = folder / name
        content = file.read_bytes()
        for position in range(0, len(content), 97):
            file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            with pytest.raises(ReleaseError, match=f"{name}: truncated or edited"):
                Release.load(folder)
        file.write_bytes(content)
    assert Release.load(folder)


CONFIDENCES = [{"tier": "small", "terms": [{"weight": 1.0, "tier": "small", "kind": "confidence"}]}]


def rung(**facts):
    return {"policy": {"frontier": "frontier", "ladders": {"t": [{"tier": "small", **facts}]}}}


def rewrite(folder, **changes):
    facts = json.loads((folder / "release.json").read_text()) | changes
    (folder / "release.json").write_text(json.dumps(facts))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["release.json"] = sha256((folder / "release.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 4}, "release.json: format 4 is newer than 3"),
        ({"format_version": "x"}, "release.json: format_version: expected 3, got 'x'"),
        ({"policy": {}}, "release.json: policy: frontier: Field required"),
        ({"policy": {"frontier": "small", "ladders": {}}}, "the policy names 'small', the portfolio 'frontier'"),
        ({"policy": {"frontier": "frontier", "ladders": {"t": [{"tier": "tiny"}]}}}, "tiny is not a tier"),
        ({"certificate": {"alpha": 0.1}}, "release.json: not a release of format 3"),
        (rung(threshold="0.5"), r"policy: ladders.t.0.threshold: Input should be a valid number"),
        (rung(threshold=-1, confidences=CONFIDENCES), "threshold must be a number in"),
        (rung(threshold=0.5), "a threshold needs a confidence"),
        (rung(threshold=0.5, confidences=[{"tier": "small"}]), r"confidences.0.terms: Field required"),
    ],
)
def test_a_release_of_another_format_is_refused(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(ReleaseError, match=message):
        Release.load(folder)


def test_a_newer_manifest_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format_version": 7}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ReleaseError, match=r"manifest\.json: format 7 is newer than 3"):
        Release.load(folder)


def test_a_folder_that_is_no_release_is_named(tmp_path):
    with pytest.raises(ReleaseError, match="a release is a folder written by fit"):
        Release.load(tmp_path)


def test_a_release_of_another_portfolio_answers_from_the_frontier_and_says_why(folder):
    newer = Portfolio((*portfolio().tiers, Tier("new", 1, 1)), FRONTIER, (Task("t"),))
    versioned = Portfolio((Tier(SMALL, 1, 1, version="2"), *portfolio().tiers[1:]), FRONTIER, (Task("t"),))
    moved = Portfolio((*portfolio().tiers, Tier("new", 1, 1)), "new", (Task("t"),))
    for other, reason in (
        (newer, r"it speaks of another portfolio (tiers: ['frontier', 'middle', 'small'] in the release, "),
        (versioned, "'small 2'"),
        (portfolio(Task("t", tau=0.5)), "it speaks of another portfolio (tasks: "),
        (moved, "it speaks of another portfolio (frontier: frontier in the release, new in yours)"),
    ):
        loaded = Release.load(folder, other)
        tiers = {name: ScriptedTier(default="x") for name in other.names}
        answer = Dispatcher(loaded, tiers).run(Query("x", "t"))
        assert answer.tier == other.frontier
        assert answer.trace.reason.startswith("frontier: the certificate is void: it speaks of another portfolio")
        assert reason in answer.trace.reason


def test_a_certificate_of_another_policy_is_void(folder):
    policy = json.loads((folder / "release.json").read_text())["policy"]
    policy["ladders"]["t"][0]["threshold"] = 0.0
    rewrite(folder, policy=policy)
    loaded = Release.load(folder)
    assert loaded.policy.ladders == {"t": ()}
    assert loaded.policy.void == "it speaks of another policy than the one in the release"


def test_a_release_of_format_1_answers_from_the_frontier_and_says_why():
    loaded = Release.load(ROOT / "tests" / "releases" / "format_1")
    answer = Dispatcher(loaded, {FRONTIER: ScriptedTier(default="x")}).run(Query("x", "t"))
    assert answer.tier == FRONTIER
    assert "the release has format 1, whose certificates cannot be checked" in answer.trace.reason


def test_a_void_release_stays_void(fitted, tmp_path):
    loaded = Release.load(fitted.voided("moved").save(tmp_path / "r"))
    assert (loaded.policy.void, loaded.policy.ladders) == ("moved", {"t": ()})


def test_the_order_of_tasks_does_not_matter(tmp_path):
    one, other = portfolio(Task("a"), Task("b")), portfolio(Task("b"), Task("a"))
    assert Release.load(Release.frontier_only(one).save(tmp_path / "r"), other).portfolio == other


def test_a_certificate_with_odd_numbers_is_refused(folder):
    facts = json.loads((folder / "release.json").read_text())["certificate"]
    (proof,) = facts["proofs"]
    for changes, message in (
        ({"level": "0.1"}, "certificate: level: Input should be a valid number"),
        ({"level": 1.5}, "alpha must be strictly between 0 and 1, got 1.5"),
        ({"risk": "luck"}, "risk 'luck' is unknown; known: violation, selective violation, retention"),
        ({"ordering": None}, "certificate: ordering: Input should be a valid number"),
        ({"proofs": [proof | {"status": []}]}, "certificate: proofs.0.status: "),
        ({"proofs": [proof | {"bound": "x"}]}, "certificate: proofs.0.bound: "),
        ({"more": 1}, "certificate: unknown field more"),
    ):
        rewrite(folder, certificate=facts | changes)
        with pytest.raises(ReleaseError, match=message):
            Release.load(folder)


def test_a_policy_that_its_certificate_does_not_speak_of_is_refused(folder):
    policy = json.loads((folder / "release.json").read_text())["policy"]
    ladders = policy["ladders"]
    for changed, message in (
        ({**ladders, "u": ladders["t"]}, "leaves the frontier for t, u, the certificate speaks of t"),
        ({}, "leaves the frontier for no task, the certificate speaks of t"),
    ):
        rewrite(folder, policy=policy | {"ladders": changed})
        with pytest.raises(ReleaseError, match=message):
            Release.load(folder)


def test_repriced_tiers_are_the_same_portfolio(folder):
    repriced = Portfolio((Tier(SMALL, 0.2, 0.2), *portfolio().tiers[1:]), FRONTIER, (Task("t"),))
    assert Release.load(folder, repriced).portfolio.tier(SMALL).input_usd_per_mtok == 0.2


def test_a_policy_of_other_tiers_cannot_be_released():
    with pytest.raises(PortfolioError, match="policy: tiny is not a tier of the portfolio"):
        Release(portfolio(), Policy(FRONTIER, {"t": (Rung("tiny"),)}))
