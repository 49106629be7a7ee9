"""Bugs of the policy when it is run: padding, dropout, how it samples, and in what precision."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import zoo
from foreign import folders, plain
from loops import plain_modules
from torch import Tensor, nn

from corpus.bugs_reward import at_rest, frozen, loud
from corpus.case import case, in_loop, shipped
from reference_impl import ops, roles
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup


def twins(policy: nn.Module, **more: Any) -> dict[str, Any]:
    """A policy and a frozen copy of it as the reference."""
    return {"policy": policy, "reference": copy.deepcopy(policy).requires_grad_(False), **more}


class Without(nn.Module):
    """A Hugging Face model called without its position ids, or without its mask too."""

    def __init__(self, inner: Any, mask: bool = True) -> None:
        super().__init__()
        self.inner, self.mask = inner, mask

    @property
    def config(self) -> Any:
        return self.inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask if self.mask else None, use_cache=False)


def counted_columns(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of a call that gives no position ids."""
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # type: ignore[no-any-return]


def no_mask(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of a call that gives ids alone."""
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


# ---- padding ----


@case("TRL-001", "calls of a GPT-2", roles="policy reference")
def calls_without_positions() -> RLHFSetup:
    """Left-padded batches go through policy and reference without position ids."""
    return zoo.healthy_setup("gpt2").but(calls={"policy": counted_columns, "reference": counted_columns})


@case("TRL-001", "plain modules", roles="policy reference value")
def columns_as_positions() -> dict[str, Any]:
    """A hand-written policy and critic mask the pads on the left and still count them as positions."""
    made = plain.healthy(**twins(plain.Actor(absolute=True)), value=plain.Critic(absolute=True))
    made["prompts"]["attention_mask"][:2, :3] = 0
    return made


@case("VRL-107", "a GPT-2", roles="policy reference reward value")
def four_models_without_positions() -> RLHFSetup:
    """All four GPT-2 models derive positions from columns where rows are padded on the left."""
    setup = zoo.healthy_setup("gpt2")
    return setup.but(**{role: Without(setup.model(role)) for role in setup.present})  # type: ignore[arg-type]


at_rest("VRL-107", "VAL004", "hand-written, positions count the pads on the left", roles="value")
shipped("TRL-081", "POL004", "a Hugging Face model whose wrapper drops the mask", roles="policy reference")


@case("TRL-081", "calls of a Llama", roles="policy reference")
def calls_without_mask() -> RLHFSetup:
    """Log-probabilities come from a forward pass that is given no attention mask."""
    return zoo.healthy_setup("llama").but(calls={"policy": no_mask, "reference": no_mask})


@case("TRL-081", "plain modules", roles="policy reference")
def pads_are_attended_to() -> dict[str, Any]:
    """Tokens of a hand-written policy attend to the pads before them."""
    made = plain.healthy(**twins(plain.Actor(masked=False)))
    made["prompts"]["attention_mask"][:2, :3] = 0
    return made


@case("ORL-004", "packed rows of a Llama", roles="policy reference setup")
def packed_without_blocks() -> RLHFSetup:
    """Two samples share a row under a mask of ones and twos, which the attention takes for a boolean one."""
    setup = zoo.healthy_setup("llama")
    mask = torch.tensor([1] * 6 + [2] * 6).repeat(4, 1)
    return setup.but(prompts={"input_ids": torch.randint(4, zoo.VOCAB, (4, 12)), "attention_mask": mask})


# ---- dropout ----

shipped("TRL-072", "POL005", "a hand-written policy in train mode", roles="policy")


@case("TRL-072", "plain modules", roles="policy reference")
def both_in_train_mode() -> dict[str, Any]:
    """Policy and reference keep a dropout of 0.1 on while log-probabilities are computed."""
    made = plain.healthy(**twins(plain.Actor(p=0.1)))
    made["policy"].train()
    made["reference"].train()
    return made


@case("VRL-056", "a GPT-2", roles="policy reference")
def default_dropout() -> RLHFSetup:
    """GPT-2 comes with a dropout of 0.1, and both language models are in train mode."""
    config = zoo.decoder("gpt2").config
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.1
    made = twins(type(zoo.decoder("gpt2"))(config))
    return zoo.healthy_setup("gpt2").but(policy=made["policy"].train(), reference=made["reference"].train())


def adapted(**options: Any) -> Any:
    """A Llama under an adapter that has learnt something."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(zoo.decoder("llama"), LoraConfig(r=4, target_modules="all-linear", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@case("VRL-056", "a Llama with an adapter", roles="policy reference")
def adapter_dropout() -> RLHFSetup:
    """An adapter with a dropout of 0.1 is in train mode, in the policy and in its copy as reference."""
    made = twins(adapted(lora_dropout=0.1))
    return zoo.healthy_setup("llama").but(policy=made["policy"].train(), reference=made["reference"].train())


shipped("ORL-074", "POL005", "a Hugging Face policy handed over in train mode", roles="policy")


@case("ORL-074", "a Llama with an adapter", roles="policy")
def eval_was_forgotten() -> RLHFSetup:
    """Nobody calls eval() on an adapted policy with dropout before its old log-probabilities are read."""
    made = twins(adapted(lora_dropout=0.1))
    return zoo.healthy_setup("llama").but(policy=made["policy"].train(), reference=made["reference"])


class Fused(nn.Module):
    """A block whose dropout looks at the configuration it was made with."""

    def __init__(self, inner: nn.Module, training: bool = True) -> None:
        super().__init__()
        self.inner, self.settings = inner, {"training": training}

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.1, training=self.settings["training"])


