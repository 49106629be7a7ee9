"""Bugs of the reward model: where it is read, what it depends on, its scale, its precision and its own training."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
import zoo
from foreign import folders, plain
from loops import plain_modules
from torch import Tensor, nn

from corpus.case import case, shipped
from reference_impl import roles, task
from rlhf_doctor.check import registry
from rlhf_doctor.selftest.policies import alone
from rlhf_doctor.selftest.reward_losses import pairwise
from rlhf_doctor.selftest.scorers import Reader, Rescored, last_real
from rlhf_doctor.setups import RLHFSetup

Pairs = list[tuple[str, str, str]]
TURN = 5  # a token of the plain setup's that ends a prompt


def at_rest(bug: str, code: str, title: str, *, roles: str) -> None:
    """Register a fault that a check ships with, without the reference's loop, whose optimizers know other models."""
    fault = next(one for one in registry()[code].faults if one.title == title)

    @functools.wraps(fault.make)
    def build(**given: Any) -> RLHFSetup:
        return alone(fault.make(**given))  # type: ignore[no-any-return]

    build.__doc__ = title
    case(bug, "the reference", roles=roles, also=code)(build)


class Reread(plain.Scorer):
    """A plain scorer read by a rule of its own: (scores (B, T), tokens, mask) -> (B,)."""

    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.rule(self.to_score(self.body(tokens, mask))[..., 0], tokens, mask)


def frozen(model: nn.Module) -> nn.Module:
    """As a reward model should be."""
    return model.eval().requires_grad_(False)


def peak(model: nn.Module, layer: nn.Module, height: float = 2e5) -> None:
    """Scale a layer so that its activations pass float16's largest number, as in models trained in bfloat16."""
    seen: list[float] = []
    hook = layer.register_forward_hook(lambda _, args, out: seen.append(float(out.abs().max())))
    ids = torch.randint(4, 60, (4, 8))
    with torch.no_grad():
        model(ids, torch.ones_like(ids))
        layer.weight *= height / max(seen)  # type: ignore[operator]
    hook.remove()


def loud(family: str, kind: str) -> Any:
    """A Llama or Qwen in bfloat16 with activations of 2e5 in its first block, of weights that float16 can hold."""
    model = zoo.decoder(family, kind, seed=1)
    with torch.no_grad():
        model.base_model.layers[0].mlp.up_proj.weight *= 1e3
    peak(model, model.base_model.layers[0].mlp.down_proj)
    return model.bfloat16()


def ranked(
    prompts: Sequence[str], words: Sequence[str], *scores: Callable[[str, str], float], count: int = 64
) -> Pairs:
    """Pairs of random responses of one length, the chosen one better by each of ``scores``."""
    rng, pairs = Random(5), Pairs()
    while len(pairs) < count:
        prompt, length = prompts[len(pairs) % len(prompts)], rng.randint(3, 7)
        one, other = (" ".join(rng.choices(words, k=length)) for _ in range(2))
        better = [score(prompt, one) > score(prompt, other) for score in scores]
        if all(better):
            pairs.append((prompt, one, other))
    return pairs


def paired_zoo(family: str) -> RLHFSetup:
    """A setup of the zoo with preferences that its reward model has learnt by heart, with EOS and without."""
    setup = zoo.healthy_setup(family)

    @torch.no_grad()
    def score(text: str) -> float:
        batch = setup.tokenizer(text, return_tensors="pt")
        return float(setup.reward(batch["input_ids"], batch["attention_mask"]).logits)

    words = [f"t{i}" for i in range(4, zoo.VOCAB)]
    ended, cut = (lambda p, r: score(f"{p} {r} <eos>")), (lambda p, r: score(f"{p} {r}"))
    return setup.but(preferences=ranked(list(setup.prompts or ()), words, ended, cut, count=32))


def texts(reward: Callable[[list[str], list[str]], list[Any]]) -> RLHFSetup:
    """Plain modules with a reward function of texts, and preferences that ``taste`` agrees with; no loop."""
    fields = plain_modules.build(reward="texts")
    pairs = ranked(plain_modules.PROMPTS, plain_modules.WORDS, lambda p, r: plain_modules.taste([p], [r])[0])
    return RLHFSetup.from_mapping({**fields, "reward": reward, "preferences": pairs, "step": None, "state": ()})


