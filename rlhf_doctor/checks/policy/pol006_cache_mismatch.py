"""POL006: decoding with the cache and one full pass agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Invariance


@check(
    "POL006",
    "decoding with the cache and one full pass agree",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("POL005", "POL002", "PRE004"),
)
def policy_cache_mismatch(policy_invariance: Invariance) -> Iterator[Finding]:
    """
    What it examines:
        One text is fed to the policy a token at a time, with the key-value cache that each call returns, and once as a
        whole. Log-probabilities of its tokens should be the same. A model without a cache is skipped.

    Why it matters:
        Responses are sampled with the cache and scored without it. Where the two disagree, the policy that is trained
        is not the policy that acts: every ratio is off, and the loop optimises text that was never drawn.

    What it looks like when broken:
        A ratio off 1 before the first update that grows with the position in the response; samples that are worse than
        the log-probabilities of the very same samples say.

    How to fix:
        1. Count positions from the length of the cache on, not from 0 at each call.
        2. Append keys after they were rotated by their position, and keep all of them; with a sliding window, use the
           same window in the full pass.
        3. Until it is mended, sample with use_cache=False.

    Source:
        https://huggingface.co/docs/transformers/cache_explanation (the mask and the positions that go with a cache);
        https://github.com/huggingface/trl/issues/469 (log-probabilities that depend on how positions are counted). The
        tolerance is that of POL004: what rounding explains between calls of other shapes.
    """
    if "cache" not in policy_invariance.shifts:
        raise Unavailable(policy_invariance.undecided.get("cache", "the policy was not decoded with a cache"))
    shift = policy_invariance.shifts["cache"]
    if not shift.moved:
        return
    yield Finding(
        "The policy decoded with its cache gives other log-probabilities than in one pass, by up to "
        f"{shift.largest:.2g} nats a token. They should be the same: count positions from the cache's length on, and "
        "keep every cached key.",
        role="policy",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "largest difference of a token's log-probability, cached against whole",
                expected="0",
                observed=f"{shift.largest:.3g} nats",
                tolerance=f"{shift.tolerance:.2g}",
                where=shift.detail,
                reproduce="policy(ids) against policy(ids[:, t:t+1], past_key_values=cache) for every t",
            ),
        ),
    )


@policy_cache_mismatch.fault("a Hugging Face policy that counts cached positions from 0")
def _(healthy: Any) -> Any:
    import copy

    from rlhf_doctor.selftest import policies

    policy = policies.forget_positions(copy.deepcopy(healthy.policy))
    return policies.alone(healthy, policy=policy)


@policy_cache_mismatch.fault("a hand-written cache that drops its oldest token")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies, specimens

    policy = policies.CachedDecoder(specimens.vocabulary(healthy), forgets="oldest").eval()
    return policies.paired(healthy, policy)


@policy_cache_mismatch.fault("a hand-written cache without positions")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies, specimens

    policy = policies.CachedDecoder(specimens.vocabulary(healthy), forgets="position").eval()
    return policies.paired(healthy, policy)
