"""Sound setups that differ in every way that sound setups do: nothing may be said of them but what is worth knowing.

Those with a ``thread`` are what users took for a bug and was none: an info must explain them, never a warning. A setup
takes what it starts from by name, like a case, and ``seed`` where its weights can be drawn anew.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zoo
from foreign import folders, plain
from loops.examined import NEEDS, STYLES, built
from loops.grpo_groups import RELATIVES

from rlhf_doctor.selftest import group_loop, kl_faults
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup

Fields = dict[str, Any]


@dataclass(frozen=True)
class Sound:
    """A sound setup; ``thread`` says where it was taken for a bug, and ``explained`` which codes may explain it."""

    name: str
    build: Callable[..., Any]
    thread: str = ""
    explained: tuple[str, ...] = ()

    def setup(self, given: Mapping[str, Any], seed: int) -> RLHFSetup:
        """The setup, made from what ``build`` asks for by name."""
        wanted = inspect.signature(self.build).parameters
        made = self.build(**{name: seed if name == "seed" else given[name] for name in wanted})
        return made if isinstance(made, RLHFSetup) else RLHFSetup.from_mapping(made, origin=self.name)


ZOO: dict[str, Sound] = {}


def add(name: str, build: Callable[..., Any], thread: str = "", explained: str = "") -> None:
    """One more sound setup."""
    assert name not in ZOO, name
    ZOO[name] = Sound(name, build, thread, tuple(explained.split()))


def sound(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a sound setup."""

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        add(name, build)
        return build

    return register


