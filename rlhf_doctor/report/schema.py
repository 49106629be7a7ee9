"""What every key of the report record means: the documentation of the JSON report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["SCHEMA", "SCHEMA_VERSION", "paths"]

# Rises when a key changes its meaning or goes; a new key alone does not raise it.
SCHEMA_VERSION = 1

# Path -> meaning. "[]" stands for every item of a list, "*" for every key of a mapping whose keys are data. What lies
# below a path that ends in "**" is data of the named kind, not documented key by key.
SCHEMA: Mapping[str, str] = MappingProxyType(
    {
        "schema_version": "the version of this record's shape",
        "tool.name": "the tool that wrote the record",
        "tool.version": "its version, null when run from a source tree that is not installed",
        "verdict.status": "healthy, findings, unreadable (a role or file could not be judged) or tool-error",
        "verdict.sentence": "the verdict in one sentence",
        "verdict.cost": "what it costs to start the run as it is; empty where nothing was found",
        "verdict.cost_basis": "the assumptions behind a number in the cost; empty where there is none",
        "verdict.incomplete": "why the verdict is incomplete, empty where it is not",
        "verdict.counts.*": "findings by severity: error, warning, info",
        "verdict.ran": "how many checks reached a result",
        "diagnosis[].id": "the id of the finding that is the root cause; the list is ordered, most likely cause first",
        "diagnosis[].code": "its check's code",
        "diagnosis[].slug": "its check's name",
        "diagnosis[].role": "the role it is in",
        "diagnosis[].severity": "error or warning",
        "diagnosis[].confidence": "proven, measured or suspected",
        "diagnosis[].title": "what holds when all is well",
        "diagnosis[].message": "what is, what should be, what to do",
        "diagnosis[].explains[].id": "the id of a finding that follows from it",
        "diagnosis[].explains[].code": "that finding's code",
        "diagnosis[].explains[].role": "that finding's role",
        "findings[].id": "unique in the record: the code, the role and, from the second on, a number",
        "findings[].code": "the check's permanent code, such as VAL002",
        "findings[].slug": "the check's name, such as value-not-scalar-per-state",
        "findings[].family": "the check's family, such as value",
        "findings[].title": "what holds when all is well",
        "findings[].role": "policy, reference, reward, value, tokenizer, loop or setup",
        "findings[].severity": "error (the run is wrong), warning (likely harmed) or info (worth knowing, or normal)",
        "findings[].confidence": "proven (a counter-example is shown), measured (with numbers) or suspected",
        "findings[].message": "what is, what should be, what to do",
        "findings[].evidence[].quantity": "what was measured or read",
        "findings[].evidence[].expected": "what it should have been",
        "findings[].evidence[].observed": "what it was",
        "findings[].evidence[].tolerance": "how far observed may be from expected",
        "findings[].evidence[].where": "the file, tensor, module or position",
        "findings[].evidence[].reproduce": "a line that shows the same number again",
        "findings[].page.*": "the check's page: heading -> text",
        "findings[].cause": "the code of the root cause that it is folded under, or null",
        "findings[].cause_id": "the id of that root cause, or null",
        "hidden": "number of findings of confidence suspected that are left out",
        "skipped[].code": "a check that could not be decided",
        "skipped[].slug": "its name",
        "skipped[].title": "what it would have looked at",
        "skipped[].reason": "why it could not be decided",
        "not_run[].code": "a check that was not asked for",
        "not_run[].slug": "its name",
        "not_run[].title": "what it looks at",
        "not_run[].stage": "the stage that decides it",
        "passed[].code": "a check that ran and found neither an error nor a warning",
        "passed[].slug": "its name",
        "passed[].title": "what holds",
        "errors[].role": "the role that could not be read or judged",
        "errors[].message": "why, in one sentence",
        "crashed[].code": "a check that crashed: a fault of this tool, never a pass",
        "crashed[].traceback": "where",
        "setup.origin": "where the setup came from",
        "setup.declared.**": "what the user declared: gamma, kl_coef, ...",
        "setup.trust_remote_code": "whether code that a checkpoint brings along was allowed to run",
        "setup.roles.*.role": "policy, reference, reward or value",
        "setup.roles.*.purpose": "what the role is for",
        "setup.roles.*.present": "whether it was given",
        "setup.roles.*.class_name": "the class of the model, as quoted from its config or object",
        "setup.roles.*.model_type": "the config's model_type",
        "setup.roles.*.origin": "checkpoint, module, callable or adapter-off",
        "setup.roles.*.path": "the checkpoint's folder",
        "setup.roles.*.kind": "what the model was measured to be, such as transformer decoder",
        "setup.roles.*.why": "what was seen that makes it so",
        "setup.roles.*.emits": "what it gives, such as scalar per token",
        "setup.roles.*.emits_expected": "what the role should give",
        "setup.roles.*.fits": "whether the two are the same; null where nothing was measured",
        "setup.roles.*.expected_shape": "the shape that the role's output should have",
        "setup.roles.*.expected_here": "the same for the batch that was given, null where nothing was measured",
        "setup.roles.*.measured_shape": "the shape of its output",
        "setup.roles.*.where": "how the output was read",
        "setup.roles.*.dtype": "of the output",
        "setup.roles.*.layers": "number of layers by its config",
        "setup.roles.*.hidden": "width of the hidden state by its config",
        "setup.roles.*.vocabulary": "rows of the embedding, else the config's vocab_size",
        "setup.roles.*.adapter": "the kind of adapter on it, or null",
        "setup.roles.*.in_ppo": "whether PPO trains the role or never does",
        "setup.roles.*.parameters": "number of scalars",
        "setup.roles.*.trainable": "number of them that take gradients",
        "setup.roles.*.state": "trained, frozen, partly trained, or unknown (a checkpoint does not say)",
        "setup.roles.*.head": "the output head, null where none was found",
        "setup.roles.*.head.kind": "vocabulary, scalar or labels",
        "setup.roles.*.head.name": "the tensor of the output head",
        "setup.roles.*.head.width": "its number of outputs",
        "setup.roles.*.influence": "the influence map, null where it could not be measured",
        "setup.roles.*.influence.tokens": "row t, column s: influence of token s on output t, each row's largest is 1",
        "setup.roles.*.influence.tokens_of": "which output or activation the rows are",
        "setup.roles.*.influence.score": "the influence of each token on an output per sequence, or null",
        "setup.roles.*.influence.method": "gradient or substitution",
        "setup.roles.*.influence.floor": "entries up to this are no influence",
        "setup.roles.*.influence.sees_future": "the largest entry of a later token on an earlier output",
        "setup.roles.*.influence.coverage": "share of past and present tokens with influence: 1 for a decoder",
        "setup.roles.*.influence.reach": "how many positions back the farthest influence comes from",
        "setup.roles.*.census": "operations that mix positions (name -> count), null where none could be watched",
        "setup.roles.*.census.attention.*": "attention operations seen in one forward pass",
        "setup.roles.*.census.convolution.*": "convolutions over time",
        "setup.roles.*.census.recurrent.*": "recurrent operations",
        "setup.roles.*.census.scan.*": "linear scans over time",
        "setup.roles.*.census.pooling.*": "poolings over time",
        "setup.roles.*.census.lengths": "the two sequence lengths that were compared",
        "setup.roles.*.census.depth": "the longest chain of operations at each length",
        "setup.roles.*.census.kernel_widths": "widths of the convolutions, in tokens",
        "setup.roles.*.census.depth_per_token": "operations that each further token adds to the longest chain",
        "environment.versions.*": "versions of the packages that matter",
        "environment.platform": "the operating system",
        "environment.command": "the command line",
        "environment.stage": "how deep it looked: static, probe, trace or metrics",
        "environment.seed": "of every random choice",
        "environment.device": "where models ran",
        "environment.dtype": "the dtype asked for, null for each model's own",
        "environment.started": "when the examination began",
        "environment.seconds": "how long it took",
        "environment.inputs[].path": "a file that was read",
        "environment.inputs[].bytes": "its size",
        "environment.inputs[].sha256": "its hash, null for large files",
    }
)


def paths(value: Any, at: str = "") -> Iterator[str]:
    """The schema's path of every leaf of a record; an empty list or mapping has none."""
    if at and f"{at}.**" in SCHEMA:
        yield f"{at}.**"
    elif isinstance(value, Mapping):
        starred = any(known.startswith(f"{at}.*") for known in SCHEMA)
        for key, item in value.items():
            yield from paths(item, f"{at}.*" if starred else f"{at}.{key}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for item in value:
            yield from paths(item, f"{at}[]")
    elif not isinstance(value, list) or at in SCHEMA:
        yield at
