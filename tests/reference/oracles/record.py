"""Record what TRL, verl and torchtune compute, for test_reference_oracles.py to compare with.

    python tests/reference/oracles/record.py inputs       # plain Python, draws the inputs anew
    python tests/reference/oracles/record.py trl          # in an environment with torch and trl==1.12.0
    python tests/reference/oracles/record.py verl         # … verl==0.9.1
    python tests/reference/oracles/record.py torchtune    # … torchtune==0.6.1 and torchao==0.14.1

Each framework's own functions are called, unedited. Where TRL has no function, the lines of PPOTrainer.train itself are
cut out by their first and last line and run on the inputs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import platform
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
EOS, PAD, V = 2, 0, 7
GAMMA, LAM, KL_COEF, CLIP, CLIP_VALUE, TEMPERATURE = 0.9, 0.8, 0.3, 0.2, 0.3, 0.7
# Name: (dtype, T, lengths, whether each response ends with EOS, how far numbers spread).
CASES: dict[str, tuple[str, int, list[int], list[bool], float]] = {
    "ragged": ("float64", 6, [6, 1, 3, 5], [False, True, True, True], 1.0),
    "one token": ("float64", 1, [1, 1, 1], [True, False, False], 1.0),
    "no end": ("float64", 5, [5, 5, 5], [False, False, False], 1.0),
    "end in the last slot": ("float64", 4, [4, 4, 2], [True, True, True], 1.0),
    "wild": ("float64", 5, [5, 2, 4], [True, True, True], 6.0),
    "single precision": ("float32", 6, [2, 6, 4], [True, True, True], 1.0),
}


# ---- inputs


def draw(name: str) -> dict[str, Any]:
    """Everything the functions take. Slots outside the mask hold numbers like any others."""
    dtype, T, lengths, ended, spread = CASES[name]
    rng, B = Random(f"oracles {name}"), len(lengths)

    def number(low: float, high: float) -> float:
        return round(rng.uniform(low, high), 6)

    def table(low: float, high: float) -> list[list[float]]:
        return [[number(low, high) for _ in range(T)] for _ in range(B)]

    tokens = [
        [EOS if end and t == n - 1 else rng.randrange(3, V) if t < n else PAD for t in range(T)]
        for n, end in zip(lengths, ended, strict=True)
    ]
    after = [
        [token if t < n else rng.randrange(1, V) for t, token in enumerate(row)]
        for row, n in zip(tokens, lengths, strict=True)
    ]
    old_logp = table(-4, -0.1)
    near = [[round(x + rng.uniform(-0.4, 0.4) * spread, 6) for x in row] for row in old_logp]
    far = [[round(x + rng.uniform(-0.9, 0.9) * spread, 6) for x in row] for row in old_logp]
    return {
        "dtype": dtype,
        "mask": [[t < n for t in range(T)] for n in lengths],
        "tokens": tokens,  # padded after the end
        "drawn": after,  # as a loop that ignores the end draws them
        "logits": [[[number(-2 * spread, 2 * spread) for _ in range(V)] for _ in range(T)] for _ in range(B)],
        "logp": near,
        "old_logp": old_logp,
        "ref_logp": far,
        "v": table(-spread, spread),
        "old_v": table(-spread, spread),
        "r": table(-spread, spread),
        "returns": table(-spread, spread),
        "advantage": table(-spread, spread),
        "score": [number(-2, 2) for _ in range(B)],
        "per_token": [[number(-2, 2) for _ in range(2 + T)] for _ in range(B)],  # of two prompt tokens and the response
    }


def load() -> tuple[dict[str, dict[str, Any]], str]:
    """The inputs as tensors by case, and the file's digest."""
    import torch

    text = (HERE / "inputs.json").read_bytes()
    cases = json.loads(text)
    for case in cases.values():
        dtype = getattr(torch, case.pop("dtype"))
        for name, rows in case.items():
            kind = {"mask": torch.bool, "tokens": torch.long, "drawn": torch.long}.get(name, dtype)
            case[name] = torch.tensor(rows, dtype=kind)
    return cases, hashlib.sha256(text).hexdigest()


def plain(x: Any) -> Any:
    """Numbers as JSON keeps them: all digits of a double, nine of a single."""
    if isinstance(x, (list, tuple)):
        return [plain(item) for item in x]
    if not hasattr(x, "tolist"):
        return x
    if str(x.dtype) == "torch.float32":
        return json.loads(json.dumps(x.detach().tolist()), parse_float=lambda digits: float(f"{float(digits):.9g}"))
    return x.detach().tolist() if hasattr(x, "detach") else x.tolist()


def gradients(loss: Any, *inputs: Any) -> list[Any]:
    """∂loss/∂input for each."""
    import torch

    return list(torch.autograd.grad(loss, inputs))


# ---- frameworks


