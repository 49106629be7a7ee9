"""What a model is, by what it was seen to do."""

from __future__ import annotations

from rlhf_doctor.facts import role_fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.readings import Architecture, Census, Influence, Manifest

__all__ = ["architecture"]


@role_fact(Stage.PROBE)
def architecture(role: str, census: Census, influence: Influence, manifest: Manifest) -> Architecture:
    """Decide from the census and the influence map; the class name is quoted, never used."""
    causal = influence.causal if influence.tokens else None
    kind, why = _decide(census, influence, causal)
    if kind == "transformer encoder" and manifest.config.get("is_encoder_decoder"):
        kind, why = "encoder-decoder", "attention in an encoder and a decoder"
    return Architecture(kind, why, causal, manifest.class_name)


def _decide(census: Census, influence: Influence, causal: bool | None) -> tuple[str, str]:
    attention = sum(census.attention.values())
    if census.recurrent:
        names = ", ".join(sorted(census.recurrent))
        why = f"each token is computed from the state after the one before ({names})"
        if census.depth_per_token > 0:
            why += f"; {census.depth_per_token:.1f} further operations deep for each further token"
        return "recurrent", why + (" beside attention" if attention else "")
    if census.scan:
        why = f"a linear state is carried from token to token ({', '.join(sorted(census.scan))})"
        return ("hybrid state space", why + " beside attention") if attention else ("state space", why)
    if census.convolution:
        widths = ", ".join(str(w) for w in census.kernel_widths)
        why = f"convolutions over time with kernels of {widths} tokens" if widths else "convolutions over time"
        why += f"; an output reaches {influence.reach} tokens back"
        return ("hybrid convolutional", why + " beside attention") if attention else ("convolutional", why)
    if attention:
        if causal:
            return "transformer decoder", f"attention, every output sees its past and nothing else ({attention} calls)"
        return "transformer encoder", "attention in which outputs see later tokens too"
    if influence.reach == 0 and causal:
        pooled = " and only pooled over the sequence" if influence.score else ""
        return (
            "bag of tokens" if pooled else "per-token"
        ), f"no operation mixes positions: tokens are seen one by one{pooled}"
    if influence.tokens and influence.coverage > 0:
        return (
            "unknown",
            f"neither attention, convolution nor recurrence was seen; an output reaches {influence.reach} tokens back",
        )
    return "bag of tokens", "no operation mixes positions but pooling"
