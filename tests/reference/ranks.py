"""A few PPO iterations, alone or as processes of torchrun: python ranks.py FILE JSON; process 0 writes FILE.

The JSON is a list of options of `run`, FILE the list of what it gave.
"""

import json
import sys

import torch

from reference_impl import ppo, reward_modeling, rollout, scale, setup, task


def full(x):
    """The whole of a tensor, which may be divided among processes."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def run(weights="float64", tied=False, iterations=2, disturb=None, **settings):
    """Metrics, the first update's gradients, the weights after the last, normalized scores, the drawn ids, and more.

    `weights` is the models' dtype; `disturb` changes each rollout before it is used.
    """
    models = setup.build_models(0, trained=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in models.policy.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    if tied:
        models.policy.lm_head.weight = models.policy.model.embed_tokens.weight
    for role in setup.ROLES:
        scale.shard(getattr(models, role).to(getattr(torch, weights)))
    s = ppo.Settings(**{"batch_size": 16, "num_minibatches": 2, "response_length": 10, **settings})
    optimizers, gradients, drawn = ppo.make_optimizers(models, s), dict[str, torch.Tensor](), list[rollout.Rollout]()
    trained = {"policy": models.policy, "value": models.value}

    def keep(optimizer, *_):
        role = "policy" if optimizer is optimizers[0] else "value"
        for name, weight in trained[role].named_parameters():
            gradients.setdefault(f"{role} {name}", full(weight.grad))

    def sample(*arguments, **options):
        drawn.append(rollout.sample(*arguments, **options))
        return disturb(drawn[-1]) if disturb else drawn[-1]

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(keep)
    torch.manual_seed(0)
    control, parts = ppo.AdaptiveKL(s.kl_coef, target=0.1, horizon=100), ppo.Parts(sample=sample)
    metrics = [ppo.ppo_step(models, task.prompts(), optimizers, s, control, parts) for _ in range(iterations)]
    return {
        "metrics": metrics,
        "scale": reward_modeling.normalize(models.reward, drawn[0]),
        "scores": rollout.score(models.reward, drawn[0]),
        "gradients": gradients,
        "weights": {f"{role} {name}": full(x) for role, m in trained.items() for name, x in m.named_parameters()},
        "drawn": drawn,
        "generator": torch.get_rng_state(),
        "held": sum(getattr(x, "to_local", lambda x=x: x)().numel() for x in models.policy.parameters()),
    }


def far(a, b):
    """The largest difference between two dicts of tensors, relative to each tensor's largest entry."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-9)).item() for name in a)


if __name__ == "__main__":
    torch.set_num_threads(1)
    scale.start("cpu")
    try:
        results = [run(**options) for options in json.loads(sys.argv[2])]
        if scale.rank() == 0:
            torch.save(results, sys.argv[1])
    finally:
        scale.finish()
