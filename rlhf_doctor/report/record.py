"""The report record: everything that is shown, as plain JSON data. Renderers read this and nothing else.

``rlhf_doctor.report.schema`` documents every key.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_doctor.check import Check, registry
from rlhf_doctor.diagnosis import diagnose
from rlhf_doctor.examine import Examination
from rlhf_doctor.finding import MODEL_ROLES, Confidence, Errored, Finding, Found, Passed, Role, Severity, Skipped
from rlhf_doctor.report.cards import card
from rlhf_doctor.report.schema import SCHEMA, SCHEMA_VERSION
from rlhf_doctor.report.verdict import verdict

__all__ = ["SCHEMA", "SCHEMA_VERSION", "exit_code", "read_inputs", "record", "unreadable"]

DIAGNOSED = ("id", "code", "slug", "role", "severity", "confidence", "title", "message")


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
    ids = _ids(found)
    cause = {j: d.index for d in roots for j in d.explains}
    findings = [
        _finding(checks[c], f, s)
        | {
            "id": ids[i],
            "cause": found[cause[i]][0] if i in cause else None,
            "cause_id": ids[cause[i]] if i in cause else None,
        }
        for i, ((c, f), s) in enumerate(zip(found, severities, strict=True))
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
                **{k: findings[d.index][k] for k in DIAGNOSED},
                "explains": [{k: findings[j][k] for k in ("id", "code", "role")} for j in d.explains],
            }
            for d in roots
        ],
        "findings": findings,
        "hidden": len(examination.findings) - len(found),
        "skipped": [_named(checks[o.code]) | {"reason": o.reason} for o in skipped],
        "not_run": [_named(c) | {"stage": c.stage} for code, c in checks.items() if code not in examination.outcomes],
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
    made["trace"] = _trace(examination, crashed)
    made["verdict"] = verdict(made)
    plain: dict[str, Any] = _plain(made)
    return plain


def _trace(examination: Examination, crashed: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the traced step was seen to do; a crash here is this tool's own, and said as such."""
    traced = examination.shown.get("traced")
    if traced is None:
        return None
    from rlhf_doctor.report.trace_view import trace  # numpy is imported from here on

    try:
        return trace(examination.setup, traced)
    except Exception:
        crashed.append({"code": "the account of the traced step", "traceback": traceback.format_exc()})
        return None


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


def _grave(outcome: Any, checks: Mapping[str, Check]) -> bool:
    return isinstance(outcome, Found) and any(
        (f.severity or checks[outcome.code].severity) is not Severity.INFO for f in outcome.findings
    )


def _named(one: Check) -> dict[str, Any]:
    return {"code": one.code, "slug": one.slug, "title": one.title}


def _ids(found: Sequence[tuple[str, Finding]]) -> list[str]:
    """Code and role, and from the second of a kind on its number: stable names for links."""
    seen: dict[str, int] = {}
    ids = []
    for code, f in found:
        name = f"{code}-{f.role}"
        seen[name] = seen.get(name, 0) + 1
        ids.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return ids


def _finding(one: Check, f: Finding, severity: Severity) -> dict[str, Any]:
    return _named(one) | {
        "family": one.family,
        "role": f.role,
        "severity": severity,
        "confidence": f.confidence,
        "message": f.message,
        "evidence": [dataclasses.asdict(e) for e in f.evidence],
        "page": dict(one.page),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """Strict JSON: NaN and infinities become words, paths and enums strings, mappings dicts."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(v) for v in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() < 1024 else hex(value)  # Python refuses to write longer ones out
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
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if small else None
        rows.append({"path": str(path), "bytes": size, "sha256": digest})
    return rows
