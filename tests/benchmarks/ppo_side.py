"""One side of the comparison with TRL: a few PPO iterations in this interpreter, as JSON on the last line.

Run by reference_vs_trl.py: ``python ppo_side.py {trl,reference} FOLDER CASE``. It imports nothing of this
repository on TRL's side, since TRL lives in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROLES = ("policy", "reference", "reward", "value")
PHASES = ("generate", "score", "logprobs", "update")
KINDS = {"matrix products": ("mm", "addmm", "bmm"), "attention": ("attention",), "Adam": ("adam", "vector_norm")}


def clock() -> tuple[float, float]:
    """Seconds, and CPU seconds of this process, once a GPU has done all that it was given."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def memory(name: str) -> int:
    """Bytes: VmHWM is this process's peak so far, VmRSS what it holds now."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def peak(before: int) -> int:
    """Bytes taken at most since `before`: of a GPU's memory where one is used, else of this process's."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else memory("VmHWM") - before


class Marks:
    """Wall and CPU time at the end of every iteration."""

    def __init__(self) -> None:
        self.at = list[tuple[float, float]]()

    def __call__(self) -> None:
        self.at.append(clock())

    def lasted(self) -> dict[str, list[float]]:
        """Of each iteration after the first, which warms up: seconds and CPU seconds."""
        pairs = list(zip(self.at, self.at[1:], strict=False))
        return {"seconds": [b[0] - a[0] for a, b in pairs], "cpu": [b[1] - a[1] for a, b in pairs]}


def baseline(threads: int) -> int:
    """Bytes held once everything is imported that either side imports late."""
    import torch
    import torch._dynamo  # every optimizer imports it
    import transformers

    assert all((transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast))  # imported when first named
    torch.set_num_threads(threads)
    torch.ones(256, 256, requires_grad=True).matmul(torch.ones(256, 256)).sum().backward()
    return memory("VmRSS")


