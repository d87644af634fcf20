"""Whether a conversation stays on the frontier: a prompt cache that is lost costs more than some switches save.

Only the frontier is stayed on, and only under a promise about violations: an answer of the frontier breaks none,
whoever chose it. A cheaper tier is never kept without a look at its answer, and what retention or a selective risk say
of all queries they do not say of those that are left when some conversations stay.
"""

from __future__ import annotations

from .conversation import turn_key, user_words
from .flow import task_of
from .release import Release
from .types import Answer, Query, Session

__all__ = ["reason_to_stay", "session_after"]


def reason_to_stay(release: Release, query: Query) -> str | None:
    """Why the frontier answers a query without a climb; None if the policy decides.

    The frontier goes on within a turn that it answered in. In the next turn it does if the saving that the certificate
    reports for the task, of what the last call would cost again, is not above the discount of the cache.
    """
    session, certificate = query.session, release.certificate
    frontier = release.portfolio.tier(release.portfolio.frontier)
    if session is None or session.tier != frontier.name or certificate is None or certificate.risk != "violation":
        return None
    if session.turn == turn_key(query.chat) and user_words(query.chat).strip():
        return "it answered in this turn already"
    task = task_of(release.policy, query)
    share = next((proof.cost_ratio for proof in certificate.proofs if task in proof.tasks), None)
    whole = frontier.cost(session.input_tokens, session.output_tokens, None)
    if share is None or whole is None or frontier.cached_input_usd_per_mtok is None:
        return None
    price = frontier.input_usd_per_mtok or 0.0
    discount = session.input_tokens * (price - frontier.cached_input_usd_per_mtok) / 1e6
    saving = (1 - share) * whole
    if not discount > 0 or saving > discount:
        return None
    return f"the conversation stays: a saving of {saving:.3g} USD is expected, its prompt cache saves {discount:.3g}"


def session_after(answer: Answer) -> Session:
    """What an answer leaves behind for the next query of its conversation; tokens nobody counted are taken as none."""
    done = answer.trace.accepted.completion
    tokens = (0, 0) if done is None else (done.input_tokens or 0, done.output_tokens or 0)
    return Session(answer.tier, turn_key(answer.trace.query.chat), *tokens)