@case("ORL-053", "a Llama", roles="policy reference reward value", also="VAL014")
def fused_blocks() -> RLHFSetup:
    """Fused blocks of all four models took their training flag when they were made, and do not hear eval()."""
    setup = zoo.healthy_setup("llama")
    for role in setup.present:
        for layer in setup.model(role).base_model.layers:
            layer.mlp = Fused(layer.mlp)
    return setup


@case("ORL-053", "plain modules", roles="reference")
def fused_reference() -> dict[str, Any]:
    """The reference alone has blocks whose dropout stays on in eval mode."""
    made = plain.healthy()
    for block in made["reference"].body.h:
        block.mlp = Fused(block.mlp)
    return made


# ---- what is sampled ----


def shipped_with(tmp_path: Path, family: str, **sampling: Any) -> dict[str, Any]:
    """Folders whose policy's generation config says this; temperature 1 is declared."""
    made = folders.healthy(tmp_path, family)
    folders.edit(made["policy"], "generation_config.json", do_sample=True, **sampling)
    return made | {"declared": made["declared"] | {"temperature": 1.0}}


@case("TRL-065", "a Llama", roles="policy setup loop")
def eos_is_held_back() -> RLHFSetup:
    """Generation must give 20 tokens and takes from the best 50, which the log-probabilities know nothing of."""
    setup = zoo.healthy_setup("llama")
    setup.policy.generation_config.update(do_sample=True, min_new_tokens=20, top_k=50, max_new_tokens=32)
    return setup


in_loop("TRL-065", "micro_batches", "top_k_in_generate")
shipped("TRL-078", "ROL002", "a shipped generation config, as Qwen's", roles="policy setup loop")


@case("TRL-078", "GPT-NeoX folders", roles="policy setup loop", also="ROL001")
def near_greedy_by_default(tmp_path: Path) -> dict[str, Any]:
    """The checkpoint's generation config brings temperature 0.1 and top-p 0.9 where temperature 1 is meant."""
    return shipped_with(tmp_path, "neox", temperature=0.1, top_p=0.9)


@case("VRL-037", "Qwen folders", roles="policy setup loop")
def repetition_penalty_by_default(tmp_path: Path) -> dict[str, Any]:
    """The policy ships a repetition penalty of 1.1 that the rollouts do not override."""
    return shipped_with(tmp_path, "qwen2", repetition_penalty=1.1)


in_loop("VRL-037", "micro_batches", "repetition_penalty_in_generate")
shipped("VRL-036", "ROL002", "top-p declared for the rollouts", roles="policy setup loop")
in_loop("VRL-036", "micro_batches", "top_k_in_generate")
shipped("ORL-030", "ROL002", "a checkpoint whose generation config forces a length", roles="policy setup loop")


