from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import portfolio

from routenlp_plugins import Portfolio, PortfolioError, Task, Tier

VALID = """
frontier: big
tiers:
  - {name: local, usd_per_hour: 0.36}
  - {name: big, input_usd_per_mtok: 2.5, output_usd_per_mtok: 10, context_tokens: 128000, supports: [tools],
     profile: {reasoning: 71.5}}
tasks:
  - {name: intent, metric: accuracy, tiers: [local]}
  - {name: reply, metric: rouge_l, tau: 0.5}
"""


def test_a_portfolio_is_read_from_yaml_and_survives_a_round_trip(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(VALID)
    read = Portfolio.from_yaml(path)
    assert read.names == ("local", "big")
    assert read.task("reply").tau == 0.5
    assert read.below_frontier("intent") == ("local",)
    assert (read.tier("big").context_tokens, read.tier("big").supports) == (128000, ("tools",))
    assert read.tier("big").profile == {"reasoning": 71.5}
    assert Portfolio.from_dict(read.as_dict()) == read


def test_capabilities_are_configuration_and_profiles_void_no_certificate():
    local, big = Tier("local", 1, 1, profile={"humour": 2}), Tier("big", 2, 2, profile={"humour": 3})
    other = Portfolio((local, big), capabilities=("humour",))
    assert Portfolio.from_dict(other.as_dict()) == other
    assert other.fingerprint == Portfolio((Tier("local", 1, 1), Tier("big", 2, 2))).fingerprint
    with pytest.raises(PortfolioError, match="tier 'local': profile names humour, which is no capability"):
        Portfolio((local, big))


def test_what_a_task_requires_only_tiers_that_support_it_serve():
    tiers = (Tier("a", 1, 1, supports=("tools",)), Tier("b", 2, 2), Tier("c", 3, 3))
    used = Portfolio(tiers, "c", (Task("agent", requires=("tools",)), Task("chat")))
    assert (used.below_frontier("agent"), used.below_frontier("chat")) == (("a",), ("a", "b"))
    assert used.requires == {"agent": ("tools",)} and Portfolio.from_dict(used.as_dict()) == used
    plain = replace(used, tasks=(Task("agent"), Task("chat")))
    assert plain.identity != used.identity and "requires" not in str(plain.identity)
    with pytest.raises(PortfolioError, match="task 'agent': requires must be a list of names, got 'tools'"):
        Task("agent", requires="tools")
    with pytest.raises(PortfolioError, match="requires: 'structured_output' is unknown; 'structured output' is meant"):
        Task("agent", requires=("structured_output",))
    with pytest.raises(PortfolioError, match="tier 'a': supports: 'tool' is unknown"):
        Tier("a", supports=("tool",))


def test_costs_are_per_token_or_per_machine_hour():
    assert Tier("a", 2.0, 4.0).cost(1_000_000, 500_000, None) == pytest.approx(4.0)
    assert Tier("b", usd_per_hour=3.6).cost(None, None, 1000) == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("tier", "amounts"),
    [(Tier("a"), (1, 1, 1.0)), (Tier("b", 1, 1), (1, None, 1.0)), (Tier("c", usd_per_hour=1), (1, 1, None))],
)
def test_a_cost_that_cannot_be_known_is_none_and_never_zero(tier, amounts):
    assert tier.cost(*amounts) is None