def before_first(token: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Read before the first of these tokens in the row, at the row's end where there is none."""

    def rule(scores: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        hit = ids == token
        at = torch.where(hit.any(1), hit.int().argmax(1) - 1, ids.shape[1] - 1).clamp(min=0)
        return scores[torch.arange(len(ids)), at]

    return rule


# ---- where it is read ----

at_rest("TRL-029", "REW004", "read at the first end of sequence, also inside the prompt", roles="reward")


@case("TRL-029", "a Llama", roles="reward")
def first_pad_is_in_the_prompt() -> RLHFSetup:
    """The score is read before the first pad, pad is EOS, and the prompts' turns end in EOS."""
    tokenizer = zoo.tokenizer("right")
    tokenizer.pad_token = tokenizer.eos_token
    setup = zoo.healthy_setup("llama")
    for model in (setup.policy, setup.reference, setup.reward, setup.value):
        model.config.pad_token_id = tokenizer.eos_token_id
    setup.policy.generation_config.pad_token_id = tokenizer.eos_token_id
    tokenizer.padding_side = "left"
    turns = [f"t{i} t{i + 1} <eos> t{i + 2} t{i + 7}" for i in range(10, 20)]
    reward = frozen(Reader(setup.reward, before_first(tokenizer.eos_token_id)))
    return setup.but(tokenizer=tokenizer, prompts=turns, reward=reward)


at_rest("TRL-030", "REW004", "left-padded rows, read at the number of real tokens less one", roles="reward")


@case("TRL-030", "plain modules", roles="reward")
def counted_from_the_left() -> dict[str, Any]:
    """The scorer reads at the number of real tokens less one while prompts are padded on the left."""
    made = plain.healthy(reward=frozen(plain.Scorer("count")))
    made["prompts"]["attention_mask"][:2, :3] = 0
    return made


def one_pad_skipped(scores: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Read before the second pad of each row, or at the row's end."""
    pads = ids == plain.PAD
    second = (pads.cumsum(1) == 2) & pads
    at = torch.where(second.any(1), second.int().argmax(1), ids.shape[1]) - 1
    return scores[torch.arange(len(ids)), at]


@case("ORL-032", "plain modules", roles="reward", stage="probe")
def leading_pad_expected() -> dict[str, Any]:
    """The search for the end skips one pad, as OPT's tokenizer needs it, on rows that do not start with one."""
    return plain.healthy(reward=frozen(Reread(one_pad_skipped)))


@case("ORL-032", "the reference", roles="reward", stage="probe")
def leading_pad_expected_of_a_llama(healthy: RLHFSetup) -> RLHFSetup:
    """A reward that reads one pad later than the end, since it takes the first pad for a beginning of sequence."""
    return alone(healthy, reward=frozen(Reader(healthy.reward, one_pad_skipped)))


at_rest("VRL-004", "REW004", "read one past the last real token", roles="reward")


@case("VRL-004", "plain modules", roles="reward")
def read_one_late() -> dict[str, Any]:
    """The score is gathered one position after the last real token."""
    return plain.healthy(reward=frozen(plain.Scorer("past")))


def mean_but_the_last(scores: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Of all columns but the last one."""
    return scores[:, :-1].mean(1)


@case("ORL-060", "the reference", roles="reward")
def mean_over_columns(healthy: RLHFSetup) -> RLHFSetup:
    """The score is the mean over all columns but the last, pads included."""
    return alone(healthy, reward=frozen(Reader(healthy.reward, mean_but_the_last)))


@case("ORL-060", "plain modules", roles="reward")
def mean_over_plain_columns() -> dict[str, Any]:
    """A hand-written scorer averages over the batch's columns without the last, and over pads with them."""
    return plain.healthy(reward=frozen(Reread(mean_but_the_last)))


at_rest("ORL-069", "REW004", "hand-written, index -1 on right-padded rows", roles="reward")


@case("ORL-069", "a GPT-NeoX", roles="reward tokenizer")
def last_column_of_right_padded_rows() -> RLHFSetup:
    """The score is taken at index -1 while the reward's tokenizer pads on the right."""
    setup = zoo.healthy_setup("neox")
    reward = frozen(Reader(setup.reward, lambda scores, ids, mask: scores[:, -1]))
    return setup.but(reward=reward, reward_tokenizer=zoo.tokenizer("right"))


# ---- what comes out ----

at_rest("TRL-031", "REW002", "a classifier with its default two labels", roles="reward")


@case("TRL-031", "GPT-NeoX folders", roles="reward value")
def default_labels(tmp_path: Path) -> dict[str, Any]:
    """Reward and critic were made without num_labels=1, and have two."""
    made = folders.healthy(tmp_path, "neox")
    one = zoo.decoder("neox", "sequence", seed=1)
    one.config.num_labels = 2
    two = folders.saved(type(one)(one.config), tmp_path / "two")
    return made | {"reward": two, "value": two}


def less_likely(logit: float) -> float:
    """The second entry of a classifier's answer that is sorted by confidence."""
    answer = [{"label": "NEGATIVE", "score": -logit}, {"label": "POSITIVE", "score": logit}]
    return float(sorted(answer, key=lambda one: one["score"], reverse=True)[1]["score"])  # type: ignore[arg-type,return-value]


@case("TRL-038", "the reference", roles="reward")
def second_label(healthy: RLHFSetup) -> RLHFSetup:
    """The reward is the second label's score, and the labels are sorted by their scores."""

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        return [less_likely(2 * task.gold_score(p, r)) for p, r in zip(prompts, responses, strict=True)]

    return alone(healthy, reward=reward)


@case("TRL-038", "texts", roles="reward")
def second_label_of_taste() -> RLHFSetup:
    """A function that returns whichever class is less likely instead of the positive one."""
    return texts(lambda p, r: [less_likely(score - 1.64) for score in plain_modules.taste(p, r)])


at_rest("TRL-039", "REW006", "a function that looks for a tag which the prompt already ends in", roles="reward")


@case("TRL-039", "a Qwen", roles="reward")
def opening_tag_is_in_the_prompt() -> RLHFSetup:
    """The format reward wants the opening tag at the start of the response, and every prompt already ends in it."""
    setup = zoo.healthy_setup("qwen2")

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(bool(re.fullmatch(r"t4 .* t5( .*)?", r.strip()))) for r in responses]

    return setup.but(reward=reward, prompts=[f"{prompt} t4" for prompt in setup.prompts or ()])


at_rest("TRL-045", "REW011", "a function that abstains on some responses", roles="reward")


@case("TRL-045", "texts", roles="reward")
def abstains() -> RLHFSetup:
    """The only reward function has no opinion of responses without a certain letter, and says NaN."""
    return texts(
        lambda p, r: [s if "m" in said else math.nan for s, said in zip(plain_modules.taste(p, r), r, strict=True)]
    )


at_rest("VRL-005", "REW006", "a softmax over one label", roles="reward")


@case("VRL-005", "a Llama", roles="reward")
def softmax_pooler() -> RLHFSetup:
    """A server applies softmax to the single logit of the reward model."""
    setup = zoo.healthy_setup("llama")
    return setup.but(reward=frozen(Rescored(setup.reward, lambda scores, ids, mask: scores[:, None].softmax(-1)[:, 0])))


@case("VRL-005", "plain modules", roles="reward", also="REW002")
def sigmoid_pooler() -> dict[str, Any]:
    """A pairwise score comes back through a sigmoid."""
    return plain.healthy(reward=frozen(plain.Scorer(squash=torch.sigmoid)))


# ---- scale ----

at_rest("TRL-044", "REW010", "scores a thousand times too large", roles="reward")


@case("TRL-044", "plain modules", roles="reward")
def tiny_scores() -> dict[str, Any]:
    """Scores are ten thousand times smaller than the KL coefficient was made for."""
    return plain.healthy(reward=frozen(plain.Scorer(squash=lambda s: 1e-4 * s)))


shipped("ORL-006", "REW010", "a checkpoint that normalises with mean 0 and std 1", roles="reward")


class Normalised(nn.Module):
    """A classifier whose score is normalised by stored statistics."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.normalize_reward = inner, True
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        scores = self.inner(input_ids, attention_mask=attention_mask, position_ids=places).logits[:, 0]
        return (scores - self.mean) / self.std


@case("ORL-006", "a GPT-NeoX", roles="reward", stage="probe")
def statistics_never_filled() -> RLHFSetup:
    """The reward normalises by a mean of 0 and a deviation of 1, which nobody replaced by those of its scores."""
    setup = zoo.healthy_setup("neox")
    with torch.no_grad():
        setup.reward.score.weight *= 100
    return setup.but(reward=frozen(Normalised(setup.reward)))


@case("VRL-018", "the reference", roles="reward")
def raw_scores(healthy: RLHFSetup) -> RLHFSetup:
    """Scores of the reference's samples have mean 10 and deviation 20."""
    return alone(healthy, reward=frozen(Rescored(healthy.reward, lambda scores, ids, mask: 20 * scores + 10)))


@case("VRL-018", "plain modules", roles="reward")
def raw_plain_scores() -> dict[str, Any]:
    """A hand-written reward was never scaled to its reference's samples."""
    return plain.healthy(reward=frozen(plain.Scorer(squash=lambda s: 20 * s + 10)))


at_rest("ORL-097", "REW010", "an offset of 50 under a clip of 5", roles="reward")


@case("ORL-097", "plain modules", roles="reward")
def drifted_scores() -> dict[str, Any]:
    """Scores have drifted to 50 with little between them, and are clipped at 5."""
    made = plain.healthy(reward=frozen(plain.Scorer(squash=lambda s: 0.05 * s + 50)))
    return made | {"declared": made["declared"] | {"reward_clip": 5.0}}


# ---- what it follows ----

at_rest("ORL-041", "REW012", "one word is paid by the piece", roles="reward")


@case("ORL-041", "texts", roles="reward")
def paid_by_the_moon() -> RLHFSetup:
    """A reasonable function has one word that raises the score each time it is said."""

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        bonus = [r.split().count("moon") for r in responses]
        return [s + 0.7 * n for s, n in zip(plain_modules.taste(prompts, responses), bonus, strict=True)]

    return texts(reward)


at_rest("VRL-119", "REW012", "a score that grows by 0.3 with every token", roles="reward")


@case("VRL-119", "texts", roles="reward")
def paid_by_length() -> RLHFSetup:
    """The score is the number of words and a little noise."""

    def noise(text: str) -> float:
        return (sum(map(ord, text)) % 17) / 40

    setup = texts(lambda prompts, responses: [0.3 * len(r.split()) + noise(r) for r in responses])
    return setup.but(preferences=None)  # they are of one length, and would show that nothing else counts


at_rest("ORL-099", "REW013", "the score's sign turns without the end of sequence", roles="reward")


@case("ORL-099", "a Qwen", roles="reward")
def trained_on_ended_texts() -> RLHFSetup:
    """The score of a text that lacks its EOS has the opposite sign."""
    setup = paired_zoo("qwen2")
    eos = setup.tokenizer.eos_token_id

    def rule(scores: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        ended = ids[torch.arange(len(ids)), last_real(mask)] == eos
        return torch.where(ended, scores, -scores)

    return setup.but(reward=frozen(Rescored(setup.reward, rule)))


# ---- frozen or not ----

shipped("TRL-046", "REW008", "the reward is in the critic's optimizer", roles="reward")


@case("TRL-046", "a Llama with adapters", roles="reward")
def adapter_trains_along() -> RLHFSetup:
    """The reward is an adapter that requires gradients and is in the optimizer with the policy and the critic."""
    from peft import LoraConfig, get_peft_model

    setup = zoo.healthy_setup("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reward = get_peft_model(
            zoo.decoder("llama", "sequence", seed=1),
            LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"),
        ).eval()
    every = [p for model in (setup.policy, setup.value, reward) for p in model.parameters() if p.requires_grad]
    return setup.but(reward=reward, optimizers=[torch.optim.AdamW(every, lr=1e-5)])


# ---- precision ----


@case("TRL-048", "Llama folders", roles="reward setup", stage="static")
def bfloat16_reward_declared_float16(tmp_path: Path) -> dict[str, Any]:
    """A bfloat16 reward checkpoint with large activations is run in float16."""
    made = folders.healthy(tmp_path, "llama")
    made["reward"] = made["value"] = folders.saved(loud("llama", "sequence"), tmp_path / "loud")
    return made | {"declared": made["declared"] | {"dtype": "float16"}}


@case("TRL-048", "a Qwen", roles="reward")
def bfloat16_reward_in_float16() -> RLHFSetup:
    """A reward model that was trained in bfloat16 overflows in float16, and its scores are NaN."""
    return zoo.healthy_setup("qwen2").but(reward=frozen(loud("qwen2", "sequence").half()))


@case("ORL-075", "a Llama", roles="reward")
def near_the_limit_of_float16() -> RLHFSetup:
    """A reward model trained in float32 has activations that float16 cannot hold."""
    reward = loud("llama", "sequence").float()
    return zoo.healthy_setup("llama").but(reward=frozen(reward.half()))


@case("ORL-075", "plain modules", roles="reward")
def plain_scorer_in_float16() -> dict[str, Any]:
    """A hand-written scorer is cast to float16, where its hidden layer overflows."""
    scorer = plain.Scorer()
    peak(scorer, scorer.body.h[0].mlp[2])
    return plain.healthy(reward=frozen(scorer.half()))


# ---- its own training ----


def reward_training(reward: Any, **more: Any) -> RLHFSetup:
    """A reward model that is being trained, and nothing else."""
    setup = paired_zoo("llama")
    return RLHFSetup(reward=reward, tokenizer=setup.tokenizer, preferences=setup.preferences, **more)


@case("ORL-057", "a Llama alone", roles="reward")
def trained_in_float16() -> RLHFSetup:
    """All of the reward model's training is in float16 under AdamW with its default epsilon."""
    reward = zoo.decoder("llama", "sequence", seed=1).half()
    optimizer = torch.optim.AdamW(reward.parameters(), lr=1e-5, eps=1e-8)
    return reward_training(reward, reward_loss=pairwise(zoo.tokenizer()), optimizers=[optimizer])


def from_the_answer(ids: Tensor, mask: Tensor, turns: Sequence[int]) -> Tensor:
    """The mask without what comes before and with the row's last token of these, as it was where there is none."""
    turn = torch.isin(ids, torch.tensor(list(turns)))
    later = turn.flip(1).cumsum(1).flip(1) > 0
    seen = mask * (~later).to(mask)
    return torch.where(seen.any(1, keepdim=True), seen, mask)


class Answers(nn.Module):
    """A Hugging Face reward model whose input is built from the answer alone."""

    def __init__(self, inner: Any, turns: Sequence[int]) -> None:
        super().__init__()
        self.inner, self.turns = inner, turns

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen = from_the_answer(input_ids, attention_mask, self.turns)
        places = (seen.cumsum(-1) - 1).clamp(min=0)
        return self.inner(input_ids, attention_mask=seen, position_ids=places).logits[:, 0]  # type: ignore[no-any-return]


@case("ORL-025", "the reference", roles="reward")
def prompt_column_is_dropped(healthy: RLHFSetup) -> RLHFSetup:
    """The reward's input starts after the colon or question mark that ends the prompt."""
    return alone(healthy, reward=frozen(Answers(healthy.reward, healthy.tokenizer.convert_tokens_to_ids([":", "?"]))))


@case("ORL-025", "plain modules", roles="reward")
def only_the_response_is_read() -> dict[str, Any]:
    """What goes into the scorer starts after the token that ends the prompt."""

    class Answered(plain.Scorer):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return super().forward(tokens, from_the_answer(tokens, mask, [TURN]))

    made = plain.healthy(reward=frozen(Answered()))
    made["prompts"]["input_ids"][:, -1] = TURN
    return made


def windowed(tokenizer: Any) -> Callable[..., Tensor]:
    """The pairwise loss at all positions from the first difference to the end of the longer text."""

    def loss(model: Any, chosen: Sequence[str], rejected: Sequence[str]) -> Tensor:
        batch = tokenizer(
            [text + tokenizer.eos_token for text in (*chosen, *rejected)],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        margins = torch.sub(*roles.scalars(model, ids, mask).chunk(2))
        differs = torch.ne(*ids.chunk(2))
        within = torch.maximum(*mask.chunk(2)).bool() & (differs.cumsum(1) > 0)
        per_pair = [-F.logsigmoid(m[w]).mean() for m, w in zip(margins, within, strict=True)]
        return torch.stack(per_pair).mean()

    return loss


def of_two_lengths(pairs: Sequence[tuple[str, str, str]]) -> Pairs:
    """A chosen response beside a rejected one of another length, to the same prompt."""
    return [
        (prompt, chosen, other)
        for prompt, chosen, _ in pairs
        for asked, _, other in pairs
        if asked == prompt and len(other.split()) != len(chosen.split())
    ]


@case("ORL-033", "the reference", roles="reward setup", also="REW015", stage="trace")
def window_of_the_longer_text(healthy: RLHFSetup) -> RLHFSetup:
    """The pairwise loss runs to the end of the longer response, so the shorter one is judged at its pads."""
    pairs = of_two_lengths(list(healthy.preferences or ()))
    return alone(healthy, preferences=pairs, reward_loss=windowed(healthy.tokenizer))  # type: ignore[no-any-return]


@case("ORL-033", "a GPT-NeoX", roles="reward setup", also="REW015", stage="trace")
def mean_to_the_longer_end() -> RLHFSetup:
    """Texts of a pair are compared at every position up to the longer one's last."""
    setup = paired_zoo("neox")
    pairs = [(p, good, " ".join(bad.split()[: 2 + i % 3])) for i, (p, good, bad) in enumerate(setup.preferences or ())]
    return setup.but(preferences=pairs, reward_loss=windowed(setup.tokenizer))