@case("ORL-030", "a GPT-NeoX", roles="policy setup loop")
def one_length_for_all() -> RLHFSetup:
    """The shortest allowed response is as long as the longest."""
    setup = zoo.healthy_setup("neox")
    setup.policy.generation_config.update(do_sample=True, min_new_tokens=24, max_new_tokens=24)
    return setup


@case("ORL-082", "Llama folders", roles="policy setup loop")
def processors_are_not_scored(tmp_path: Path) -> dict[str, Any]:
    """Rollouts use top-p, a repetition penalty and a least length; log-probabilities use the plain softmax."""
    return shipped_with(tmp_path, "llama", top_p=0.9, repetition_penalty=1.1, min_new_tokens=20)


in_loop("ORL-082", "backbone_direct", "nucleus_in_the_sampler")
shipped("TRL-121", "ROL006", "a limit that cuts every response", roles="policy setup loop")


@case("TRL-121", "loop plain_modules", roles="policy setup loop")
def limit_below_the_answers() -> dict[str, Any]:
    """Responses may have eight tokens, and the policy hardly ever ends one before its fiftieth."""
    made = plain_modules.build()
    with torch.no_grad():
        for role in ("policy", "reference"):
            made[role].bias[plain_modules.EOS] = -1.0
    return made


# ---- temperature and log-probabilities ----

shipped("VRL-039", "ROL001", "every pass but the sampler leaves the temperature out", roles="loop")
in_loop("VRL-039", "right_padded_sums", "scored_at_temperature_one_everywhere")
in_loop("VRL-039", "backbone_direct", "reference_at_temperature_one")


@case("VRL-034", "the reference", roles="loop", stage="trace")
def log_probabilities_are_divided(healthy: RLHFSetup) -> RLHFSetup:
    """The old log-probabilities are divided by the temperature in place of the logits."""

    def logprobs(model: Any, ids: Tensor, mask: Tensor, width: int, temperature: float) -> Tensor:
        if model is healthy.policy and not torch.is_grad_enabled():
            return roles.response_logprobs(model, ids, mask, width, 1.0) / temperature  # type: ignore[no-any-return]
        return roles.response_logprobs(model, ids, mask, width, temperature)  # type: ignore[no-any-return]

    return reference_step(healthy, parts={"logprobs": logprobs}, settings={"temperature": 0.7})


