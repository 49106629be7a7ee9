"""What REW001 and VAL001 say of a model that is no Transformer: shared by the two, no check itself."""

from __future__ import annotations

from rlhf_doctor.finding import Confidence, Evidence, Finding, Role
from rlhf_doctor.instruments.readings import Architecture, Census, Influence

__all__ = ["NAMES", "not_transformer"]

NAMES = {
    "convolutional": "a convolutional network (CNN)",
    "hybrid convolutional": "a network of convolutions with some attention",
    "recurrent": "a recurrent network (RNN)",
    "state space": "a state-space model, like Mamba",
    "hybrid state space": "a hybrid of a state-space model and attention",
    "bag of tokens": "a bag of tokens: it sees which tokens there are and not their order",
    "per-token": "a network that sees every token by itself",
}
LIMITS = {
    "convolutional": "It sees windows of a few tokens and cannot relate the end of a text to its start.",
    "hybrid convolutional": "Most of its layers see windows of a few tokens.",
    "recurrent": "It carries the text in one state of fixed size that each token overwrites a little, so it forgets.",
    "state space": "It carries the text in one state of fixed size, so what is far back fades.",
    "hybrid state space": "Most of its layers carry the text in one state of fixed size.",
    "bag of tokens": "Word order, negation and who did what to whom are invisible to it.",
    "per-token": "The rest of the text is invisible to it.",
}


def not_transformer(
    role: Role, title: str, found: Architecture, census: Census, influence: Influence, policy: Architecture | None
) -> Finding | None:
    """The finding for a model of another kind than a Transformer, None for a Transformer or an unknown kind.

    None too where the policy itself is of that kind: then the four models do share one architecture, and the policy's
    is what there is to talk about.
    """
    if found.kind not in NAMES or (policy is not None and policy.kind == found.kind):
        return None
    row = influence.score or ()
    third = len(row) // 3
    cut = any(max(end, default=1.0) <= influence.floor for end in (row[:third], row[-third:])) and max(row) > 0
    if found.kind in ("bag of tokens", "per-token") and row and cut:
        return None  # the text's start, or its end, is cut off before the model, so what mixes the rest was not seen
    beside = (
        f"the policy was measured to be a {policy.kind}" if policy is not None else "the policy is a language model"
    )
    mixers = {
        "attention": census.attention,
        "convolution over tokens": census.convolution,
        "recurrence": census.recurrent,
        "scan over tokens": census.scan,
    }
    operations = "; ".join(
        f"{name}: " + (", ".join(f"{op} × {n}" for op, n in sorted(counted.items())) or "none")
        for name, counted in mixers.items()
    )
    evidence = [
        Evidence(
            "operations that mix tokens in a forward pass",
            expected="attention, and nothing else",
            observed=operations,
            where=found.class_name,
            reproduce=f"a forward pass of {census.lengths[0]} and of {census.lengths[1]} tokens, operations counted",
        ),
        Evidence(
            "operations that one more token adds to the longest path of the computation",
            expected="0: a Transformer is as deep for a long text as for a short one",
            observed=f"{census.depth_per_token:.1f} ({census.depth[0]} at {census.lengths[0]} tokens, "
            f"{census.depth[1]} at {census.lengths[1]})",
            where=found.class_name,
        ),
        _seen(influence, found.class_name),
    ]
    if census.kernel_widths:
        widths = ", ".join(str(w) for w in census.kernel_widths)
        evidence.append(
            Evidence(
                "width of the convolutions' kernels over tokens",
                expected="none",
                observed=f"{widths} tokens",
                where=found.class_name,
            )
        )
    return Finding(
        f"The {title} is {NAMES[found.kind]}, while {beside}. {LIMITS[found.kind]} It should be the same Transformer "
        "as the policy with a head of one number in place of the vocabulary: start it from the policy's or the SFT "
        "model's weights.",
        role=role,
        confidence=Confidence.MEASURED,
        evidence=tuple(evidence),
    )


def _seen(influence: Influence, where: str) -> Evidence:
    if influence.tokens:
        length = len(influence.tokens)
        return Evidence(
            "influence map: the share of a position's past that moves its output",
            expected=f"1.00 of the past, up to {length - 1} tokens back, and nothing of the future",
            observed=f"{influence.coverage:.2f} of the past, up to {influence.reach} tokens back; strongest "
            f"influence of a later token {influence.sees_future:.2g}",
            tolerance=f"{influence.floor:g} of the row's largest entry counts as none",
            where=f"{where}, {influence.tokens_of}",
            reproduce=f"|∂ output_t / ∂ embedding_s| by {influence.method}, {length} tokens",
        )
    row = influence.score or ()
    return Evidence(
        "influence map: tokens that move the score",
        expected="every token, more or less by its context",
        observed=f"{sum(v > influence.floor for v in row)} of {len(row)}",
        where=where,
        reproduce=f"|∂ score / ∂ embedding_s| by {influence.method}",
    )
