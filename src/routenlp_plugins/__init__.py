"""Route every query to the cheapest tier that is good enough, with a statistical certificate.

The names below are the public interface; each is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .asked import beyond_text as beyond_text
    from .asked import call_settings as call_settings
    from .auditable import Auditable as Auditable
    from .auditing import AuditOptions as AuditOptions
    from .auditing import Auditor as Auditor
    from .cascade.certificate import Certificate as Certificate
    from .cascade.families import Space as Space
    from .cascade.noise import Noise as Noise
    from .collecting import collect as collect
    from .conversation import chat_query as chat_query
    from .conversation import turn_key as turn_key
    from .conversation import user_words as user_words
    from .conversation import with_calls as with_calls
    from .deciding import ConformalCascade as ConformalCascade
    from .dispatch import Dispatcher as Dispatcher
    from .distill.causal import base_from_gguf as base_from_gguf
    from .distill.classifier import ClassifierStudent as ClassifierStudent
    from .distill.clusters import Clustering as Clustering
    from .distill.clusters import FailureClusters as FailureClusters
    from .distill.dataset import Filters as Filters
    from .distill.gate import GateOptions as GateOptions
    from .distill.hosted import Endpoint as Endpoint
    from .distill.hosted import HostedStudent as HostedStudent
    from .distill.lessons import Lesson as Lesson
    from .distill.loop import DistillationLoop as DistillationLoop
    from .distill.lora import LoRAStudent as LoRAStudent
    from .distill.options import LoopOptions as LoopOptions
    from .distill.options import Promise as Promise
    from .distill.parts import Shares as Shares
    from .distill.registry import ReleaseRegistry as ReleaseRegistry
    from .distill.results import Round as Round
    from .distill.selection import Budget as Budget
    from .distill.student import Course as Course
    from .distill.student import Student as Student
    from .distill.student import load_student as load_student
    from .distill.student import student_kind as student_kind
    from .distill.training import LoRATraining as LoRATraining
    from .errors import BudgetExceededError as BudgetExceededError
    from .errors import DataError as DataError
    from .errors import DeadlineExceededError as DeadlineExceededError
    from .errors import MissingExtraError as MissingExtraError
    from .errors import NotFittedError as NotFittedError
    from .errors import PortfolioError as PortfolioError
    from .errors import ReleaseError as ReleaseError
    from .errors import RiskNotControlledError as RiskNotControlledError
    from .errors import RouteNLPError as RouteNLPError
    from .errors import TierError as TierError
    from .evaluate.references import Reference as Reference
    from .evaluate.units import Split as Split
    from .fitting import FitOptions as FitOptions
    from .fitting import fit as fit
    from .policy import Policy as Policy
    from .portfolio import Portfolio as Portfolio
    from .portfolio import Task as Task
    from .portfolio import Tier as Tier
    from .release import Release as Release
    from .renewing import audits_after_alarm as audits_after_alarm
    from .renewing import renew as renew
    from .replaying import Replay as Replay
    from .replaying import replay as replay
    from .routing.capability import CapabilityRouter as CapabilityRouter
    from .routing.capability import Matching as Matching
    from .routing.difficulty import DifficultyRouter as DifficultyRouter
    from .routing.difficulty import TrainingOptions as TrainingOptions
    from .routing.encoders import CachedEncoder as CachedEncoder
    from .routing.encoders import HashedNgrams as HashedNgrams
    from .routing.encoders import StaticEmbeddings as StaticEmbeddings
    from .routing.encoders import TransformerEncoder as TransformerEncoder
    from .routing.finetuning import FineTuning as FineTuning
    from .routing.finetuning import fine_tuned as fine_tuned
    from .routing.observations import Observations as Observations
    from .routing.requirements import CapabilityHeads as CapabilityHeads
    from .sessions import session_after as session_after
    from .signals.importing import import_traces as import_traces
    from .signals.labels import LabelModel as LabelModel
    from .signals.ledger import Ledger as Ledger
    from .signals.ledger import ledger as ledger
    from .signals.opinions import Opinion as Opinion
    from .signals.recorder import Recorder as Recorder
    from .signals.records import ImportOptions as ImportOptions
    from .signals.shadow import Shadow as Shadow
    from .signals.shadow import ShadowOptions as ShadowOptions
    from .signals.signal import Signal as Signal
    from .signals.signal import edit_similarity as edit_similarity
    from .signals.store import StoreOptions as StoreOptions
    from .signals.store import TraceStore as TraceStore
    from .signals.telemetry import Telemetry as Telemetry
    from .tiers.boundary import own_errors as own_errors
    from .tiers.boundary import received as received
    from .tiers.llama_cpp import LlamaCppTier as LlamaCppTier
    from .tiers.openai_compatible import OpenAICompatibleTier as OpenAICompatibleTier
    from .tiers.openai_format import alternative_scores as alternative_scores
    from .tiers.plain import HeldBack as HeldBack
    from .tiers.plain import text_only as text_only
    from .tiers.plain import valid_if_said as valid_if_said
    from .tiers.scored import Judgement as Judgement
    from .tiers.scored import PTrueTier as PTrueTier
    from .tiers.scored import ScoredTier as ScoredTier
    from .tiers.scored import SelfConsistentTier as SelfConsistentTier
    from .tiers.scored import WrappingTier as WrappingTier
    from .tiers.scored import parses as parses
    from .tiers.text_classifier import TextClassifierTier as TextClassifierTier
    from .types import Answer as Answer
    from .types import Attempt as Attempt
    from .types import Call as Call
    from .types import Completion as Completion
    from .types import Delta as Delta
    from .types import Query as Query
    from .types import Session as Session
    from .types import Trace as Trace
    from .watching import Watch as Watch

_MODULES = {
    "asked": ("beyond_text", "call_settings"),
    "auditable": ("Auditable",),
    "auditing": ("AuditOptions", "Auditor"),
    "cascade.certificate": ("Certificate",),
    "cascade.families": ("Space",),
    "cascade.noise": ("Noise",),
    "collecting": ("collect",),
    "conversation": ("chat_query", "turn_key", "user_words", "with_calls"),
    "evaluate.references": ("Reference",),
    "deciding": ("ConformalCascade",),
    "dispatch": ("Dispatcher",),
    "distill.classifier": ("ClassifierStudent",),
    "distill.clusters": ("Clustering", "FailureClusters"),
    "distill.dataset": ("Filters",),
    "distill.gate": ("GateOptions",),
    "distill.causal": ("base_from_gguf",),
    "distill.hosted": ("Endpoint", "HostedStudent"),
    "distill.lessons": ("Lesson",),
    "distill.lora": ("LoRAStudent",),
    "distill.training": ("LoRATraining",),
    "distill.loop": ("DistillationLoop",),
    "distill.options": ("LoopOptions", "Promise"),
    "distill.parts": ("Shares",),
    "distill.registry": ("ReleaseRegistry",),
    "distill.results": ("Round",),
    "distill.selection": ("Budget",),
    "distill.student": ("Course", "Student", "load_student", "student_kind"),
    "errors": (
        "BudgetExceededError",
        "DataError",
        "DeadlineExceededError",
        "MissingExtraError",
        "NotFittedError",
        "PortfolioError",
        "ReleaseError",
        "RiskNotControlledError",
        "RouteNLPError",
        "TierError",
    ),
    "evaluate.units": ("Split",),
    "fitting": ("FitOptions", "fit"),
    "portfolio": ("Portfolio", "Task", "Tier"),
    "release": ("Release",),
    "renewing": ("audits_after_alarm", "renew"),
    "replaying": ("Replay", "replay"),
    "routing.capability": ("CapabilityRouter", "Matching"),
    "routing.difficulty": ("DifficultyRouter", "TrainingOptions"),
    "routing.encoders": ("CachedEncoder", "HashedNgrams", "StaticEmbeddings", "TransformerEncoder"),
    "routing.finetuning": ("FineTuning", "fine_tuned"),
    "routing.observations": ("Observations",),
    "routing.requirements": ("CapabilityHeads",),
    "sessions": ("session_after",),
    "signals.importing": ("import_traces",),
    "signals.recorder": ("Recorder",),
    "signals.records": ("ImportOptions",),
    "signals.labels": ("LabelModel",),
    "signals.opinions": ("Opinion",),
    "signals.ledger": ("Ledger", "ledger"),
    "signals.shadow": ("Shadow", "ShadowOptions"),
    "signals.signal": ("Signal", "edit_similarity"),
    "signals.store": ("StoreOptions", "TraceStore"),
    "signals.telemetry": ("Telemetry",),
    "tiers.boundary": ("own_errors", "received"),
    "tiers.llama_cpp": ("LlamaCppTier",),
    "tiers.openai_compatible": ("OpenAICompatibleTier",),
    "tiers.openai_format": ("alternative_scores",),
    "tiers.plain": ("HeldBack", "text_only", "valid_if_said"),
    "tiers.scored": ("Judgement", "PTrueTier", "ScoredTier", "SelfConsistentTier", "WrappingTier", "parses"),
    "tiers.text_classifier": ("TextClassifierTier",),
    "policy": ("Policy",),
    "types": ("Answer", "Attempt", "Call", "Completion", "Delta", "Query", "Session", "Trace"),
    "watching": ("Watch",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