def lines(function: Any, first: str, last: str) -> str:
    """The source of a function from the line that starts with `first` up to the next that starts with `last`."""
    source = inspect.getsource(function).splitlines()
    begin = next(i for i, line in enumerate(source) if line.strip().startswith(first))
    end = next(i for i in range(begin, len(source)) if source[i].strip().startswith(last))
    return textwrap.dedent("\n".join(source[begin : end + 1]))


def trl_lines(first: str, last: str, **given: Any) -> SimpleNamespace:
    """The variables after those lines of PPOTrainer.train have run on the ones given."""
    from trl.experimental.ppo import ppo_trainer

    names = {**vars(ppo_trainer), **given}
    exec(lines(ppo_trainer.PPOTrainer.train, first, last), names)
    return SimpleNamespace(**names)


def trl(x: SimpleNamespace) -> dict[str, Any]:
    import torch
    from trl.experimental.ppo import ppo_trainer as ppo
    from trl.experimental.utils import first_true_indices, get_reward
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    out: dict[str, Any] = {
        "masked_mean": ppo.masked_mean(x.r, x.mask),
        "masked_var": ppo.masked_var(x.r, x.mask),
        "masked_var, biased": ppo.masked_var(x.r, x.mask, unbiased=False),
        "masked_whiten": ppo.masked_whiten(x.r, x.mask),
        "masked_whiten, mean kept": ppo.masked_whiten(x.r, x.mask, shift_mean=False),
        "selective_log_softmax": selective_log_softmax(x.logits / TEMPERATURE, x.drawn),
        "entropy_from_logits": entropy_from_logits(x.logits),
        "truncate_response": ppo.truncate_response(EOS, PAD, x.drawn),
    }
    whole = torch.cat([torch.full_like(x.tokens[:, :1], 5).expand(-1, 2), x.tokens], 1)
    body = SimpleNamespace(hidden_states=[x.per_token[..., None]])
    stub: Any = SimpleNamespace(base_model_prefix="body", body=lambda **_: body, score=lambda h: h)
    out["get_reward"] = get_reward(stub, whole, PAD, 2)[1]

    for estimator in ("k1", "k3"):
        for whiten in (False, True):
            args = SimpleNamespace(kl_estimator=estimator, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM, whiten_rewards=whiten)
            ran = trl_lines(
                "# be very careful with `padding_mask_p1`",
                "advantages = torch.masked_fill(advantages, padding_mask, 0)",
                args=args,
                responses=x.drawn,
                scores=x.score,
                logprobs=x.old_logp,
                ref_logprobs=x.ref_logp,
                values=x.old_v,
                sequence_lengths=first_true_indices(x.tokens == PAD) - 1,
            )
            name = f"train, {estimator}" + ", whitened rewards" * whiten
            out[name] = [ran.rewards, ran.advantages, ran.returns]
    padding_mask, padding_mask_p1 = ran.padding_mask, ran.padding_mask_p1

    logits, v = (x.logits / TEMPERATURE).requires_grad_(), x.v.clone().requires_grad_()
    rows = torch.arange(len(v))
    ran = trl_lines(
        "new_logprobs = selective_log_softmax(",
        "loss = pg_loss + args.vf_coef * vf_loss",
        args=SimpleNamespace(cliprange=CLIP, cliprange_value=CLIP_VALUE, vf_coef=0.1),
        logits=logits,
        mb_responses=x.drawn,
        padding_mask=padding_mask,
        padding_mask_p1=padding_mask_p1,
        micro_batch_inds=rows,
        context_length=1,
        vpred_temp=torch.cat([v, v[:, :1]], 1)[..., None],
        mb_values=x.old_v,
        mb_return=x.returns,
        mb_logprobs=x.old_logp.masked_fill(padding_mask, ppo.INVALID_LOGPROB),
        mb_advantage=x.advantage.masked_fill(padding_mask, 0),
    )
    out["train, losses"] = [ran.pg_loss, ran.vf_loss, ran.loss]
    out["train, gradients"] = gradients(ran.loss, logits, v)
    report = trl_lines("pg_clipfrac = masked_mean(", "approxkl = 0.5", **{**vars(ran), "micro_batch_inds": rows})
    out["train, clip fraction and approximate KL"] = [report.pg_clipfrac, report.approxkl]
    return out


