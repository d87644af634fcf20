"""The demo end to end, with real local models, on a few queries."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

from routenlp_plugins import Release
from routenlp_plugins.demo import DemoOptions, run_demo, workload
from routenlp_plugins.evaluate.outcomes import read_outcomes
from routenlp_plugins.testing import ScriptedServer

DAYS = {
    "cs_intent": (200, 40),
    "cs_response": (4, 2),
    "legal_clause": (8, 4),
    "legal_risk": (8, 4),
    "finance_ner": (3, 2),
    "finance_summary": (3, 2),
}


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.delenv("ROUTENLP_DATA", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(workload, "SYNTHETIC_DAYS", DAYS)
    return DemoOptions(tmp_path / "out", tmp_path / "report.html")


def run(options: DemoOptions, capsys: pytest.CaptureFixture[str]) -> str:
    facts = run_demo(options, Console())
    assert json.loads(json.dumps(facts))["certificate"]["level"] == 0.05
    return " ".join(capsys.readouterr().out.split())


def test_two_days_of_synthetic_queries(options, capsys):
    said = run(options, capsys)
    page = options.report.read_text(encoding="utf-8")
    release = Release.load(options.out / "release")
    rows = read_outcomes(options.out / "outcomes.jsonl")
    assert release.certificate.certified == ("cs_intent",)
    assert {tier for row in rows for tier in row.outcomes} == set(release.portfolio.names)
    cost = float(re.search(r"([\d.]+)% of the cost and [\d.]+% of the quality of the reference frontier", said)[1])
    assert 0 < cost < 100
    assert "(synthetic queries)" in said
    assert "RouterRunnable.from_chain(chain" in said
    assert "Synthetic queries." in page
    assert "reference frontier" in page
    assert page.count("<svg") == 1
    assert f"{cost:.1f}%" in page
    assert all(tier in page for tier in release.portfolio.names)
    assert release.certificate.claim.replace("<", "&lt;") in page


def test_real_queries_are_used_where_there_are_some(options, capsys, data_folder, monkeypatch):
    monkeypatch.setenv("ROUTENLP_DATA", str(data_folder))
    days = {"cs_intent": (5, 2), "cs_response": (1, 1), "legal_clause": (150, 20), "legal_risk": (5, 2)}
    monkeypatch.setattr(workload, "REAL_DAYS", days | {"finance_ner": (2, 1), "finance_summary": (2, 1)})
    said = run(options, capsys)
    assert "real, from ROUTENLP_DATA" in said
    assert "(synthetic queries)" not in said
    assert "Synthetic queries." not in options.report.read_text(encoding="utf-8")
    assert len(read_outcomes(options.out / "outcomes.jsonl")) == 165


def test_the_frontier_is_the_endpoint_of_the_user_where_one_is_set(options, capsys, monkeypatch):
    with ScriptedServer(lambda request: "card_arrival") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "key")
        said = run(options, capsys)
        assert {request["model"] for request in server.requests} == {"gpt-4o"}
    assert "gpt-4o at OPENAI_BASE_URL" in said
    assert "reference frontier alone" not in said
    assert "reference frontier</strong>" not in options.report.read_text(encoding="utf-8")