def load(folder: Path) -> tuple[dict[str, Any], Any]:
    """The four models, two causal and two with a scalar head, and the tokenizer."""
    import transformers

    causal, scalar = transformers.LlamaForCausalLM, transformers.LlamaForSequenceClassification
    made = {role: (causal if role in ROLES[:2] else scalar).from_pretrained(folder / role) for role in ROLES}
    return made, transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def trl_side(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """TRL's own PPOTrainer, unedited."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    before = baseline(case["threads"])
    models, tokenizer = load(folder)
    marks, steps = Marks(), list[int]()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            marks()

    dataset = Dataset.from_dict({"input_ids": tokenizer(case["prompts"])["input_ids"]})
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"),
            total_episodes=case["batch"] * case["iterations"],
            per_device_train_batch_size=case["micro"] or case["batch"],
            gradient_accumulation_steps=case["batch"] // (case["micro"] or case["batch"]),
            num_mini_batches=1,
            num_ppo_epochs=case["epochs"],
            local_rollout_forward_batch_size=case["batch"],
            response_length=case["response"],
            temperature=case["temperature"],
            learning_rate=case["rate"],
            lr_scheduler_type="constant",
            kl_coef=0.05,
            cliprange=0.2,
            cliprange_value=0.2,
            vf_coef=0.1,
            gamma=1.0,
            lam=0.95,
            missing_eos_penalty=1.0,
            stop_token="eos",
            num_sample_generations=0,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            bf16=case["dtype"] == "bfloat16",
            use_cpu=case["device"] == "cpu",
            seed=case["seed"],
        ),
        processing_class=tokenizer,
        model=models["policy"],
        ref_model=models["reference"],
        reward_model=models["reward"],
        value_model=models["value"],
        train_dataset=dataset,
        eval_dataset=dataset.select(range(case["batch"])),
        callbacks=[Clock()],
    )
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()
    assert len(steps) == case["iterations"] * case["epochs"], len(steps)
    assert trainer.state.episode == case["batch"] * case["iterations"]
    return {"peak": peak(before), "version": trl.__version__, **marks.lasted(), **software()}


def reference_parts(folder: Path, case: dict[str, Any]) -> tuple[Any, Any]:
    """The reference's four models and its settings for this case."""
    from reference_impl import ppo, roles

    models, tokenizer = load(folder)
    for role, model in models.items():
        model.to(case["device"]).eval().requires_grad_(role in ("policy", "value"))
    s = ppo.Settings(
        batch_size=case["batch"],
        num_minibatches=1,
        micro_batch_size=case["micro"],
        ppo_epochs=case["epochs"],
        response_length=case["response"],
        temperature=case["temperature"],
        learning_rate=case["rate"],
        critic_learning_rate=case["rate"],
        dtype=case["dtype"],
    )
    return roles.Models(**models, tokenizer=tokenizer), s


def reference_side(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """`reference_impl.ppo.ppo_step` in a loop, with the time of each phase and the floor under it."""
    import torch

    from reference_impl import ppo, rollout

    before = baseline(case["threads"])
    four, s = reference_parts(folder, case)
    on_gpu = torch.device(case["device"]).type == "cuda"
    optimizers, parts = ppo.make_optimizers(four, s), ppo.Parts(sample=partial(rollout.sample, static=on_gpu))
    ends = list[dict[str, tuple[float, float]]]()

    def timed(name: str) -> Any:
        part = getattr(parts, name)

        def run(*arguments: Any, **options: Any) -> Any:
            result = part(*arguments, **options)
            ends[-1][name] = clock()
            return result

        return run

    watched = ppo.Parts(sample=timed("sample"), score=timed("score"), gae=timed("gae"))
    torch.manual_seed(case["seed"])
    marks = Marks()
    for _ in range(case["iterations"]):
        ends.append({"begin": clock()})
        metrics = ppo.ppo_step(four, case["prompts"], optimizers, s, ppo.FixedKL(0.05), watched)
        ends[-1]["end"] = clock()
        marks()
        assert metrics["response_length"] == case["response"]
    used = peak(before)
    shares = {} if on_gpu else profiled(lambda: ppo.ppo_step(four, case["prompts"], optimizers, s, ppo.FixedKL(0.05)))
    order = ("begin", "sample", "score", "gae", "end")
    spent = {
        phase: [[last - first for first, last in zip(at[a], at[b], strict=True)] for at in ends[1:]]
        for phase, a, b in zip(PHASES, order, order[1:], strict=False)
    }
    found = {"peak": used, "phases": spent, "floor": floors(four, case), "shares": shares}
    return {**found, **marks.lasted(), **software()}


def profiled(run: Any) -> dict[str, float]:
    """The share of an iteration's time in each of KINDS, and in everything else, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    spent = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in seen.key_averages():
        name = event.key.lower().removeprefix("aten::")
        kinds = (kind for kind, parts in KINDS.items() if name in parts or any(x in name for x in parts if len(x) > 3))
        spent[next(kinds, "everything else")] += event.self_cpu_time_total
    return {kind: x / sum(spent.values()) for kind, x in spent.items()}


def floors(models: Any, case: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each phase: the floating-point operations of its matrix products, and the time these alone take here.

    Padding is left out. They are run with the models' own weights, layer after layer, so that a cache holds no more of
    them than it would. Attention's products are counted at the rate of the others.
    """
    import torch
    from torch import nn

    B, b, T = case["batch"], case["micro"] or case["batch"], case["response"]
    P = sum(len(prompt.split()) for prompt in case["prompts"]) / len(case["prompts"])
    dtype = getattr(torch, case["dtype"])
    body = [m.weight.detach().to(dtype) for m in models.policy.base_model.modules() if isinstance(m, nn.Linear)]
    critic = [m.weight.detach().to(dtype) for m in models.value.base_model.modules() if isinstance(m, nn.Linear)]
    head = [models.policy.get_output_embeddings().weight.detach().to(dtype)]
    layers, hidden = models.policy.config.num_hidden_layers, models.policy.config.hidden_size

    @torch.no_grad()
    def products(weights: list[Any], rows: float, backward: bool = False) -> Any:
        """Operations, seconds and CPU seconds."""
        n, wide = round(rows), {width for w in weights for width in w.shape}
        like = {"dtype": dtype, "device": case["device"]}
        x, y = ({width: make(n, width, **like) for width in wide} for make in (torch.randn, torch.empty))
        gradients = {w.shape: torch.empty_like(w) for w in weights} if backward else {}
        took = []
        for _ in range(4):
            begun = clock()
            for w in weights:
                torch.mm(x[w.shape[1]], w.t(), out=y[w.shape[0]])
            for w in reversed(weights) if backward else ():
                torch.mm(x[w.shape[0]].t(), x[w.shape[1]], out=gradients[w.shape])
                torch.mm(x[w.shape[0]], w, out=y[w.shape[1]])
            took.append([last - first for first, last in zip(begun, clock(), strict=True)])
        flops = sum(2.0 * n * w.numel() for w in weights) * (3 if backward else 1)
        return torch.tensor([flops, *(min(run[i] for run in took[1:]) for i in (0, 1))], dtype=torch.float64)

    def attended(sequences: float, length: float) -> float:
        """Of q·k and p·v for whole sequences, each position with those before it."""
        return sequences * layers * 4.0 * hidden * length * (length + 1) / 2

    def total(linear: Any, attention: float) -> dict[str, float]:
        flops, seconds, cpu = linear.tolist()
        share = 1 + attention / flops
        return {"flops": flops * share, "seconds": seconds * share, "cpu": cpu * share}

    L = P + T - 1  # the last token is no state to act in
    step = products(body, B) * (T - 1) + products(head, B) * T
    learn = products(body, b * L, True) + products(head, b * T, True) + products(critic, b * L, True)
    return {
        "generate": total(products(body, B * P) + step, attended(B, L)),
        "score": total(products(body, B * (L + 1)), attended(B, L + 1)),
        "logprobs": total(products(body, B * L) * 3 + products(head, B * T) * 2, 3 * attended(B, L)),
        "update": total(learn * (case["epochs"] * B / b), 3 * 2 * attended(case["epochs"] * B, L)),
    }


def software() -> dict[str, Any]:
    """What ran it."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}


def main() -> None:
    """Run one side and print what it measured."""
    os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", WANDB_DISABLED="true")
    side = {"trl": trl_side, "reference": reference_side}[sys.argv[1]]
    print(json.dumps(side(Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))))


if __name__ == "__main__":
    main()
