"""The report record: everything that is shown, as plain JSON data. Renderers read this and nothing else.

The record is documented by ``SCHEMA`` below; ``schema_version`` rises when a key changes its meaning.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_doctor.check import Check, registry
from rlhf_doctor.diagnosis import diagnose
from rlhf_doctor.examine import Examination
from rlhf_doctor.finding import MODEL_ROLES, Confidence, Errored, Finding, Found, Passed, Role, Severity, Skipped

__all__ = ["SCHEMA", "SCHEMA_VERSION", "exit_code", "record", "unreadable"]

SCHEMA_VERSION = 1
SCHEMA: Mapping[str, str] = {
    "schema_version": "1",
    "verdict": "status (healthy, findings, unreadable, tool-error), sentence, counts by severity",
    "diagnosis[]": "root causes, most likely first: code, slug, role, severity, confidence, title, message, explains[] "
    "(code, role of what follows from it)",
    "findings[]": "code, slug, family, title, role, severity, confidence, message, evidence[] (quantity, expected, "
    "observed, tolerance, where, reproduce), page (heading -> text), cause (code of the root it is folded under, or null)",
    "skipped[]": "code, slug, title, reason",
    "passed[]": "code, slug, title",
    "errors[]": "role, message: what could not be read or judged",
    "crashed[]": "code, traceback: faults of this tool",
    "setup": "origin, declared, trust_remote_code, roles (role -> card, see CARD)",
    "environment": "versions, platform, command, stage, seed, device, dtype, started, seconds, inputs[] (path, bytes, sha256)",
}
EXPECTED_SHAPE = {
    "policy": "(batch, tokens, vocabulary)",
    "reference": "(batch, tokens, vocabulary)",
    "reward": "(batch,) or (batch, 1)",
    "value": "(batch, tokens) or (batch, tokens, 1)",
}
PURPOSE = {
    "policy": "the language model being aligned",
    "reference": "the frozen policy from before RL, anchor of the KL penalty",
    "reward": "scores a whole response with one number, learnt from preferences",
    "value": "the critic: estimates the return from every state",
}


def record(
    examination: Examination,
    *,
    command: str = "",
    started: str = "",
    inputs: Sequence[Mapping[str, Any]] = (),
    more_errors: Sequence[tuple[Role, str]] = (),
    suspected: bool = False,
) -> dict[str, Any]:
    """The report record of an examination, as plain JSON data.

    Args:
        examination: what was found.
        command: the command line that asked for it.
        started: the time it began, ISO 8601.
        inputs: the files that were read: path, bytes, sha256.
        more_errors: (role, sentence) from outside the examination.
        suspected: keep findings of confidence "suspected", which are hidden otherwise.
    """
    checks = registry()
    found = [(c, f) for c, f in examination.findings if suspected or f.confidence is not Confidence.SUSPECTED]
    severities = [f.severity or checks[c].severity for c, f in found]
    roots = diagnose(found, severities)
    cause = {j: found[d.index][0] for d in roots for j in d.explains}
    findings = [
        _finding(checks[c], f, s, cause.get(i)) for i, ((c, f), s) in enumerate(zip(found, severities, strict=True))
    ]
    errors = [{"role": role, "message": said} for role, said in (*examination.errors, *more_errors)]
    crashed = [
        {"code": o.code, "traceback": o.traceback} for o in examination.outcomes.values() if isinstance(o, Errored)
    ]
    skipped = [o for o in examination.outcomes.values() if isinstance(o, Skipped)]
    passed = [o for o in examination.outcomes.values() if isinstance(o, Passed | Found) and not _grave(o, checks)]
    made: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "rlhf-doctor", "version": _version("rlhf-doctor")},
        "diagnosis": [
            {
                **{k: findings[d.index][k] for k in ("code", "slug", "role", "severity", "confidence", "title", "message")},
                "explains": [{k: findings[j][k] for k in ("code", "role")} for j in d.explains],
            }
            for d in roots
        ],
        "findings": findings,
        "skipped": [_named(checks[o.code]) | {"reason": o.reason} for o in skipped],
        "passed": [_named(checks[o.code]) for o in passed],
        "errors": errors,
        "crashed": crashed,
        "setup": {
            "origin": examination.setup.origin,
            "declared": dict(examination.setup.declared),
            "trust_remote_code": examination.setup.trust_remote_code,
            "roles": {role: card(role, examination) for role in MODEL_ROLES},
        },
        "environment": {
            "versions": {
                name: _version(name) for name in ("rlhf-doctor", "torch", "transformers", "peft", "safetensors")
            }
            | {"python": platform.python_version()},
            "platform": platform.platform(),
            "command": command,
            "stage": str(examination.options.stage),
            "seed": examination.options.seed,
            "device": examination.options.device,
            "dtype": examination.options.dtype,
            "started": started,
            "seconds": round(examination.seconds, 3),
            "inputs": [dict(i) for i in inputs],
        },
    }
    made["verdict"] = _verdict(made)
    plain: dict[str, Any] = _plain(made)
    return plain


def unreadable(role: Role, sentence: str, **environment: Any) -> dict[str, Any]:
    """The record of a target that could not be read at all."""
    from rlhf_doctor.examine import Options
    from rlhf_doctor.setups import RLHFSetup

    empty = Examination(RLHFSetup(origin=environment.pop("origin", "")), Options(), {}, ((role, sentence),), {}, 0.0)
    return record(empty, **environment)


def exit_code(made: Mapping[str, Any], fail_on: Severity = Severity.ERROR, *, strict: bool = False) -> int:
    """0 healthy, 1 findings at or above ``fail_on``, 2 something could not be read or judged, 3 this tool failed.

    ``strict`` counts warnings as errors and a skipped check as a finding.
    """
    if made["crashed"]:
        return 3
    if made["errors"]:
        return 2
    limit = max(fail_on.rank, Severity.WARNING.rank) if strict else fail_on.rank
    grave = any(Severity(f["severity"]).rank <= limit for f in made["findings"])
    return 1 if grave or (strict and made["skipped"]) else 0


def card(role: Role, examination: Examination) -> dict[str, Any]:
    """CARD: what the report shows of one model.

    Keys: role, purpose, present, class_name, model_type, origin, path, kind, why, emits, expected_shape,
    measured_shape, where, dtype, parameters, trainable, state (trained, frozen, partly trained, unknown), head,
    influence (tokens, tokens_of, score, method, sees_future, coverage, reach) or null, census or null.
    """
    shown = examination.shown
    manifest = shown.get(f"{role}_manifest")
    output = shown.get(f"{role}_output")
    parameters = shown.get(f"{role}_parameters")
    census = shown.get(f"{role}_census")
    influence = shown.get(f"{role}_influence")
    architecture = shown.get(f"{role}_architecture")
    head = manifest.heads[0] if manifest and manifest.heads else None
    made: dict[str, Any] = {
        "role": role,
        "purpose": PURPOSE[role],
        "present": examination.setup.model(role) is not None,
        "class_name": manifest.class_name if manifest else None,
        "model_type": manifest.model_type if manifest else None,
        "origin": manifest.origin if manifest else None,
        "path": manifest.path if manifest else None,
        "kind": architecture.kind if architecture else None,
        "why": architecture.sentence if architecture else None,
        "emits": output.kind if output else None,
        "expected_shape": EXPECTED_SHAPE[role],
        "measured_shape": str(output.shape) if output else None,
        "where": output.where if output else None,
        "dtype": output.dtype if output else None,
        "parameters": parameters.total if parameters else None,
        "trainable": parameters.trainable if parameters else None,
        "state": _state(parameters),
        "head": dataclasses.asdict(head) if head else None,
        "influence": None,
        "census": dataclasses.asdict(census) | {"depth_per_token": census.depth_per_token} if census else None,
    }
    if influence:
        made["influence"] = dataclasses.asdict(influence) | {
            "sees_future": influence.sees_future,
            "coverage": influence.coverage,
            "reach": influence.reach,
        }
    return made


def _state(parameters: Any) -> str:
    if parameters is None or parameters.loaded_here:
        return "unknown"
    if parameters.trainable == 0:
        return "frozen"
    return "trained" if parameters.trainable == parameters.total else "partly trained"


def _grave(outcome: Any, checks: Mapping[str, Check]) -> bool:
    return isinstance(outcome, Found) and any(
        (f.severity or checks[outcome.code].severity) is not Severity.INFO for f in outcome.findings
    )


def _named(one: Check) -> dict[str, Any]:
    return {"code": one.code, "slug": one.slug, "title": one.title}


def _finding(one: Check, f: Finding, severity: Severity, cause: str | None) -> dict[str, Any]:
    return _named(one) | {
        "family": one.family,
        "role": f.role,
        "severity": severity,
        "confidence": f.confidence,
        "message": f.message,
        "evidence": [dataclasses.asdict(e) for e in f.evidence],
        "page": dict(one.page),
        "cause": cause,
    }


def _verdict(made: Mapping[str, Any]) -> dict[str, Any]:
    counts = {str(s): sum(f["severity"] == s for f in made["findings"]) for s in Severity}
    ran = len(made["passed"]) + len({f["code"] for f in made["findings"] if f["severity"] != "info"})
    if made["crashed"]:
        status, sentence = "tool-error", f"{len(made['crashed'])} checks of this tool crashed; the verdict is incomplete."
    elif made["diagnosis"]:
        first = made["diagnosis"][0]
        status = "findings"
        advice = "Do not book GPUs for it yet." if counts["error"] else "It would run, at a risk."
        sentence = f"This RLHF setup is not sound. {advice} Most likely cause, in the {first['role']}: {first['message']}"
    elif made["errors"]:
        status, sentence = "unreadable", f"Not everything could be examined: {made['errors'][0]['message']}"
    else:
        status = "healthy"
        sentence = f"No fault was found by {ran} checks; {len(made['skipped'])} could not be decided with what was given."
    return {"status": status, "sentence": sentence, "counts": counts}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """Strict JSON: NaN and infinities become words, paths and enums strings, mappings dicts."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


def read_inputs(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """path, bytes and sha256 of small files; weights are named with their size alone."""
    import hashlib

    rows = []
    for path in paths:
        size = path.stat().st_size
        small = size <= 1 << 24
        rows.append({"path": str(path), "bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if small else None})
    return rows
