"""REW006: the score depends on the response and on the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.reward.alone import given_alone
from rlhf_doctor.checks.reward.constant_functions import of_function
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.function_range import FunctionRange
from rlhf_doctor.instruments.on_samples import OnSamples
from rlhf_doctor.instruments.preferences import PairScores
from rlhf_doctor.instruments.prompt_use import PromptUse
from rlhf_doctor.instruments.readings import Influence, Manifest
from rlhf_doctor.instruments.tracing import Traced
from rlhf_doctor.instruments.variation import Variation


@check(
    "REW006",
    "the score depends on the response and on the prompt",
    stage=Stage.TRACE,
    early=Stage.PROBE,
    severity=Severity.ERROR,
    after=("REW001", "PRE004"),
    explains=("REW009", "REW010", "REW012", "REW013"),
)
def reward_constant(
    setup: Any,
    reward_manifest: Manifest,
    reward_variation: Variation | None = None,
    reward_influence: Influence | None = None,
    reward_on_samples: OnSamples | None = None,
    reward_preferences: PairScores | None = None,
    reward_function_range: FunctionRange | None = None,
    reward_prompt_use: PromptUse | None = None,
    traced: Traced | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        A text of 16 tokens is scored with its second half replaced six times, then with its first half replaced six
        times. The score should move both times; "no dependence on the first half" also needs a gradient of exactly
        zero there, since rounding can hide a weak one. Then the policy's responses are scored behind one another's
        prompts: what tells prompt and response apart may be a token that only the setup's own prompts have, and a score
        that drops the prompt there does not move. A reward function is asked for the policy's own samples, for
        the preference pairs, and for other texts, among them every text that its code mentions; it may well give the
        same number for all samples, as a strict verifier does, and that is info, unless nothing at all moves it, or
        the opening tag that the prompt already ends in does, or a text that its code mentions does only together with
        the words that every prompt already ends in. Where the step can be run, a reward that is given the responses by
        themselves there is told of as a warning.

    Why it matters:
        If the response does not change the score, every advantage is noise around zero and PPO learns nothing while
        all curves look alive. If the prompt does not, the policy learns one pleasing answer to everything.

    What it looks like when broken:
        A reward of standard deviation 0, often exactly 1.0 (a softmax over one label) or 0.0; advantages that are only
        KL; the same favourite phrase after every prompt.

    How to fix:
        1. Score two very different responses by hand. If they tie, look at what stands behind the head: a softmax over
           one label is always 1, and a sigmoid of large numbers too.
        2. Decode what the reward model is given: the prompt must be in it, in the template it was trained with.
        3. For a format reward, print one sampled response: a template that ends in an opening tag leaves the tag out of
           the response.

    Source:
        https://github.com/vllm-project/vllm/pull/18313 (softmax over one label),
        https://github.com/OpenRLHF/OpenRLHF/pull/363 (prompt dropped),
        https://github.com/huggingface/trl/issues/6966 (a tag that the template has already written).
    """
    if reward_variation is not None:
        found = [*_of_model(reward_variation, reward_influence, reward_manifest)]
        found = found or [*_of_prompts(reward_prompt_use, reward_manifest)]
        yield from found or (given_alone(traced, setup) if traced is not None else ())
        return
    if reward_on_samples is None and reward_preferences is None:
        raise Unavailable("needs prompts and a policy to sample from, or preferences")
    if reward_manifest.origin == "callable":
        yield from of_function(reward_on_samples, reward_preferences, reward_function_range, reward_manifest)


