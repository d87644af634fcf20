"""DSPy programs and language models, routed over tiers by `routenlp_plugins`."""

from .engine import RouterEngine
from .finetuning import StudentProvider, student_lm
from .module import RouterModule, decision_of
from .optimizer import RouterOptimizer
from .programs import Reading
from .serving import tier_lm
from .signals import SignalCallback, shadow_tiers

__all__ = [
    "Reading",
    "RouterEngine",
    "RouterModule",
    "RouterOptimizer",
    "SignalCallback",
    "StudentProvider",
    "decision_of",
    "shadow_tiers",
    "student_lm",
    "tier_lm",
]