def padded_with_eos(healthy: RLHFSetup) -> RLHFSetup:
    """The reference where pad and EOS are one token."""
    tokenizer = copy.deepcopy(healthy.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    models = {role: copy.deepcopy(healthy.model(role)) for role in healthy.present}
    for model in models.values():
        model.config.pad_token_id = tokenizer.eos_token_id
    models["policy"].generation_config.pad_token_id = tokenizer.eos_token_id
    return healthy.but(tokenizer=tokenizer, **models)


@case("VRL-021", "the reference", roles="loop tokenizer", stage="trace")
def eos_counts_as_ignored(healthy: RLHFSetup) -> RLHFSetup:
    """The log-probability of pad is set to 0, and pad is EOS."""
    setup = padded_with_eos(healthy)
    eos = setup.tokenizer.eos_token_id

    def logprobs(model: Any, ids: Tensor, mask: Tensor, width: int, temperature: float) -> Tensor:
        logp = roles.response_logprobs(model, ids, mask, width, temperature)
        return logp.masked_fill(ids[:, -width:] == eos, 0.0)  # type: ignore[no-any-return]

    return reference_step(setup, parts={"logprobs": logprobs})


@case("ORL-090", "the reference", roles="loop", stage="trace")
def mask_not_shifted(healthy: RLHFSetup) -> RLHFSetup:
    """The mask of the tokens lies over log-probabilities that start one token later."""

    def policy_loss(logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        return ops.clipped_policy_loss(logp, old, advantage, F.pad(mask[:, :-1], (1, 0)), *rest)

    return reference_step(healthy, parts={"policy_loss": policy_loss})


in_loop("ORL-090", "plain_modules", "trained_from_the_second_token")
in_loop("ORL-090", "backbone_direct", "training_pass_without_temperature")
in_loop("ORL-007", "right_padded_sums", "old_logprobs_padded_with_minus_infinity")
in_loop("ORL-007", "plain_modules", "ratio_at_pads_infinite_times_zero")

# ---- precision ----


class Through(plain.Actor):
    """A plain policy whose hidden states become logits in a way of its own, as peaked as a trained one's."""

    def __init__(self, head: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.head = head
        with torch.no_grad():
            self.to_logits.weight *= 12

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.body(tokens, mask), self.to_logits.weight)


class HalfLogProbabilities(nn.Module):
    """The log-softmax of a Hugging Face model's logits, in bfloat16."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = (attention_mask.cumsum(1) - 1).clamp(min=0)
        out = self.inner(input_ids, attention_mask=attention_mask, position_ids=places, use_cache=False)
        return out.logits.bfloat16().log_softmax(-1)  # type: ignore[no-any-return]


shipped("ORL-014", "PRE002", "a Hugging Face policy that gives log-probabilities in bfloat16", roles="policy reference")


@case("ORL-014", "plain modules", roles="policy reference")
def log_softmax_of_bfloat16_logits() -> dict[str, Any]:
    """The log-softmax is taken of logits that stay in bfloat16."""
    return plain.healthy(**twins(Through(lambda h, w: (h @ w.T).bfloat16().log_softmax(-1))))


@case("ORL-035", "a GPT-NeoX", roles="policy reference")
def all_in_bfloat16() -> RLHFSetup:
    """Model, logits and log-probabilities are all in bfloat16."""
    setup = zoo.healthy_setup("neox", dtype=torch.bfloat16)
    return setup.but(**twins(HalfLogProbabilities(setup.policy)))


@case("ORL-035", "the reference", roles="loop policy", also="LOS008", stage="trace")
def ratio_in_bfloat16(healthy: RLHFSetup) -> RLHFSetup:
    """Log-probabilities are rounded to bfloat16 before the ratio and the loss are computed in it."""

    def policy_loss(logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        half = (x.bfloat16() for x in (logp, old, advantage))
        return ops.clipped_policy_loss(*half, mask, *rest)

    return reference_step(healthy, parts={"policy_loss": policy_loss})


shipped("VRL-111", "PRE002", "a hand-written float32 policy with its head in bfloat16", roles="policy reference")


@case("VRL-111", "plain modules", roles="policy reference")
def head_in_bfloat16() -> dict[str, Any]:
    """Only the product with the head is in bfloat16, and its result is cast up."""
    return plain.healthy(**twins(Through(lambda h, w: F.linear(h.bfloat16(), w.bfloat16()).float())))


in_loop("VRL-058", "micro_batches", "old_logprobs_of_a_bfloat16_engine", roles="loop policy")


class Autocast(nn.Module):
    """A model run under autocast to float16."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.float16):
            return self.inner(input_ids, attention_mask)


@case("VRL-110", "a Qwen", roles="policy reference", stage="probe")
def autocast_of_a_qwen() -> RLHFSetup:
    """A bfloat16 policy runs under autocast, which was given no dtype and takes float16."""
    setup = zoo.healthy_setup("qwen2", dtype=torch.bfloat16)
    return setup.but(**twins(Autocast(setup.policy)))


@case("VRL-110", "plain modules", roles="policy reference", stage="probe")
def autocast_of_a_plain_actor() -> dict[str, Any]:
    """A hand-written policy in bfloat16, but for its norms, computes its logits under float16 autocast."""
    actor = plain.Actor().bfloat16()
    for module in actor.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return plain.healthy(**twins(Autocast(actor)))


@case("ORL-049", "Llama folders", roles="policy reference setup")
def bfloat16_policy_declared_float16(tmp_path: Path) -> dict[str, Any]:
    """A policy that was trained in bfloat16, with large activations, is run in float16."""
    made = folders.healthy(tmp_path, "llama")
    made["policy"] = made["reference"] = folders.saved(loud("llama", "causal"), tmp_path / "loud")
    return made | {"declared": made["declared"] | {"dtype": "float16"}}


@case("ORL-049", "a Qwen", roles="policy reference", stage="probe")
def bfloat16_policy_in_float16() -> RLHFSetup:
    """In float16 the policy's activations overflow, and its logits are NaN."""
    policy = loud("qwen2", "causal").half()
    return zoo.healthy_setup("qwen2").but(policy=policy, reference=frozen(copy.deepcopy(policy)))
