"""REW010: the scores are on a scale that PPO's other numbers fit."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.on_samples import OnSamples
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.score_statistics import ScoreStatistics

# Standard deviations of a model's scores, and of a function's, whose author chose the scale.
WIDE, NARROW = 5.0, 1e-3
WIDE_FUNCTION, NARROW_FUNCTION = 100.0, 1e-4
FEWEST = 8
DOES_NOTHING = "it would subtract 0 and divide by 1"
SCALE_FREE = ("grpo", "dapo", "gspo")


@check(
    "REW010",
    "the scores are on a scale that PPO's other numbers fit",
    stage=Stage.PROBE,
    severity=Severity.WARNING,
    after=("REW003", "REW006", "PRE004"),
)
def reward_scale(
    reward_manifest: Manifest,
    setup: Any,
    reward_on_samples: OnSamples | None = None,
    reward_score_statistics: ScoreStatistics | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The scores of responses sampled from the policy before any update: their standard deviation, the share that a
        declared ``reward_clip`` would cut, and their mean. And whether a normalisation that is switched on can act: in
        the reward's config, or in the module itself, ``normalize_reward`` with mean 0 and std 1 changes nothing, and
        with a reward function in place of the model it is never reached. A mean far from 0 alone is normal, the
        pairwise loss leaves it free, and is info. So is any scale where the algorithm divides by the group's spread or
        the loop whitens rewards.

    Why it matters:
        Clip ranges, the KL coefficient and the value loss were tuned for scores of about mean 0 and standard deviation
        1. Scores a thousand times smaller are drowned by the KL penalty, scores of 60 make it irrelevant and the value
        loss explode, and a clip at 5 gives all scores around 50 the same value.

    What it looks like when broken:
        No learning while the KL shrinks; or a KL that runs away in the first steps; a reward that sits exactly at the
        clip.

    How to fix:
        1. Score some hundred samples of the reference, and fold gain and bias into the head: (score - mean) / std.
        2. Write mean and std where the loader reads them, where normalisation is done by it.
        3. Else scale in the loop, and set the clip after scaling.

    Source:
        Huang et al. 2024, "The N Implementation Details of RLHF with PPO",
        https://iclr-blogposts.github.io/2024/blog/the-n-implementation-details-of-rlhf-with-ppo/ (mean 0, deviation 1
        on samples of the reference); https://github.com/huggingface/trl/issues/860 (scores of 60 to 70, and of 1e-4),
        https://github.com/OpenRLHF/OpenRLHF/issues/693 and https://github.com/OpenRLHF/OpenRLHF/issues/822
        (normalisation without effect), https://github.com/PKU-Alignment/safe-rlhf/issues/133 (offset). The limits are
        wide on purpose, the recipe itself asks for 0.3 to 3: above 5 a single deviation passes the usual reward clip of
        5 and weighs as much as 100 nats of KL at the usual coefficient of 0.05; below 0.001 it is less than what that
        coefficient makes of 0.02 nats.
    """
    inert = [*_normalisation(reward_manifest, setup, reward_on_samples, reward_score_statistics)]
    yield from inert
    s = reward_on_samples
    if inert or s is None or len(s.numbers) < FEWEST or not all(isfinite(n) for n in s.numbers) or s.std == 0:
        return
    function = reward_manifest.origin == "callable"
    wide, narrow = (WIDE_FUNCTION, NARROW_FUNCTION) if function else (WIDE, NARROW)
    clip = setup.declared.get("reward_clip")
    limit = float(clip) if isinstance(clip, (int, float)) and not isinstance(clip, bool) and clip > 0 else None
    cut = sum(abs(n) >= limit for n in s.numbers) / len(s.numbers) if limit else 0.0
    adapts = setup.declared.get("algorithm") in SCALE_FREE or bool(setup.declared.get("whiten_rewards"))
    evidence = Evidence(
        "scores of the policy's samples",
        expected="mean about 0, standard deviation about 1",
        observed=(
            f"mean {s.mean:.4g}, standard deviation {s.std:.4g}, from {min(s.numbers):.4g} to {max(s.numbers):.4g}"
        ),
        tolerance=f"standard deviation {narrow:g} to {wide:g}",
        where=f"{len(s.numbers)} samples at temperature 1",
    )
    if limit and cut >= 0.5:
        yield Finding(
            f"{cut:.0%} of the scores lie beyond the declared reward clip of ±{limit:g} and become the same number. "
            "Scale or centre the scores first, then clip.",
            role="reward",
            confidence=Confidence.MEASURED,
            evidence=(evidence, Evidence("share of scores that the clip cuts", "a few percent", f"{cut:.2f}")),
        )
    elif not narrow <= s.std <= wide:
        yield Finding(
            f"The scores of the policy's samples have a standard deviation of {s.std:.3g}, "
            f"{'far above' if s.std > wide else 'far below'} 1. Scale them so that it is about 1, or every other "
            "coefficient has another meaning than it was tuned for.",
            role="reward",
            confidence=Confidence.MEASURED,
            severity=Severity.INFO if adapts else None,
            evidence=(evidence,),
        )
    elif abs(s.mean) > max(3 * s.std, 3.0) and not function:
        yield Finding(
            f"The mean score is {s.mean:.3g}, far from 0. That is normal: the pairwise loss leaves the offset free. "
            "Subtract it before PPO, so that the critic need not learn it and no clip cuts it.",
            role="reward",
            confidence=Confidence.MEASURED,
            severity=Severity.INFO,
            evidence=(evidence,),
        )


