"""rlhf-doctor: diagnosis and validation of RLHF setups."""

from rlhf_doctor.examine import Examination, Options, examine
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.sources import UnreadableTarget, load_setup

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
]