def normal(name: str, thread: str, explained: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what users took for a bug and was none; one of these codes must explain it."""

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        add(name, build, thread, explained)
        return build

    return register


# ---- models alone ----------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "llama, four models apart": {"family": "llama"},
    "gpt2, v_head, right padding": {"family": "gpt2", "head": "v_head", "side": "right"},
    "neox, bfloat16": {"family": "neox", "dtype": torch.bfloat16},
    "qwen2, LoRA with its adapter off as reference": {"family": "qwen2", "lora": True},
    "mixture of experts, value_head": {"family": "moe", "head": "value_head"},
    "llama, policy and critic in one module": {"family": "llama", "head": "v_head", "shared": True},
    "gpt2, eager attention": {"family": "gpt2", "attention": "eager"},
    "qwen2, bfloat16, LoRA, value_head": {
        "family": "qwen2", "dtype": torch.bfloat16, "lora": True, "head": "value_head",
    },
    "llama, right padding, bfloat16": {"family": "llama", "side": "right", "dtype": torch.bfloat16},
}  # fmt: skip
for _name, _options in LAYOUTS.items():
    add(_name, functools.partial(lambda options, seed: zoo.healthy_setup(**options, seed=10 * seed), _options))


def unique_words(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """A reward that is a function of texts."""
    return [float(len(set(text.split()))) for text in completions]


@sound("GRPO without a critic, reward a function of texts")
def critic_free(seed: int) -> RLHFSetup:
    made = zoo.healthy_setup("qwen2", seed=10 * seed).but(value=None, reward=unique_words)
    return made.but(declared={"algorithm": "grpo", "kl_coef": 0.0, "lam": None, "group_size": 8})


@sound("RLOO without a critic, reward model")
def leave_one_out(seed: int) -> RLHFSetup:
    made = zoo.healthy_setup("llama", seed=10 * seed).but(value=None)
    return made.but(declared={"algorithm": "rloo", "kl_coef": 0.05, "lam": None, "group_size": 4})


for _build, _code, _ in folders.CASES.values():
    if _code is None:
        add(
            f"folders: {_build.__name__.replace('_', ' ')}",
            functools.partial(lambda build, tmp_path: build(tmp_path), _build),
        )
for _build, _code, _ in plain.CASES.values():
    if _code is None:
        add(f"plain modules: {_build.__name__.replace('_', ' ')}", _build)


@sound("the reference, saved as folders")
def saved(healthy_files: RLHFSetup) -> RLHFSetup:
    return healthy_files.but(tokenizer=None)


# ---- with a training step --------------------------------------------------------------------------------------------


@sound("the reference, as it is")
def whole(healthy: RLHFSetup) -> RLHFSetup:
    return healthy


SETTINGS: dict[str, dict[str, Any]] = {
    "no whitening": {"whiten_advantages": False},
    "whitened rewards too": {"whiten_rewards": True},
    "gamma below 1, lambda 1": {"gamma": 0.97, "lam": 1.0},
    "temperature 0.7": {"temperature": 0.7},
    "micro-batches": {"micro_batch_size": 3},
    "four epochs, one minibatch": {"ppo_epochs": 4, "num_minibatches": 1},
    "no penalty for a missing end": {"missing_eos_penalty": 0.0},
    "a small KL": {"kl_coef": 0.001},
    "bfloat16 products": {"dtype": "bfloat16"},
}
for _name, _options in SETTINGS.items():
    add(
        f"the reference: {_name}",
        functools.partial(lambda options, healthy: reference_step(healthy, settings=options), _options),
    )


@sound("the reference: k3 in the loss")
def kl_in_the_loss(healthy: RLHFSetup) -> RLHFSetup:
    return kl_faults.with_kl_in_the_loss(healthy, "k3", declared="k3")


@sound("the reference: adaptive KL coefficient")
def adaptive(healthy: RLHFSetup) -> RLHFSetup:
    return reference_step(healthy, control=kl_faults.controller())


@sound("the reference: rewards normalised in the step")
def normalised(healthy: RLHFSetup) -> RLHFSetup:
    from reference_impl import rollout

    def score(*arguments: Any, **options: Any) -> torch.Tensor:
        scores = rollout.score(*arguments, **options)
        return (scores - scores.mean()) / (scores.std() + 1e-8)

    return reference_step(healthy, parts={"score": score}, settings={"missing_eos_penalty": 0.0})


@sound("GRPO, groups of the reference")
def groups(healthy: RLHFSetup) -> RLHFSetup:
    return group_loop.setup(healthy, group_loop.own_group)


@sound("RLOO, groups of the reference")
def others_mean(healthy: RLHFSetup) -> RLHFSetup:
    def relative(scores: torch.Tensor) -> torch.Tensor:
        grouped = scores.view(group_loop.PROMPTS, group_loop.SIZE)
        mean = (grouped.sum(1, keepdim=True) - grouped) / (group_loop.SIZE - 1)
        return (grouped - mean).flatten()

    made = group_loop.setup(healthy, relative)
    return made.but(declared={**made.declared, "algorithm": "rloo"})


for _style in STYLES:
    if _style not in NEEDS or _style == "lora_adapter_off":
        add(f"loop {_style}", functools.partial(lambda style: built(style), _style))
add("loop plain_modules, reward a function of texts", lambda: built("plain_modules", reward="texts"))
add("loop micro_batches, cut texts left out of the losses", lambda: built("micro_batches", leave_cut_out=True))
add(
    "loop micro_batches, Huber's loss for the critic",
    lambda: built("micro_batches", error=functools.partial(torch.nn.functional.huber_loss, delta=0.5)),
)
for _name in RELATIVES:
    if _name:
        add(
            f"loop grpo_groups, {_name}",
            functools.partial(lambda name: built("grpo_groups", relative_of=name), _name),
        )
for _average in ("seq-mean", "token-mean"):
    add(
        f"loop grpo_groups, cut texts left out of the loss, {_average}",
        functools.partial(lambda average: built("grpo_groups", leave_cut_out=True, average=average), _average),
    )


# ---- taken for bugs, and none ----------------------------------------------------------------------------------------


@normal("one update a rollout: the clip never acts", "https://github.com/huggingface/trl/issues/3757", "LOS002")
def one_update(healthy: RLHFSetup) -> RLHFSetup:
    return reference_step(healthy, settings={"ppo_epochs": 1, "num_minibatches": 1})


@normal("no KL and no reference", "https://github.com/huggingface/trl/issues/4040", "KLD001")
def no_reference(seed: int) -> RLHFSetup:
    made = zoo.healthy_setup("qwen2", seed=10 * seed).but(value=None, reference=None)
    return made.but(declared={"algorithm": "grpo", "kl_coef": 0.0, "lam": None, "group_size": 8})


@normal("score one slot after the end", "https://github.com/huggingface/trl/issues/3750", "ADV002")
def one_slot_later(healthy: RLHFSetup) -> RLHFSetup:
    from reference_impl import ops

    def gae(r: Any, v: Any, mask: Any, gamma: float, lam: float) -> Any:
        wide = mask | torch.nn.functional.pad(mask[:, :-1], (1, 0))
        last, rows, moved = mask.sum(1) - 1, torch.arange(len(r)), r.clone()
        short = last + 1 < r.shape[1]
        moved[rows[short], last[short] + 1] = moved[rows[short], last[short]]
        moved[rows[short], last[short]] = 0
        return ops.gae(moved, v, wide, gamma, lam).masked_fill(~mask, 0)

    return reference_step(healthy, parts={"gae": gae})


@normal(
    "reward read at the last column of left-padded rows",
    "https://github.com/hiyouga/LlamaFactory/issues/191",
    "REW004 REW005",
)
def last_column(seed: int) -> RLHFSetup:
    made = zoo.healthy_setup("llama", seed=10 * seed)

    class LastColumn(torch.nn.Module):
        def __init__(self, classifier: Any) -> None:
            super().__init__()
            self.body, self.score = classifier.model, classifier.score
            self.config = classifier.config

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            hidden = self.body(input_ids=input_ids, attention_mask=attention_mask, position_ids=places)
            return self.score(hidden.last_hidden_state[:, -1])[:, 0]  # type: ignore[no-any-return]

    return made.but(reward=LastColumn(made.reward).eval().requires_grad_(False))


@normal("value loss moves a shared trunk", "https://github.com/huggingface/trl/issues/1108", "VAL012 SYS008 SYS003")
def shared_trunk() -> RLHFSetup:
    return built("joined_v_head")


@normal("fresh head of the critic", "https://github.com/Jiayi-Pan/TinyZero/issues/90", "VAL007")
def fresh_head(tmp_path: Path) -> Fields:
    made = folders.healthy(tmp_path)
    return {**made, "value": made["policy"], "declared": {**made["declared"], "value_init": "policy"}}


@normal("mean of the raw scores far from 0", "https://github.com/PKU-Alignment/safe-rlhf/issues/133", "REW010")
def offset(healthy: RLHFSetup) -> RLHFSetup:
    reward = copy.deepcopy(healthy.reward)
    head = torch.nn.Linear(reward.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(reward.score.weight)
        head.bias.fill_(3.0)
    reward.score = head
    return reference_step(healthy, reward=reward.requires_grad_(False).eval())


@normal(
    "reward model with a tokenizer of its own", "https://github.com/PKU-Alignment/safe-rlhf/issues/55", "SYS005 SYS004"
)
def own_tokenizer(seed: int) -> RLHFSetup:
    made = zoo.healthy_setup("llama", seed=10 * seed)
    other = zoo.tokenizer()
    other.add_tokens(["t1000", "t1001"])
    reward = zoo.decoder("qwen2", "sequence", seed=10 * seed + 1)
    reward.resize_token_embeddings(len(other))
    return made.but(reward=reward.requires_grad_(False), reward_tokenizer=other)


@normal("first update at a rate of 0", "https://github.com/verl-project/verl/issues/3674", "OPT005")
def warm_up(healthy: RLHFSetup) -> RLHFSetup:
    from reference_impl import ppo

    made = reference_step(healthy)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda n: min(1.0, n / 10)) for o in made.optimizers]
    step = made.step
    assert step is not None

    def scheduled() -> Any:
        found = step()
        for schedule in schedules:
            schedule.step()
        return found

    assert ppo
    return made.but(step=scheduled, state=[*made.state, *schedules])


@normal(
    "another reference by choice, in a second stage", "https://github.com/modelscope/ms-swift/issues/6910", "REF002"
)
def second_stage(tmp_path: Path) -> Fields:
    made = folders.healthy(tmp_path)
    other = folders.saved(zoo.decoder("qwen2", seed=4), tmp_path / "first-stage")
    return {**made, "reference": other, "declared": {**made["declared"], "reference": other}}


@normal("generation past the end, cut afterwards", "https://github.com/huggingface/trl/issues/2387", "TOK003 ROL005")
def past_the_end(tmp_path: Path) -> Fields:
    made = folders.healthy(tmp_path)
    folders.edit(made["policy"], "generation_config.json", eos_token_id="<drop>")
    return made


@normal("models in eval() during the update", "https://github.com/huggingface/trl/issues/1066", "POL008")
def eval_mode(healthy: RLHFSetup) -> RLHFSetup:
    policy = copy.deepcopy(healthy.policy)
    for layer in policy.model.layers:
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.1))
    reference = copy.deepcopy(policy).requires_grad_(False)
    return reference_step(healthy, policy=policy.eval(), reference=reference.eval())