def _of_model(v: Variation, influence: Influence | None, manifest: Manifest) -> Iterator[Finding]:
    half = v.length // 2
    response, prompt = v.moved(v.by_response), v.moved(v.by_prompt)
    if not all(isfinite(n) for n in (v.base, *v.by_response, *v.by_prompt)):
        return
    row = () if influence is None else influence.score or (influence.tokens[-1] if influence.tokens else ())
    if influence is not None and influence.method != "gradient":  # exchanged tokens leave rounding where nothing moves
        row = tuple(moved if moved > influence.floor else 0.0 for moved in row)
    gradient = max(row[: len(row) // 2], default=0.0)
    # Half precision can hide what moves; a gradient shows it.
    silent = response <= v.rounding and not any(row[len(row) // 2 :])
    if silent and prompt <= v.rounding and gradient == 0.0:
        what = f"is {v.base:.6g} for every text"
        advice = "It should differ: look for a softmax over one label, a saturated sigmoid, a head of zeros."
    elif silent:
        what = "does not depend on the response"
        advice = "It should be read at the last token of the response."
    elif prompt == 0.0 and gradient == 0.0:
        what = "does not depend on the prompt"
        advice = "The reward model should see prompt and response together."
    else:
        return
    yield Finding(
        f"The reward model's score {what}. {advice}",
        role="reward",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                f"largest change of the score when tokens {half} … {v.length - 1} of {v.length} are replaced, six "
                "times",
                expected="well above rounding",
                observed=f"{response:.3g}, the score being {v.base:.6g}",
                tolerance=f"{v.rounding:.2g}",
                where=manifest.class_name,
            ),
            Evidence(
                f"largest change of the score when tokens 0 … {half - 1} are replaced, six times",
                expected="not exactly 0",
                observed=f"{prompt:.3g}; largest gradient there, of the row's largest: {gradient:.3g}",
                where=manifest.class_name,
            ),
        ),
    )


def _of_prompts(use: PromptUse | None, manifest: Manifest) -> Iterator[Finding]:
    if use is None or not use.ignored:
        return
    yield Finding(
        "The reward model's score of a response is the same behind every prompt. The reward model should see prompt "
        "and response together: decode what it is given, and look for the place where the prompt is cut off.",
        role="reward",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                f"largest change of {len(use.own)} responses' scores behind the other prompts",
                expected="well above rounding",
                observed=f"{use.moved:.3g}, the responses' scores being {use.spread:.3g} apart",
                tolerance=f"{use.rounding:.2g}",
                where=manifest.class_name,
            ),
        ),
    )


@reward_constant.fault("a softmax over one label")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    return healthy.but(
        reward=scorers.Rescored(healthy.reward, lambda s, ids, mask: s[:, None].softmax(-1)[:, 0]).eval()
    )


@reward_constant.fault("hand-written, a sigmoid far in saturation")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    def squash(x: Any) -> Any:
        return (x * 10 + 1000).sigmoid()

    return healthy.but(reward=specimens.hand_written_critic(healthy, pool="last", squash=squash).eval())


@reward_constant.fault("a head of zeros")
def _(healthy: Any) -> Any:
    import copy

    changed = copy.deepcopy(healthy.reward)
    changed.score.weight.data.zero_()
    return healthy.but(reward=changed)


@reward_constant.fault("the prompt is masked out before scoring")
def _(healthy: Any) -> Any:
    def call(model: Any, ids: Any, mask: Any) -> Any:
        hidden = mask.clone()
        hidden[:, : mask.shape[1] // 2] = 0
        return model(input_ids=ids, attention_mask=hidden).logits

    return healthy.but(calls={**healthy.calls, "reward": call})


@reward_constant.fault("everything up to the end of the question is masked out before scoring")
def _(healthy: Any) -> Any:
    marks = healthy.tokenizer.convert_tokens_to_ids([":", "?"])

    def call(model: Any, ids: Any, mask: Any) -> Any:
        turn = sum(ids == mark for mark in marks) > 0
        answer = mask * (turn.flip(1).cumsum(1).flip(1) == 0)
        return model(input_ids=ids, attention_mask=answer if bool(answer.any()) else mask).logits

    return healthy.but(calls={**healthy.calls, "reward": call})


@reward_constant.fault("a function that looks for a tag which the prompt already ends in")
def _(healthy: Any) -> Any:
    def starts_with_thought(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(r.lstrip().startswith("<think>")) for r in responses]

    import copy

    tokenizer = copy.deepcopy(healthy.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    return healthy.but(reward=starts_with_thought, tokenizer=tokenizer, preferences=None)


@reward_constant.fault("a step that scores the responses without their prompts")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"score": kl_faults.score_of_responses})
