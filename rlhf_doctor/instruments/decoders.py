"""When a language model is no decoder: the finding that policy and reference share."""

from __future__ import annotations

from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity
from rlhf_doctor.instruments.readings import Architecture, Census, Influence, Manifest

__all__ = ["ENCODERS", "shape_fault"]

# Families whose attention is bidirectional by design. A decoder that lost its causal mask measures the same, so the
# name decides between the two.
ENCODERS = frozenset({
    "bert", "roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "xlm-roberta",
    "xlm-roberta-xl", "camembert", "mpnet", "modernbert", "nomic_bert", "ernie", "convbert", "mobilebert",
    "squeezebert", "layoutlm", "longformer", "big_bird", "funnel", "nystromformer", "roformer", "rembert",
    "eurobert", "neobert", "flaubert", "roc_bert", "megatron-bert",
})  # fmt: skip


def shape_fault(
    role: Role,
    manifest: Manifest,
    architecture: Architecture | None,
    census: Census | None,
    influence: Influence | None,
) -> Finding | None:
    """What is wrong with a policy's or reference's architecture, None where nothing is or nothing is known."""
    if manifest.config.get("is_encoder_decoder") or (architecture and architecture.kind == "encoder-decoder"):
        return Finding(
            f"The {role} is an encoder-decoder ({manifest.class_name}), not a decoder. It can be aligned, but other "
            "conventions hold: prompts padded on the right and ended by EOS are right for it, and responses live in "
            "the decoder. Check that the loop, the reward and the critic are written for that.",
            role=role,
            severity=Severity.WARNING,
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    "kind of model",
                    "transformer decoder",
                    "encoder-decoder",
                    where=f"config: is_encoder_decoder, model_type {manifest.model_type}",
                ),
            ),
        )
    if architecture is None or architecture.is_decoder or architecture.kind == "unknown":
        return None
    declared_encoder = manifest.model_type in ENCODERS or "MaskedLM" in manifest.class_name
    if architecture.kind == "transformer encoder" and not declared_encoder and role == "policy":
        return None  # a decoder without its causal mask, which has a check of its own
    evidence = [
        Evidence(
            "what mixes positions in a forward pass",
            "attention, each position over its past",
            architecture.sentence,
            where=architecture.class_name,
            reproduce=f"rlhf-doctor check --select {'POL001' if role == 'policy' else 'REF001'}",
        )
    ]
    if census is not None and census.depth_per_token:
        evidence.append(
            Evidence(
                "operations that each further token adds to the longest path", "0", f"{census.depth_per_token:.1f}"
            )
        )
    if influence is not None and influence.tokens:
        evidence.append(
            Evidence(
                "share of earlier tokens that an output depends on",
                "100%",
                f"{influence.coverage:.0%}",
                where="influence map",
            )
        )
    return Finding(
        f"The {role} is no Transformer decoder but {_named(architecture.kind)}: {architecture.sentence}. "
        "It should be a decoder-only Transformer like the other three models: replace it"
        + ("." if role == "policy" else ", by a frozen copy of the policy."),
        role=role,
        confidence=Confidence.MEASURED,
        evidence=tuple(evidence),
    )


def _named(kind: str) -> str:
    return {
        "transformer encoder": "a Transformer encoder",
        "state space": "a state-space model",
        "hybrid state space": "a hybrid of attention and a state space",
        "convolutional": "a convolutional network",
        "hybrid convolutional": "a hybrid of attention and convolution",
        "recurrent": "a recurrent network",
        "bag of tokens": "a bag of tokens",
        "per-token": "a map of single tokens",
    }.get(kind, f"a {kind} model")