def _normalisation(
    manifest: Manifest, setup: Any, samples: OnSamples | None, kept: ScoreStatistics | None
) -> Iterator[Finding]:
    """A normalisation that is switched on and cannot act."""
    asked = bool(setup.declared.get("normalize_reward"))
    if manifest.origin == "callable":
        if asked:
            yield _inert("the reward is a function, which it never reaches", "declared normalize_reward", "a function")
        return
    if samples is not None and samples.numbers and abs(samples.mean) < 1 and 0.3 < samples.std < 3:
        return  # the scores have been normalised another way
    if kept is not None and (kept.on or (asked and not kept.switch)):
        if kept.inert:
            told = f"{kept.names[0]} {kept.mean:g}, {kept.names[1]} {kept.spread:g}"
            where = f"{kept.switch} is True" if kept.switch else "declared normalize_reward"
            yield _inert(DOES_NOTHING, "mean and spread that the reward keeps", told, where)
        return
    config = manifest.raw_config
    if not (config.get("normalize_reward") or (asked and "normalize_reward" not in config)):
        return
    mean, std = (_number(config.get(name)) for name in ("mean", "std"))
    if mean not in (None, 0.0) or std not in (None, 1.0):
        return
    told = ", ".join(f"{n} {'absent' if v is None else v}" for n, v in (("mean", mean), ("std", std)))
    yield _inert(DOES_NOTHING, "mean and std in the reward's config", told, manifest.path or "")


def _number(value: Any) -> float | None:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _inert(why: str, quantity: str, observed: str, where: str = "") -> Finding:
    return Finding(
        f"Reward normalisation is switched on and does nothing: {why}. Measure mean and standard deviation of the "
        "scores on samples and store them where the normalisation reads them, or normalise in the loop.",
        role="reward",
        confidence=Confidence.PROVEN,
        evidence=(Evidence(quantity, "mean and standard deviation of real scores", observed, where=where),),
    )


@reward_scale.fault("scores a thousand times too large")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    return healthy.but(reward=scorers.Rescored(healthy.reward, lambda s, ids, mask: 1000 * s).eval())


@reward_scale.fault("scores ten thousand times too small")
def _(healthy: Any) -> Any:
    import copy

    changed = copy.deepcopy(healthy.reward)
    changed.score.weight.data.mul_(1e-4)
    return healthy.but(reward=changed)


@reward_scale.fault("an offset of 50 under a clip of 5")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    reward = scorers.Rescored(healthy.reward, lambda s, ids, mask: s + 50).eval()
    return healthy.but(reward=reward, declared={"reward_clip": 5.0})


@reward_scale.fault("a checkpoint that normalises with mean 0 and std 1")
def _(healthy_files: Any) -> Any:
    from rlhf_doctor.selftest.folders import rewrite_config, rewrite_tensors

    folder = healthy_files.path("reward")
    rewrite_config(folder, {"normalize_reward": True, "mean": 0.0, "std": 1.0})
    rewrite_tensors(folder, lambda tensors: tensors["score.weight"].mul_(8.0))
    return healthy_files