def test_the_frontier_may_be_left_out_if_one_tier_is_dearest():
    assert Portfolio((Tier("a", 1, 1), Tier("b", 2, 2))).frontier == "b"
    with pytest.raises(PortfolioError, match="frontier: name it"):
        Portfolio((Tier("a", 2, 2), Tier("b", 2, 2)))
    with pytest.raises(PortfolioError, match="frontier: name it"):
        Portfolio((Tier("a", usd_per_hour=2), Tier("b", 2, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("usd_per_hour: 0.36", "usd_per_hours: 0.36"), r"tiers\[0\]: unknown field usd_per_hours; known: name"),
        (("name: local", "nom: local"), r"tiers\[0\]: unknown field nom"),
        (("usd_per_hour: 0.36", "usd_per_hour: -1"), "tier 'local': usd_per_hour must be a number >= 0, got -1"),
        (("usd_per_hour: 0.36", "usd_per_hour: .nan"), "tier 'local': usd_per_hour must be a number >= 0, got nan"),
        (("input_usd_per_mtok: 2.5, ", ""), "tier 'big': give input_usd_per_mtok and output_usd_per_mtok together"),
        (("frontier: big", "frontier: huge"), "frontier: 'huge' is not a tier; tiers: local, big"),
        (("tiers: [local]", "tiers: [lokal]"), "task 'intent': lokal is not a tier"),
        (("tau: 0.5", "tau: 1.5"), r"task 'reply': tau must be in \(0, 1\], got 1.5"),
        (("name: reply", "name: intent"), "task intent: defined more than once"),
        (("frontier: big\n", "frontier: [\n"), "not valid YAML"),
        (("frontier: big", "frontier: 2024-13-45"), "not valid YAML"),
        (("frontier: big", "frontier: 0"), "frontier: expected the name of a tier, got 0"),
        (("usd_per_hour: 0.36", "usd_per_hour: .inf"), "usd_per_hour must be a number >= 0, got inf"),
        (("usd_per_hour: 0.36", "usd_per_hour: true"), "usd_per_hour must be a number >= 0, got True"),
        (("tau: 0.5", "tau: true"), r"task 'reply': tau must be in \(0, 1\], got True"),
        (("context_tokens: 128000", "context_tokens: 0"), "tier 'big': context_tokens must be a whole number >= 1"),
        (("supports: [tools]", "supports: tools"), r"tiers\[1\]: supports must be a list of names, got 'tools'"),
        (
            ("reasoning: 71.5", "cooking: 71.5"),
            "profile names cooking, which is no capability",
        ),
        (("reasoning: 71.5", "reasoning: .nan"), "tier 'big': profile: reasoning must be a number, got nan"),
        (("{reasoning: 71.5}", "71.5"), "tier 'big': profile must be capability: score, got 71.5"),
        ((VALID, "- 1"), "top level: expected a mapping, got list"),
        (("tiers: [local]", "tiers: local"), r"tasks\[0\]: tiers must be a list of names, got 'local'"),
    ],
)
def test_a_malformed_portfolio_names_file_and_field(tmp_path, change, message):
    path = tmp_path / "p.yaml"
    path.write_text(VALID.replace(*change))
    with pytest.raises(PortfolioError, match=message) as caught:
        Portfolio.from_yaml(path)
    assert str(path) in str(caught.value)


def test_a_missing_portfolio_file_is_named(tmp_path):
    with pytest.raises(PortfolioError, match=r"nowhere\.yaml: cannot be read"):
        Portfolio.from_yaml(tmp_path / "nowhere.yaml")


def test_an_unknown_tier_is_listed_with_the_known_ones():
    with pytest.raises(PortfolioError, match="unknown tier 'x'; tiers of the portfolio: small, middle, frontier"):
        portfolio().tier("x")


def test_an_undeclared_task_may_use_every_tier():
    assert portfolio(Task("t")).below_frontier("other") == ("small", "middle")


def test_tokens_from_a_prompt_cache_cost_what_the_tier_takes_for_them():
    cached = Tier("a", 2.0, 10.0, cached_input_usd_per_mtok=0.5)
    assert cached.cost(1000, 100, None, 800) == pytest.approx((200 * 2.0 + 800 * 0.5 + 100 * 10) / 1e6)
    assert cached.cost(1000, 100, None, 5000) == pytest.approx((1000 * 0.5 + 100 * 10) / 1e6)
    assert Tier("a", 2.0, 10.0).cost(1000, 100, None, 800) == pytest.approx((1000 * 2.0 + 100 * 10) / 1e6)
