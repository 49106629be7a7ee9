"""TOK003: the policy stops where everyone takes the response to end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.stops import generation_stops, ids_in
from rlhf_doctor.instruments.vocabularies import Fed


@check(
    "TOK003",
    "the policy stops where everyone takes the response to end",
    stage=Stage.STATIC,
    severity=Severity.ERROR,
    explains=("ROL005", "ROL006", "MET008"),
    across_roles=True,
)
def eos_disagrees(setup: Any, manifest: Mapping[Role, Manifest], vocabularies: Mapping[Role, Fed]) -> Iterator[Finding]:
    """
    What it examines:
        The ids at which the policy's generation stops (generation config, else config; one or several) against the
        tokenizer's EOS, which loops compare with for masks, penalties and "finished". Several stop ids, the
        tokenizer's among them, are sound where the generation config lists them. A generation config
        without any is told: whether what is generated behind EOS is cut and masked, a step shows (ROL005). Only the
        policy generates, so the configs of the other models are not held against it.

    Why it matters:
        If generation ends at one id and the mask looks for another, finished responses count as cut: they are
        penalised, or masked out of the loss altogether, and the policy learns not to end.

    What it looks like when broken:
        A truncation rate near 1 with responses far below the limit; the EOS penalty hits all responses or none.

    How to fix:
        1. Set the tokenizer's EOS to the token that ends an assistant turn.
        2. List every stop id in generation_config.eos_token_id, and test membership in that list, not equality.

    Source:
        https://github.com/huggingface/trl/pull/7039; https://github.com/NovaSky-AI/SkyRL/pull/1319;
        https://github.com/databricks/compose-rl/pull/31 (several stop ids, one honoured);
        https://github.com/huggingface/trl/pull/5338. Generation that runs past EOS and is cut afterwards is slow and
        harmless: https://github.com/huggingface/trl/issues/2387.
    """
    m, fed = manifest.get("policy"), vocabularies.get("policy")
    if m is None or fed is None:
        raise Unavailable("needs a policy and a tokenizer")
    info = fed.ids_of
    stops, where = generation_stops(m)
    # generate() reads the generation config alone where there is one.
    if m.generation_config and where == "config" and info.eos_id in stops:
        stops, where = frozenset(), "generation config"
    listed = ids_in(m.config.get("eos_token_id"))
    rows = m.embedding_rows or m.vocab_size or info.size
    found = Evidence("stop ids of generation", f"with {info.eos_id}", _shown(stops), where=f"the policy's {where}")
    if not stops and info.eos_id is None:
        if m.config or m.generation_config:
            yield _finding(
                "Nothing ends a response: neither the tokenizer nor the policy's configs have an EOS. "
                "Define it in both.",
                Evidence("stop ids", "at least one", "none", where=info.where),
            )
    elif info.eos_id is None:
        yield _finding(
            f"The tokenizer has no EOS and generation stops at {_shown(stops)}: masks and penalties that "
            "ask the tokenizer find no end. Define it there too.",
            found,
            Severity.WARNING,
        )
    elif not stops:
        if m.config or m.generation_config:
            who = "generation config has no EOS" if m.generation_config else "config has no EOS"
            yield _finding(
                f"The policy's {who}, so its own generation runs to the limit; the tokenizer's is {info.eos_id}. That "
                "is slow, and harmless where responses are cut at EOS and masked behind it: pass eos_token_id to "
                "generate.",
                found,
                Severity.INFO,
            )
    elif info.eos_id not in stops:
        out = min(stops) >= rows
        yield _finding(
            f"The policy's generation stops at {_shown(stops)} and the tokenizer's EOS is {info.eos_id} "
            f"({info.eos!r}): a response ends at one and is tested for the other. Make them agree.",
            found,
            # An id beyond the vocabulary is a class's default that nobody set, and loops then pass their own.
            Severity.INFO if out else None,
        )
    elif not listed <= stops and where == "generation config" and max(listed) < rows:
        yield _finding(
            f"The policy's config has the stop ids {_shown(listed)} and its generation config only "
            f"{_shown(stops)}: responses that end at another of them run on. List all in the generation config.",
            found,
        )
    elif len(stops) > 1 and setup.declared.get("missing_eos_penalty"):
        yield _finding(
            f"Generation stops at any of {_shown(stops)}. See to it that the EOS penalty and the mask test "
            f"all of them, not the tokenizer's {info.eos_id} alone.",
            found,
            Severity.INFO,
        )


def _shown(ids: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(ids))) or "none"


def _finding(message: str, evidence: Evidence, severity: Severity | None = None) -> Finding:
    return Finding(message, role="tokenizer", severity=severity, confidence=Confidence.PROVEN, evidence=(evidence,))


@eos_disagrees.fault("generation stops at another id than the tokenizer's EOS")
def _(healthy: Any) -> Any:
    import copy

    policy = copy.deepcopy(healthy.policy)
    policy.generation_config.eos_token_id = [healthy.tokenizer.eos_token_id + 5]
    return healthy.but(policy=policy, optimizers=(), step=None)


@eos_disagrees.fault("a checkpoint whose generation config honours one of two stop ids")
def _(healthy_files: Any) -> Any:
    import json

    folder = healthy_files.path("policy")
    config = json.loads((folder / "config.json").read_text())
    both = {"eos_token_id": [config["eos_token_id"], config["eos_token_id"] + 7]}
    (folder / "config.json").write_text(json.dumps(config | both))
    return healthy_files


@eos_disagrees.fault("no stop id anywhere")
def _(healthy: Any) -> Any:
    import copy

    policy, tokenizer = copy.deepcopy(healthy.policy), copy.deepcopy(healthy.tokenizer)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.eos_token = None
    return healthy.but(policy=policy, tokenizer=tokenizer, optimizers=(), step=None)
