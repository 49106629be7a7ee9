"""ROL006: rollouts stop by themselves, and are drawn rather than decoded greedily."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.rates import number
from rlhf_doctor.instruments.samples import Samples
from rlhf_doctor.instruments.text_loss import TextLoss

RARELY = 0.01
MOST = 0.9


@check(
    "ROL006",
    "rollouts stop by themselves and are drawn",
    stage=Stage.PROBE,
    severity=Severity.WARNING,
    early=Stage.STATIC,
    explains=("MET007", "MET008"),
)
def never_stops(
    setup: Any, policy_samples: Samples | None = None, policy_text_loss: TextLoss | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        The declared sampling: temperature 0, top_k 1 or do_sample false are greedy. Then, of a policy that has learnt
        its texts: responses sampled to the declared length, whether any ends in a stop token; the probability of a stop
        token right after a whole preferred response; and how many preferred responses are longer than the declared
        limit. A policy that predicts the texts no better than a guess is not judged, since it never stops either.

    Why it matters:
        PPO learns from differences between drawn responses: greedy ones have none, and a temperature of 0 divides
        logits by 0. A response that is cut has no ending to be scored; with all of them cut, the reward is one
        constant.

    What it looks like when broken:
        Every response has the maximal length, the penalty for a missing EOS dominates, accuracy rewards stay at 0. SFT
        with pad = eos often causes it: the collator masks every EOS from the labels.

    How to fix:
        1. Sample with a temperature above 0; 1 keeps log-probabilities and samples in one distribution.
        2. Append EOS to the SFT texts, give the pad token another id than EOS, and check that the EOS label is kept.
        3. Raise response_length until most preferred responses fit.

    Source:
        https://github.com/huggingface/trl/issues/976 and https://github.com/huggingface/trl/issues/734 (no EOS learnt);
        https://github.com/huggingface/trl/issues/5697 (97% of completions cut); greedy:
        https://github.com/THUDM/slime/pull/2197. After a whole answer a fine-tuned model stops with a probability of
        tenths, one that was never shown EOS below 1e-3; 0.01 lies between. Nine tenths cut leave too few to learn from.
    """
    yield from _greedy(setup)
    if policy_text_loss is None or policy_text_loss.ignorant:
        return
    limit = setup.declared.get("response_length")
    s, t = policy_samples, policy_text_loss
    drawn = s is not None and bool(s.stop_ids) and s.limit == s.wanted == limit
    ended = sum(s.ended) if s is not None else 0
    rare = t.stop_chance is not None and t.stop_chance < RARELY
    if s is not None and s.stop_ids and ended == 0 and (rare or drawn):
        reason = (
            f"after a whole preferred response it stops with a probability of {t.stop_chance:.2g}, so it never learnt "
            "to: append EOS to the SFT texts and keep its label"
            if rare
            else f"every one was cut at {s.limit} tokens: raise response_length, or check that SFT taught it to stop"
        )
        yield Finding(
            f"None of {len(s.ended)} sampled responses ends in a stop token; {reason}.",
            role="policy",
            confidence=Confidence.MEASURED,
            evidence=tuple(_evidence(s, t)),
        )
        return
    longer = [n for n in t.lengths if isinstance(limit, int) and n > limit]
    if t.lengths and len(longer) > MOST * len(t.lengths):
        yield Finding(
            f"{len(longer)} of {len(t.lengths)} preferred responses are longer than the declared response_length of "
            f"{limit} tokens. Most of them should fit: raise it, or rollouts are cut before their end.",
            role="loop",
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    "tokens of a preferred response",
                    expected=f"{limit} or fewer",
                    observed=str(sorted(t.lengths)[len(t.lengths) // 2]),
                    where="the median; preferences",
                ),
            ),
        )


def _greedy(setup: Any) -> Iterator[Finding]:
    temperature, top_k = number(setup.declared.get("temperature")), number(setup.declared.get("top_k"))
    if temperature is not None and temperature <= 0:
        name, value, wanted = "temperature", f"{temperature:g}", "above 0"
    elif top_k == 1:
        name, value, wanted = "top_k", "1", "0 (off), or many"
    elif setup.declared.get("do_sample") is False:
        name, value, wanted = "do_sample", "False", "True"
    else:
        return
    yield Finding(
        f"Rollouts are declared to be greedy: {name} is {value}. They should be drawn from the policy: set it to "
        f"{wanted}.",
        role="loop",
        severity=Severity.ERROR if name == "temperature" else None,
        confidence=Confidence.PROVEN,
        evidence=(Evidence(f"declared {name}", wanted, value, where="declared"),),
    )


def _evidence(s: Samples, t: TextLoss) -> Iterator[Evidence]:
    yield Evidence(
        "sampled responses that end in a stop token",
        "most",
        f"0 of {len(s.ended)}",
        where=f"{s.limit} tokens at temperature 1; stop ids {', '.join(map(str, s.stop_ids))}",
    )
    if t.stop_chance is not None:
        yield Evidence(
            "probability of a stop token after a whole preferred response",
            "tenths",
            f"{t.stop_chance:.2g}",
            f"{RARELY:g}",
        )


@never_stops.fault("temperature 0 declared")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"temperature": 0.0})


@never_stops.fault("a Hugging Face policy that was never shown EOS")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    policy = policies.Muted(healthy.policy, healthy.tokenizer.eos_token_id)
    return policies.paired(healthy, policy)


@never_stops.fault("a limit that cuts every response")
def _(healthy: Any) -> Any:
    return healthy.but(step=None, declared={"response_length": 3})
