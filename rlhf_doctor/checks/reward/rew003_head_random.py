"""REW003: the reward model's head is the one that was trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.heads import absent_head, new_heads, renamed_head
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Loading, Manifest
from rlhf_doctor.instruments.stored_head import StoredHead


@check(
    "REW003",
    "the reward model's head is the one that was trained",
    stage=Stage.STATIC,
    severity=Severity.ERROR,
    after=("SYS002",),
    explains=("SYS007", "REW007", "REW009", "REW010", "REW012", "REW013"),
)
def reward_head_random(
    reward_manifest: Manifest,
    setup: Any,
    reward_loading: Loading | None = None,
    reward_stored_head: StoredHead | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        For a checkpoint folder: whether its tensors hold a head of one output, under the name that the loader of its
        class looks for, an adapter's own tensors included; with the probe also what the loader reported as newly
        initialised. For a model in memory that names the folder it came from: whether its head is the one in that
        folder, while its body is. Nothing is concluded from the look of the numbers. Where reward training is being
        examined, a new head is normal.

    Why it matters:
        The head turns the last hidden state into the score. A loader that does not find it makes a new random one and
        says so in a single warning. The scores then look like scores, differ between texts, and mean nothing: PPO
        climbs in a random direction, and every new process climbs in another one.

    What it looks like when broken:
        "Some weights were not initialized ... newly initialized: ['score.weight']" in the log; accuracy on the
        reward's own training pairs near 50%; other scores after every restart.

    How to fix:
        1. Look at the names: `python -c "from safetensors import safe_open as o; print([*o('model.safetensors',
           'pt').keys()][-3:])"` in the reward's folder; the head is a tensor of shape (1, hidden size).
        2. With LoRA list the head in modules_to_save (task_type SEQ_CLS does it), and do not merge a reward adapter
           into a causal language model.
        3. Where the head has another name than the class expects, rename the tensor or set the loader's option for it
           (OpenRLHF: value_head_prefix).
        4. Treat "newly initialized" for the reward as an error in PPO.

    Source:
        https://github.com/huggingface/trl/issues/1379 (head not saved), https://github.com/OpenRLHF/OpenRLHF/issues/428
        (head under another name), https://github.com/modelscope/ms-swift/issues/9239 (head made anew after loading),
        https://github.com/huggingface/peft/issues/577 (adapter without its head),
        https://github.com/deepspeedai/DeepSpeedExamples/issues/808 (another score on every run).
    """
    if setup.reward_loss is not None and setup.step is None:
        return  # reward training is what is examined: its head starts new
    found = renamed_head(reward_manifest) or absent_head(reward_manifest)
    if found is not None:
        problem, evidence = found
        yield Finding(
            f"The reward model's checkpoint {problem}, so the loader makes a new random head and the scores mean "
            "nothing. It should hold the head that was trained: save it again with its head, under the name that its "
            "class reads.",
            role="reward",
            confidence=Confidence.PROVEN,
            evidence=(evidence,),
        )
    elif reward_loading is not None and (lost := new_heads(reward_loading, reward_manifest)):
        yield Finding(
            f"The reward model's head was newly initialised when its checkpoint was loaded ({', '.join(lost)}): the "
            "scores are random. It should be restored from the checkpoint.",
            role="reward",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence(
                    "parameters that loading had to make up",
                    expected="none",
                    observed=", ".join(reward_loading.missing[:6]),
                    where=f"{reward_manifest.path}; built as {reward_loading.built}",
                ),
            ),
        )
    elif reward_stored_head is not None and reward_stored_head.replaced:
        s = reward_stored_head
        yield Finding(
            f"The reward model came from {s.folder} and its body is the one stored there, but its head is not: it was "
            "made anew after loading. It should be the stored head, unless the head alone was trained since.",
            role="reward",
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    "cosine between the head in memory and the head on disk",
                    expected="1",
                    observed=f"{s.head_cosine:.4f} (body: {s.body_cosine:.4f})",
                    tolerance="0.9",
                    where=f"{s.name} in {s.folder}",
                ),
            ),
        )


@reward_head_random.fault("the checkpoint lacks its head")
def _(healthy_files: Any) -> Any:
    from rlhf_doctor.selftest.folders import rewrite_tensors

    rewrite_tensors(healthy_files.path("reward"), lambda tensors: tensors.pop("score.weight"))
    return healthy_files


@reward_head_random.fault("the head is stored under a name that the class does not read")
def _(healthy_files: Any) -> Any:
    from rlhf_doctor.selftest.folders import rewrite_tensors

    rewrite_tensors(
        healthy_files.path("reward"), lambda tensors: tensors.update({"v_head.weight": tensors.pop("score.weight")})
    )
    return healthy_files


@reward_head_random.fault("a backbone alone: no class with a head, no head")
def _(healthy_files: Any) -> Any:
    from rlhf_doctor.selftest.folders import rewrite_config, rewrite_tensors

    rewrite_tensors(healthy_files.path("reward"), lambda tensors: tensors.pop("score.weight"))
    rewrite_config(healthy_files.path("reward"), {"architectures": ["LlamaModel"]})
    return healthy_files


@reward_head_random.fault("the head is made anew after the model was loaded")
def _(healthy_files: Any) -> Any:
    import transformers

    from rlhf_doctor.selftest.scorers import with_new_head

    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(healthy_files.path("reward"))
    return healthy_files.but(reward=with_new_head(loaded.eval().requires_grad_(False)))
