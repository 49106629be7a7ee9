"""The equations of RLHF with PPO, one a function.

Shapes: B sequences, T response tokens, D hidden units, V vocabulary entries. Index t runs over 0 … T-1; token a_t is
drawn in state s_t, which is the prompt and a_0 … a_{t-1}. A mask is a bool tensor (B, T), true at a_0 … up to and with
the end of sequence. Slots outside the mask may hold anything, NaN included: they change neither value nor gradient.
Sources: [PPO] https://arxiv.org/abs/1707.06347, [GAE] https://arxiv.org/abs/1506.02438,
[KL] http://joschu.net/blog/kl-approx.html, [BT] https://arxiv.org/abs/2203.02155,
[N+] https://arxiv.org/abs/2403.17031.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 25  # logits held at once by token_logprobs: 128 MiB in float32


def _assert_alike(*tensors: Tensor, mask: Tensor) -> None:
    assert mask.dtype == torch.bool, f"mask must be bool, not {mask.dtype}"
    for x in tensors:
        assert x.shape == mask.shape, f"shape {tuple(x.shape)} must be the mask's {tuple(mask.shape)}"
        assert x.is_floating_point(), f"dtype must be floating, not {x.dtype}"


def logprobs(logits: Tensor, a: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(a_t | s_t) = z_t[a_t] - log Σ_v exp z_t[v], with z = logits / temperature.
    logits (..., T, V) and a (..., T) int → (..., T), in float32 or wider. The temperature is the sampling one, so that
    this is the distribution the tokens came from ([N+])."""
    assert logits.shape[:-1] == a.shape, (logits.shape, a.shape)
    assert temperature > 0, temperature
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z if temperature == 1 else z / temperature
    return -F.cross_entropy(z.flatten(0, -2), a.flatten(), reduction="none").view(a.shape)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """H_t = -Σ_v π(v | s_t) log π(v | s_t), in nats, logits (..., V) → (...)."""
    logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def token_logprobs(
    hidden: Tensor, head: nn.Linear, a: Tensor, temperature: float = 1.0, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """`logprobs(head(hidden), a)` with at most about `chunk_elements` logits alive at once.
    hidden (B, T, D), a (B, T) int → (B, T). Long inputs are cut along T and each piece's logits are computed again in
    the backward pass; a short input is one piece and is not."""
    assert hidden.dim() == 3, hidden.shape
    assert hidden.shape[:-1] == a.shape, (hidden.shape, a.shape)
    width = max(1, chunk_elements // (hidden.shape[0] * head.weight.shape[0]))

    def piece(h: Tensor, tokens: Tensor) -> Tensor:
        return logprobs(head(h), tokens, temperature)

    if width >= a.shape[1]:
        return piece(hidden, a)
    pieces = zip(torch.split(hidden, width, 1), torch.split(a, width, 1), strict=True)
    return torch.cat([checkpoint(piece, h, tokens, use_reentrant=False) for h, tokens in pieces], 1)


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k1 = log π(a)/π_ref(a), a ~ π: unbiased for KL(π ‖ π_ref), of either sign. [KL]"""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k2 = ½ (log π(a)/π_ref(a))²: biased, never negative; its gradient is that of the KL. [KL]"""
    return (logp - ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 = r - 1 - log r with r = π_ref(a)/π(a): unbiased and never negative. [KL]"""
    log_r = ref_logp - logp
    return log_r.expm1() - log_r


def exact_kl(logits: Tensor, ref_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(π ‖ π_ref) = Σ_v π(v) (log π(v) - log π_ref(v)) in nats, both logits (..., V) → (...)."""
    assert logits.shape == ref_logits.shape, (logits.shape, ref_logits.shape)
    logp, ref_logp = ((z / temperature).log_softmax(-1) for z in (logits, ref_logits))
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def pool_last(x: Tensor, mask: Tensor) -> Tensor:
    """x[b, max{t : mask[b, t]}]: each row at its last real position; x and mask (B, T) → (B,).
    Raises ValueError for a row without a real position."""
    _assert_alike(x, mask=mask)
    if not bool(mask.any(1).all()):
        raise ValueError(f"rows {(~mask.any(1)).nonzero().flatten().tolist()} have no real position to read a score at")
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return x.gather(1, last[:, None])[:, 0]


def shaped_rewards(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -β kl_t + [t = last] score: a KL penalty at every token, the score at the last one ([N+]).
    score (B,), kl and mask (B, T) → (B, T), zero outside the mask."""
    _assert_alike(kl, mask=mask)
    assert score.shape == mask.shape[:1], (score.shape, mask.shape)
    last = mask & ~F.pad(mask[:, 1:], (0, 1))  # masks are a run of true, so its end is where the next is false
    return (-kl_coef * kl).masked_fill(~mask, 0) + last * score[:, None]


def gae(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = Σ_{l≥0} (γλ)^l δ_{t+l} with δ_t = r_t + γ V(s_{t+1}) - V(s_t) and V = 0 after the last token. [GAE, eq. 16]
    r, v and mask (B, T) → (B, T), zero outside the mask. The returns are A + v."""
    _assert_alike(r, v, mask=mask)
    r, v = r.masked_fill(~mask, 0), v.masked_fill(~mask, 0)
    delta = r + gamma * F.pad(v[:, 1:], (0, 1)) - v
    advantage, columns = torch.zeros_like(v[:, 0]), []
    for t in reversed(range(mask.shape[1])):
        advantage = delta[:, t] + gamma * lam * advantage
        columns.append(advantage)
    return torch.stack(columns[::-1], 1).masked_fill(~mask, 0)


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Σ mask·x / n over all B × T slots; n is the mask's sum, or `count`, a larger batch's, when x is a part of it."""
    _assert_alike(x, mask=mask)
    return x.masked_fill(~mask, 0).sum() / (mask.sum() if count is None else count)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Σ mask·(x - mean)² / (n - 1), the unbiased variance over all B × T slots; raises ValueError when n < 2."""
    n = mask.sum()
    if n < 2:
        raise ValueError(f"the variance of {int(n)} values is not defined")
    return masked_mean((x - masked_mean(x, mask)).square(), mask, n - 1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """(x - mean) / √(var + ε) over the mask, zero outside; with shift_mean false the mean is added back. [N+]"""
    mean = masked_mean(x, mask)
    white = (x - mean) * (masked_var(x, mask) + epsilon).rsqrt()
    return (white if shift_mean else white + mean).masked_fill(~mask, 0)


def explained_variance(v: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var[R - V] / Var[R]: 1 for a perfect critic, 0 for a constant one, negative for a harmful one."""
    return 1 - masked_var(returns - v, mask) / masked_var(returns, mask)


def clipped_policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, epsilon: float, count: Tensor | float | None = None
) -> Tensor:
    """-E_t[min(ρ_t A_t, clip(ρ_t, 1-ε, 1+ε) A_t)] with ρ_t = π(a_t|s_t)/π_old(a_t|s_t). [PPO, eq. 7]
    All (B, T) → scalar, the mean over the mask's tokens (or `count`, see masked_mean)."""
    _assert_alike(logp, old_logp, advantage, mask=mask)
    A, ratio = advantage.masked_fill(~mask, 0), (logp - old_logp).masked_fill(~mask, 0).exp()
    return masked_mean(-torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A), mask, count)


def clip_fraction(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, epsilon: float, count: Tensor | float | None = None
) -> Tensor:
    """Share of the tokens whose gradient the policy loss cuts: A > 0 and ρ > 1+ε, or A < 0 and ρ < 1-ε."""
    ratio = (logp - old_logp).exp()
    cut = ((advantage > 0) & (ratio > 1 + epsilon)) | ((advantage < 0) & (ratio < 1 - epsilon))
    return masked_mean(cut.to(logp.dtype), mask, count)


def clipped_value_loss(
    v: Tensor, old_v: Tensor, returns: Tensor, mask: Tensor, epsilon: float, count: Tensor | float | None = None
) -> Tensor:
    """½ E_t[max((V_t - R_t)², (clip(V_t, V_old,t - ε, V_old,t + ε) - R_t)²)]. [N+]
    All (B, T) → scalar, the mean over the mask's tokens (or `count`, see masked_mean)."""
    _assert_alike(v, old_v, returns, mask=mask)
    old_v, returns = old_v.masked_fill(~mask, 0), returns.masked_fill(~mask, 0)
    clipped = v.clamp(old_v - epsilon, old_v + epsilon)
    return masked_mean(torch.maximum((v - returns).square(), (clipped - returns).square()), mask, count) / 2


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, center_coef: float = 0.0) -> Tensor:
    """-E[log σ(r_chosen - r_rejected)] + c E[(r_chosen + r_rejected)²]. [BT, eq. 1]
    Scores (B,) and (B,) → scalar. The likelihood is blind to a constant added to every score; the second term, from
    https://arxiv.org/abs/2312.09244, holds the scores around 0."""
    assert chosen.dim() == 1, chosen.shape
    assert chosen.shape == rejected.shape, (chosen.shape, rejected.shape)
    return -F.logsigmoid(chosen - rejected).mean() + center_coef * (chosen + rejected).square().mean()
