"""rlhf-doctor: diagnosis and validation of RLHF setups."""

from typing import TYPE_CHECKING, Any

from rlhf_doctor.examine import Examination, Options, examine
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.sources import UnreadableTarget, load_setup

if TYPE_CHECKING:
    from rlhf_doctor.watching import watch

__all__ = [
    "Confidence",
    "Evidence",
    "Examination",
    "Finding",
    "Options",
    "RLHFSetup",
    "Severity",
    "Stage",
    "UnreadableTarget",
    "examine",
    "load_setup",
    "watch",
]


def __getattr__(name: str) -> Any:
    """``watch`` needs torch, which is imported when it is asked for."""
    if name == "watch":
        from rlhf_doctor.watching import watch

        return watch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
