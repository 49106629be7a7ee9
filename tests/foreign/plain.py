"""A setup of plain PyTorch modules, right-padded, without Hugging Face: one function a case.

``expect`` stands beside the offence; a case without a code is healthy and must be silent.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH, PAD = 61, 32, 0
CASES: dict[str, tuple[Callable[[], dict[str, Any]], str | None, str | None]] = {}


def case(code: str | None = None, role: str | None = None) -> Callable[[Any], Any]:
    def register(build: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        CASES[build.__name__] = (build, code, role)
        return build

    return register


class Block(nn.Module):
    def __init__(self, causal: bool, p: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(p))
        self.causal = causal

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (a.view(b, t, 4, -1).transpose(1, 2) for a in self.attn(self.ln_1(x)).split(WIDTH, -1))
        allowed = keep[:, None, None, :].expand(b, 1, t, t)
        if self.causal:
            allowed = allowed & torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        allowed = allowed | torch.eye(t, dtype=torch.bool, device=x.device)  # a pad sees itself, so no row is empty
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.mlp(self.ln_2(x))


class Body(nn.Module):
    def __init__(self, causal: bool = True, p: float = 0.0, absolute: bool = False, masked: bool = True) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCAB, WIDTH), nn.Embedding(200, WIDTH)
        self.h = nn.ModuleList(Block(causal, p) for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.absolute, self.masked = absolute, masked

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        place = torch.arange(tokens.shape[1])[None] if self.absolute else (mask.cumsum(1) - 1).clamp(0)
        x = self.tok(tokens) + self.pos(place.to(tokens.device))
        keep = mask.bool() if self.masked else torch.ones_like(mask).bool()
        for block in self.h:
            x = block(x, keep)
        return self.ln_f(x)


class Actor(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.body = Body(**options)
        self.to_logits = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.to_logits(self.body(tokens, mask))  # type: ignore[no-any-return]


class Critic(nn.Module):
    def __init__(self, outputs: int = 1, squash: Any = None, **options: Any) -> None:
        super().__init__()
        self.body = Body(**options)
        self.to_value = nn.Linear(WIDTH, outputs)
        self.squash = squash

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        v = self.to_value(self.body(tokens, mask))
        v = v.squeeze(-1) if v.shape[-1] == 1 else v
        return {"values": v if self.squash is None else self.squash(v)}


class Scorer(nn.Module):
    def __init__(self, read: str = "last", outputs: int = 1, squash: Any = None, **options: Any) -> None:
        super().__init__()
        self.body = Body(**options)
        self.to_score = nn.Linear(WIDTH, outputs)
        self.read, self.squash = read, squash

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.body(tokens, mask)
        rows, last = torch.arange(len(h)), mask.shape[1] - 1 - mask.flip(1).argmax(1)
        if self.read == "mean":
            h = h.mean(1)
        else:
            at = {
                "last": last,
                "end": torch.full_like(last, -1),
                "start": torch.zeros_like(last),
                "past": (last + 1).clamp(max=h.shape[1] - 1),
                "count": mask.sum(1) - 1,
            }[self.read]
            h = h[rows, at]
        s = self.to_score(h)
        s = s.squeeze(-1) if s.shape[-1] == 1 else s
        return s if self.squash is None else self.squash(s)


def healthy(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    actor = Actor()
    made: dict[str, Any] = {
        "policy": actor,
        "reference": copy.deepcopy(actor).requires_grad_(False),
        "reward": Scorer().requires_grad_(False),
        "value": Critic(),
        "prompts": {
            "input_ids": torch.randint(3, VOCAB, (4, 12)),
            "attention_mask": torch.ones(4, 12, dtype=torch.long),
        },
        "declared": {"algorithm": "ppo", "gamma": 1.0, "lam": 0.95, "kl_coef": 0.05},
    }
    made.update(changes)
    return made


@case()
def all_is_well() -> dict[str, Any]:
    return healthy()


@case()
def all_is_well_in_train_mode_with_optimizers() -> dict[str, Any]:
    made = healthy()
    made["optimizers"] = [
        torch.optim.Adam(made["policy"].parameters(), lr=3e-5, eps=1e-5),
        torch.optim.Adam(made["value"].parameters(), lr=3e-5, eps=1e-5),
    ]
    made["policy"].train()
    made["value"].train()
    return made


@case()
def critic_head_starts_at_zero() -> dict[str, Any]:
    critic = Critic()
    nn.init.zeros_(critic.to_value.weight)
    nn.init.zeros_(critic.to_value.bias)
    return healthy(value=critic)


@case()
def policy_and_critic_share_a_trunk() -> dict[str, Any]:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body()
            self.pi, self.v = nn.Linear(WIDTH, VOCAB), nn.Linear(WIDTH, 1)

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.body(tokens, mask)
            return self.pi(h), self.v(h).squeeze(-1)

    both = Both()
    frozen = copy.deepcopy(both).requires_grad_(False)
    return healthy(policy=both, value=both, reference=frozen, declared={"algorithm": "ppo", "shared_trunk": True})


@case()
def reward_is_a_function_of_texts() -> dict[str, Any]:
    return healthy(reward=lambda prompts, responses: [float(len(set(r))) / (1 + len(r)) for r in responses])


@case("REW001", "reward")
def convolutional_reward() -> dict[str, Any]:
    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.c, self.f = nn.Embedding(VOCAB, WIDTH), nn.Conv1d(WIDTH, 64, 5, padding=2), nn.Linear(64, 1)

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = F.gelu(self.c((self.e(tokens) * mask[..., None]).mT))
            return self.f((x * mask[:, None]).sum(-1) / mask.sum(-1, keepdim=True)).squeeze(-1)  # type: ignore[no-any-return]

    return healthy(reward=Cnn())


@case("REW001", "reward")
def long_short_term_memory_reward() -> dict[str, Any]:
    class Rnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.r, self.f = (
                nn.Embedding(VOCAB, WIDTH),
                nn.LSTM(WIDTH, 48, 2, batch_first=True),
                nn.Linear(48, 1),
            )

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            out, _ = self.r(self.e(tokens))
            return self.f(out[torch.arange(len(out)), mask.sum(1) - 1])  # type: ignore[no-any-return]

    return healthy(reward=Rnn())


@case("VAL001", "value")
def elman_critic() -> dict[str, Any]:
    class Elman(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.cell, self.f = nn.Embedding(VOCAB, WIDTH), nn.RNNCell(WIDTH, 40), nn.Linear(40, 1)

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            h, out = torch.zeros(len(tokens), 40), []
            for x in self.e(tokens).unbind(1):
                h = self.cell(x, h)
                out.append(h)
            return self.f(torch.stack(out, 1)).squeeze(-1)  # type: ignore[no-any-return]

    return healthy(value=Elman())


@case("VAL001", "value")
def temporal_convolution_critic() -> dict[str, Any]:
    class Tcn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.f = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 1)
            self.c = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 2, dilation=d) for d in (1, 2, 4))

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = self.e(tokens).mT
            for conv, d in zip(self.c, (1, 2, 4), strict=True):
                x = x + F.relu(conv(F.pad(x, (d, 0))))
            return self.f(x.mT).squeeze(-1)  # type: ignore[no-any-return]

    return healthy(value=Tcn())


@case("REW001", "reward")
def bag_of_words_reward() -> dict[str, Any]:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.f = (
                nn.Embedding(VOCAB, WIDTH),
                nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, 1)),
            )

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = (self.bag(tokens) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return self.f(x)[:, 0]  # type: ignore[no-any-return]

    return healthy(reward=Bag())


@case("POL001", "policy")
def recurrent_policy() -> dict[str, Any]:
    class Lm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.r, self.f = (
                nn.Embedding(VOCAB, WIDTH),
                nn.GRU(WIDTH, WIDTH, batch_first=True),
                nn.Linear(WIDTH, VOCAB),
            )

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.f(self.r(self.e(tokens))[0])  # type: ignore[no-any-return]

    lm = Lm()
    return healthy(policy=lm, reference=copy.deepcopy(lm).requires_grad_(False))


@case("VAL002", "value")
def critic_emits_two_numbers() -> dict[str, Any]:
    return healthy(value=Critic(outputs=2))


@case("VAL002", "value")
def critic_emits_the_vocabulary() -> dict[str, Any]:
    return healthy(value=Critic(outputs=VOCAB))


@case("VAL002", "value")
def critic_emits_one_value_per_sequence() -> dict[str, Any]:
    return healthy(value=Scorer("mean"))


@case("VAL003", "value")
def critic_without_causal_mask() -> dict[str, Any]:
    return healthy(value=Critic(causal=False))


@case("VAL004", "value")
def critic_counts_pads_as_positions() -> dict[str, Any]:
    made = healthy(value=Critic(absolute=True, masked=False))
    made["prompts"]["attention_mask"][:2, :3] = 0  # the prompts are padded on the left
    return made


@case("VAL005", "value")
def critic_ends_in_a_sigmoid() -> dict[str, Any]:
    return healthy(value=Critic(squash=torch.sigmoid))


@case("VAL005", "value")
def critic_ends_in_tanh() -> dict[str, Any]:
    return healthy(value=Critic(squash=torch.tanh))


@case("VAL005", "value")
def critic_ends_in_relu() -> dict[str, Any]:
    return healthy(value=Critic(squash=F.relu))


@case("VAL005", "value")
def critic_ends_in_a_hand_written_logistic() -> dict[str, Any]:
    return healthy(value=Critic(squash=lambda v: 1 / (1 + torch.exp(-v))))


@case("VAL006", "value")
def critic_reads_only_the_first_token() -> dict[str, Any]:
    class First(Critic):
        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
            h = self.body(tokens, mask) * 0 + 1
            return {"values": self.to_value(h).squeeze(-1)}

    return healthy(value=First())


@case("VAL014", "value")
def critic_with_dropout_on() -> dict[str, Any]:
    return healthy(value=Critic(p=0.2).train())


@case("REW002", "reward")
def reward_with_two_labels() -> dict[str, Any]:
    return healthy(reward=Scorer(outputs=2))


@case("REW002", "reward")
def reward_is_a_probability() -> dict[str, Any]:
    return healthy(reward=Scorer(squash=torch.sigmoid))


@case("REW004", "reward")
def reward_read_at_the_final_index() -> dict[str, Any]:
    return healthy(reward=Scorer("end"))


@case("REW004", "reward")
def reward_read_at_the_first_token() -> dict[str, Any]:
    return healthy(reward=Scorer("start"))


@case("REW004", "reward")
def reward_read_one_past_the_end() -> dict[str, Any]:
    return healthy(reward=Scorer("past"))


@case("REW005", "reward")
def reward_averages_over_pads() -> dict[str, Any]:
    return healthy(reward=Scorer("mean"))


@case("REW006", "reward")
def reward_is_a_softmax_over_one_label() -> dict[str, Any]:
    return healthy(reward=Scorer(squash=lambda s: s[:, None].softmax(-1)[:, 0]))


@case("REW007", "reward")
def reward_with_dropout_on() -> dict[str, Any]:
    return healthy(reward=Scorer(p=0.3).train())


@case("REW008", "reward")
def reward_is_in_the_optimizer() -> dict[str, Any]:
    made = healthy(reward=Scorer())
    every = [p for role in ("policy", "value", "reward") for p in made[role].parameters()]
    return made | {"optimizers": [torch.optim.AdamW(every, lr=1e-5)]}


@case("POL002", "policy")
def policy_gives_hidden_states() -> dict[str, Any]:
    return healthy(policy=Body(), reference=Body())


@case("POL003", "policy")
def policy_without_causal_mask() -> dict[str, Any]:
    actor = Actor(causal=False)
    return healthy(policy=actor, reference=copy.deepcopy(actor))


@case("POL004", "policy")
def policy_ignores_the_mask() -> dict[str, Any]:
    actor = Actor(absolute=True, masked=False)
    return healthy(policy=actor, reference=copy.deepcopy(actor))


@case("POL005", "policy")
def policy_with_dropout_on() -> dict[str, Any]:
    actor = Actor(p=0.1)
    return healthy(policy=actor.train(), reference=copy.deepcopy(actor).eval())


@case("POL005", "policy")
def policy_whose_dropout_ignores_eval() -> dict[str, Any]:
    class Always(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x, 0.1, training=True)

    actor = Actor()
    for block in actor.body.h:
        block.mlp.append(Always())
    return healthy(policy=actor.eval(), reference=copy.deepcopy(actor).eval())


@case("REF001", "reference")
def convolutional_reference() -> dict[str, Any]:
    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.c, self.f = nn.Embedding(VOCAB, WIDTH), nn.Conv1d(WIDTH, 64, 3), nn.Linear(64, VOCAB)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.f(F.relu(self.c(F.pad(self.e(tokens).mT, (2, 0)))).mT)  # type: ignore[no-any-return]

    return healthy(reference=Cnn())


@case("REF002", "reference")
def reference_is_another_model() -> dict[str, Any]:
    torch.manual_seed(11)
    return healthy(reference=Actor().requires_grad_(False))


@case("REF003", "reference")
def reference_is_in_the_optimizer() -> dict[str, Any]:
    made = healthy()
    made["reference"].requires_grad_(True)
    every = [p for role in ("policy", "value", "reference") for p in made[role].parameters()]
    return made | {"optimizers": [torch.optim.AdamW(every, lr=1e-5)]}


@case("SYS003", None)
def reference_is_the_policy() -> dict[str, Any]:
    made = healthy()
    return made | {"reference": made["policy"]}


@case("SYS003", None)
def reference_shares_the_policys_body() -> dict[str, Any]:
    made = healthy()
    shallow = copy.copy(made["policy"])
    shallow._modules = dict(made["policy"]._modules)
    return made | {"reference": shallow}


@case("SYS003", None)
def critic_is_the_reward_model() -> dict[str, Any]:
    critic = Critic()
    return healthy(value=critic, reward=ReadAtLast(critic))


class ReadAtLast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        values = self.inner(tokens, mask)["values"]
        return values[torch.arange(len(values)), mask.shape[1] - 1 - mask.flip(1).argmax(1)]  # type: ignore[no-any-return]


@case("SYS012", "value")
def critic_on_the_meta_device() -> dict[str, Any]:
    return healthy(value=Critic().to("meta"))


@case("OPT001", "policy")
def policy_is_in_no_optimizer() -> dict[str, Any]:
    made = healthy()
    return made | {"optimizers": [torch.optim.AdamW(made["value"].parameters(), lr=1e-5)]}


@case("OPT001", "policy")
def optimizer_holds_a_stale_copy() -> dict[str, Any]:
    made = healthy()
    old = copy.deepcopy(made["policy"])
    both = [*old.parameters(), *made["value"].parameters()]
    return made | {"optimizers": [torch.optim.AdamW(both, lr=1e-5)]}


@case("PRE001", "policy")
def bfloat16_weights_under_plain_adam() -> dict[str, Any]:
    made = healthy()
    made["policy"].bfloat16()
    made["reference"].bfloat16()
    return made | {
        "optimizers": [
            torch.optim.AdamW(made["policy"].parameters(), lr=1e-6),
            torch.optim.AdamW(made["value"].parameters(), lr=1e-5),
        ],
        "declared": made["declared"] | {"learning_rate": 1e-6},
    }


@case("PRE004", "value")
def critic_has_a_nan_weight() -> dict[str, Any]:
    critic = Critic()
    critic.to_value.weight.data[0, 3] = math.nan
    return healthy(value=critic)


@case("REW011", "reward")
def reward_overflows() -> dict[str, Any]:
    return healthy(reward=Scorer(squash=lambda s: torch.exp(1000 * s.abs() + 1000)))


@case("KLD001", None)
def negative_kl_coefficient() -> dict[str, Any]:
    made = healthy()
    return made | {"declared": made["declared"] | {"kl_coef": -0.05}}


@case("SYS001", None)
def ppo_without_a_critic() -> dict[str, Any]:
    return healthy(value=None)


@case("CFG002", None)
def minibatches_do_not_divide_the_batch() -> dict[str, Any]:
    made = healthy()
    return made | {"declared": made["declared"] | {"batch_size": 10, "num_minibatches": 4}}


@case("CFG001", None)
def discount_above_one() -> dict[str, Any]:
    made = healthy()
    return made | {"declared": made["declared"] | {"gamma": 1.5}}


@case("OPT005", None)
def learning_rate_of_supervised_pretraining() -> dict[str, Any]:
    made = healthy()
    return made | {"declared": made["declared"] | {"learning_rate": 0.5}}