def verl(x: SimpleNamespace) -> dict[str, Any]:
    import warnings

    from verl.trainer.ppo import core_algos as algos
    from verl.utils import torch_functional as F

    warnings.simplefilter("ignore")
    mask = x.mask.long()  # as verl makes it
    out: dict[str, Any] = {
        "masked_mean": F.masked_mean(x.r, mask),
        "masked_var": F.masked_var(x.r, mask),
        "masked_whiten": F.masked_whiten(x.r, mask),
        "masked_whiten, mean kept": F.masked_whiten(x.r, mask, shift_mean=False),
        "logprobs_from_logits": F.logprobs_from_logits(x.logits / TEMPERATURE, x.drawn),
        "entropy_from_logits": F.entropy_from_logits(x.logits),
        "get_response_mask": F.get_response_mask(x.drawn, EOS),
        **{f"kl_penalty, {kind}": algos.kl_penalty(x.old_logp, x.ref_logp, kind) for kind in ("k1", "k2", "k3")},
        "compute_gae_advantage_return": algos.compute_gae_advantage_return(x.r, x.old_v, mask, GAMMA, LAM),
        "agg_loss, token-mean": algos.agg_loss(x.r, mask, "token-mean"),
        "agg_loss, a part of a larger batch": algos.agg_loss(x.r, mask, "token-mean", batch_num_tokens=50),
    }
    for name, c in (("plain", 1e9), ("dual clip", 3.0)):
        logp = x.logp.clone().requires_grad_()
        loss, fraction, kl, _ = algos.compute_policy_loss(x.old_logp, logp, x.advantage, mask, CLIP, clip_ratio_c=c)
        out[f"compute_policy_loss, {name}"] = [loss, fraction, kl, *gradients(loss, logp)]
    v = x.v.clone().requires_grad_()
    loss, _ = algos.compute_value_loss(v, x.returns, x.old_v, mask, CLIP_VALUE)
    out["compute_value_loss"] = [loss, *gradients(loss, v)]
    control, coefficients = algos.AdaptiveKLController(0.1, 6.0, 1000), list[float]()
    for kl in (*x.score.tolist(), 6.3, 5.9, 40.0):
        control.update(kl, 64)
        coefficients.append(float(control.value))
    out["AdaptiveKLController"] = coefficients
    return out


def torchtune(x: SimpleNamespace) -> dict[str, Any]:
    import torch
    from torchtune import rlhf
    from torchtune.rlhf.loss import PPOLoss

    r, old_v = x.r.masked_fill(~x.mask, 0), x.old_v.masked_fill(~x.mask, 0)  # its recipe does this before
    centred = x.r - rlhf.masked_mean(x.r, x.mask)
    padding, truncated = rlhf.truncate_sequence_at_first_stop_token(x.drawn.clone(), torch.tensor([EOS]), PAD)
    last = x.mask.sum(1) - 1
    out: dict[str, Any] = {
        "masked_mean": rlhf.masked_mean(x.r, x.mask),
        "masked_var": rlhf.masked_var(centred, x.mask),
        "masked_var, biased": rlhf.masked_var(centred, x.mask, unbiased=False),
        "whiten": rlhf.whiten(x.r, x.mask),
        "whiten, shift_mean false": rlhf.whiten(x.r, x.mask, shift_mean=False),
        "logits_to_logprobs": rlhf.logits_to_logprobs(x.logits, x.drawn, TEMPERATURE),
        "truncate_sequence_at_first_stop_token": [padding, truncated],
        "get_reward_penalty_mask": rlhf.get_reward_penalty_mask(padding, last),
        "get_rewards_ppo": rlhf.get_rewards_ppo(x.score, x.old_logp, x.ref_logp, KL_COEF, last),
        "estimate_advantages": rlhf.estimate_advantages(old_v, r, GAMMA, LAM, x.mask),
    }
    logp, v = x.logp.clone().requires_grad_(), x.v.clone().requires_grad_()
    loss, policy, value, _, fraction = PPOLoss(CLIP, CLIP_VALUE, 0.1)(
        x.old_logp, logp, x.advantage, x.old_v, v, x.returns, x.mask, x.mask
    )
    out["PPOLoss"] = [loss, policy, value, fraction, *gradients(loss, logp, v)]
    return out


PLACES = {
    "trl": "trl.experimental.ppo.ppo_trainer, trl.experimental.utils, trl.trainer.utils; "
    "train, …: lines of trl.experimental.ppo.ppo_trainer.PPOTrainer.train",
    "verl": "verl.trainer.ppo.core_algos, verl.utils.torch_functional",
    "torchtune": "torchtune.rlhf, torchtune.rlhf.loss",
}


def main(what: str) -> None:
    """Write inputs.json, or one framework's file."""
    if what == "inputs":
        found: Any = {name: draw(name) for name in CASES}
    else:
        compute: Callable[[SimpleNamespace], dict[str, Any]] = {"trl": trl, "verl": verl, "torchtune": torchtune}[what]
        cases, digest = load()
        found = {
            "framework": what,
            "version": importlib.metadata.version(what),
            "functions of": PLACES[what],
            "made by": f"python tests/reference/oracles/record.py {what}",
            "with": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
            "inputs": digest,
            "outputs": {
                name: {key: plain(out) for key, out in compute(SimpleNamespace(**case)).items()}
                for name, case in cases.items()
            },
        }
    text = json.dumps(found, separators=(",", ":"))
    (HERE / f"{what}.json").write_text(text.replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
