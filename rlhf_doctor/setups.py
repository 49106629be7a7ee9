"""RLHFSetup: the thing that is examined. No torch is imported here."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from rlhf_doctor.finding import MODEL_ROLES, Role

__all__ = ["DECLARED_NAMES", "RLHFSetup"]

DECLARED_NAMES = frozenset(
    [
        "algorithm",
        "gamma",
        "lam",
        "kl_coef",
        "kl_estimator",
        "kl_in",
        "temperature",
        "top_k",
        "top_p",
        "clip_range",
        "clip_range_value",
        "vf_coef",
        "ent_coef",
        "whiten_advantages",
        "whiten_rewards",
        "reward_clip",
        "missing_eos_penalty",
        "learning_rate",
        "critic_learning_rate",
        "ppo_epochs",
        "num_minibatches",
        "batch_size",
        "prompt_length",
        "response_length",
        "dtype",
        "reference",
        "value_init",
        "policy_init",
        "kl_adaptive",
        "kl_target",
        "kl_horizon",
        "group_size",
        "loss_aggregation",
        "shared_trunk",
        "dense_rewards",
        "versions",
    ]
)


@dataclass(frozen=True)
class RLHFSetup:
    """The four models of an RLHF run and what surrounds them.

    A model is an ``nn.Module`` or the path of a checkpoint folder. ``reward`` may also be a function of
    (prompts, responses) as texts, or of what its parameter names say; ``value`` is None in critic-free algorithms;
    ``reference`` may be the word "adapter-off". Everything but the models is optional: the more is given, the deeper
    the examination looks.

    Args:
        policy: the language model being aligned.
        reference: the frozen policy from before RL.
        reward: the language model with a scalar head, or a function.
        value: the critic.
        tokenizer: a Hugging Face tokenizer, or the path of one.
        reward_tokenizer: where the reward model's differs.
        prompts: texts, or a mapping with ``input_ids`` and ``attention_mask``.
        step: one whole PPO iteration on these very objects.
        optimizers: the optimizers that ``step`` uses.
        state: what else ``step`` changes; anything with ``state_dict``/``load_state_dict``.
        declared: what the user believes is configured, by the names in ``DECLARED_NAMES``.
        preferences: (prompt, chosen, rejected) texts.
        functions: the user's own gae, policy_loss, ... for conformance.
        reward_loss: (reward_model, chosen, rejected) -> loss.
        calls: role -> (model, ids, mask) -> output, where a model's signature cannot be guessed.
        origin: where the setup came from, for the report.
        trust_remote_code: run Python code that a checkpoint brings along. Off unless asked for.
    """

    policy: Any = None
    reference: Any = None
    reward: Any = None
    value: Any = None
    tokenizer: Any = None
    reward_tokenizer: Any = None
    prompts: Sequence[str] | Mapping[str, Any] | None = None
    step: Callable[[], Any] | None = None
    optimizers: Sequence[Any] = ()
    state: Sequence[Any] = ()
    declared: Mapping[str, Any] = field(default_factory=dict)
    preferences: Sequence[tuple[str, str, str]] | None = None
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    reward_loss: Callable[..., Any] | None = None
    calls: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    origin: str = "objects in memory"
    trust_remote_code: bool = False

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any], *, origin: str = "objects in memory") -> RLHFSetup:
        """A setup from a dict of its fields.

        Raises:
            ValueError: a key is no field; the nearest real one is named.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        for key in fields:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(sorted(names))}"
                raise ValueError(f"{key!r} is no field of RLHFSetup{hint}")
        return cls(**{"origin": origin, **fields})

    def but(self, **changes: Any) -> RLHFSetup:
        """A copy with these fields changed. ``declared`` is merged, everything else replaced."""
        if "declared" in changes:
            changes["declared"] = {**self.declared, **changes["declared"]}
        return dataclasses.replace(self, **changes)

    def model(self, role: Role) -> Any:
        """The model of a role as it was given."""
        return getattr(self, role)

    def path(self, role: Role) -> Path | None:
        """The checkpoint folder of a role, None where the model is an object or absent."""
        given = self.model(role)
        if isinstance(given, str) and given == "adapter-off":
            return None
        return Path(given) if isinstance(given, (str, PathLike)) else None

    @property
    def present(self) -> tuple[Role, ...]:
        """The roles that are given."""
        return tuple(role for role in MODEL_ROLES if self.model(role) is not None)
