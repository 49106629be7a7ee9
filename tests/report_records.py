"""Report records made by hand: the founding case, a healthy setup, a critic-free one, unreadable ones."""

from __future__ import annotations

import html
import pathlib
import re
from typing import Any

from rlhf_doctor.report.schema import SCHEMA_VERSION
from rlhf_doctor.report.verdict import verdict

LENGTH = 12
SCORE = [0.42, 0.71, 0.86, 1.0, 0.89, 0.83, 0.57, 0.45, 0.32, 0.46, 0.39, 0.41]
STARTED = "2026-01-02T03:04:05+00:00"


def decoder_map() -> list[list[float]]:
    return [
        [1.0 if s == t else (round(1 / (2 + t - s), 3) if s < t else 0.0) for s in range(LENGTH)] for t in range(LENGTH)
    ]


def band_map(reach: int = 2) -> list[list[float]]:
    return [
        [round(1 / (1 + abs(t - s)), 3) if abs(t - s) <= reach else 0.0 for s in range(LENGTH)] for t in range(LENGTH)
    ]


def fading_map() -> list[list[float]]:
    return [[round(0.7 ** (t - s), 3) if s <= t else 0.0 for s in range(LENGTH)] for t in range(LENGTH)]


def square_map() -> list[list[float]]:
    return [[1.0 if s == t else 0.4 for s in range(LENGTH)] for t in range(LENGTH)]


def influence(tokens: list[list[float]], score: list[float] | None = None) -> dict[str, Any]:
    lower = [v > 1e-6 for t, row in enumerate(tokens) for v in row[: t + 1]]
    return {
        "tokens": tokens,
        "tokens_of": "forward's logits" if score is None else "the last activation per position (second)",
        "score": score,
        "method": "gradient",
        "floor": 1e-6,
        "sees_future": max((v for t, row in enumerate(tokens) for v in row[t + 1 :]), default=0.0),
        "coverage": sum(lower) / max(len(lower), 1),
        "reach": max((t - s for t, row in enumerate(tokens) for s, v in enumerate(row) if v > 1e-6), default=0),
    }


def census(**seen: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"attention": {}, "convolution": {}, "recurrent": {}, "scan": {}, "pooling": {}}
    rest = {"lengths": [11, 23], "depth": [89, 89], "kernel_widths": [], "depth_per_token": 0.0}
    return empty | rest | seen


ATTENTION = {"attention": {"scaled_dot_product_attention": 2}}


def card(role: str, **changes: Any) -> dict[str, Any]:
    scalar = {"reward": "scalar per sequence", "value": "scalar per token"}.get(role)
    shapes = {"reward": ("(batch,) or (batch, 1)", "(3,) or (3, 1)", "(3, 1)"),
              "value": ("(batch, tokens) or (batch, tokens, 1)", "(3, 16) or (3, 16, 1)", "(3, 16, 1)")}  # fmt: skip
    expected, here, measured = shapes.get(role, ("(batch, tokens, vocabulary)", "(3, 16, 97)", "(3, 16, 97)"))
    trains = role in ("policy", "value")
    return {
        "role": role,
        "purpose": {
            "policy": "the language model being aligned",
            "reference": "the frozen policy from before RL, anchor of the KL penalty",
            "reward": "scores a whole response with one number, learnt from preferences",
            "value": "the critic: estimates the return from every state",
        }[role],
        "present": True,
        "class_name": "LlamaForSequenceClassification" if scalar else "LlamaForCausalLM",
        "model_type": "llama",
        "origin": "module",
        "path": None,
        "kind": "transformer decoder",
        "why": "attention, every output sees its past and nothing else (2 calls)",
        "emits": scalar or "vocabulary",
        "emits_expected": scalar or "vocabulary",
        "fits": True,
        "expected_shape": expected,
        "expected_here": here,
        "measured_shape": measured,
        "where": "forward's logits",
        "dtype": "float32",
        "layers": 2,
        "hidden": 32,
        "vocabulary": 97,
        "adapter": None,
        "in_ppo": "trained" if trains else "never trained",
        "parameters": 26848,
        "trainable": 26848 if trains else 0,
        "state": "trained" if trains else "frozen",
        "head": {"kind": "scalar", "name": "score.weight", "width": 1}
        if scalar
        else {"kind": "vocabulary", "name": "lm_head.weight", "width": 97},
        "influence": influence(decoder_map(), [1.0] * LENGTH if role == "reward" else None),
        "census": census(**ATTENTION),
    } | changes


def absent(role: str) -> dict[str, Any]:
    kept = ("role", "purpose", "emits_expected", "expected_shape", "in_ppo")
    whole = card(role)
    return {key: whole[key] if key in kept else None for key in whole} | {"present": False, "state": "unknown"}


PAGE = {
    "What it examines": "What kind of operations run in the model's forward pass, and which tokens each output sees.",
    "Why it matters": "The four models share one architecture, the Transformer decoder, for a reason. The reward model "
    "judges what the policy wrote, so it must be able to see everything the policy can say: a negation forty tokens "
    "before the verb, a fact that contradicts the prompt. It starts from the same pretrained weights, because "
    "preference data is far too small to learn language from.\n\nA network that sees a few tokens at a time can only "
    "learn surface cues, and the policy will find every one of them.",
    "What it looks like when broken": "- The reward rises within a few hundred steps.\n- Answers become repetitive.\n"
    "- Held-out preference accuracy stays near 50%.",
    "How to fix": "1. Start the reward model from the SFT checkpoint: `num_labels=1`.\n2. Train it on preference pairs "
    "until held-out accuracy stops rising.\n3. Run this check again; see also https://arxiv.org/abs/2009.01325.",
    "Source": 'Stiennon et al. 2020, "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325; '
    "Huang et al. 2024, https://arxiv.org/abs/2403.17031.",
}


def finding(code: str, slug: str, role: str, message: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"{code}-{role}",
        "code": code,
        "slug": slug,
        "family": role,
        "title": "the reward model is a Transformer like the policy",
        "role": role,
        "severity": "error",
        "confidence": "proven",
        "message": message,
        "evidence": [
            {
                "quantity": "operations that mix positions",
                "expected": "attention",
                "observed": "2 convolutions of width 3",
                "tolerance": "",
                "where": "first, second",
                "reproduce": "rlhf-doctor check setup.py:build --select " + code,
            }
        ],
        "page": PAGE,
        "cause": None,
        "cause_id": None,
    } | changes


def diagnosed(found: dict[str, Any], *explains: dict[str, Any]) -> dict[str, Any]:
    keys = ("id", "code", "slug", "role", "severity", "confidence", "title", "message")
    return {key: found[key] for key in keys} | {
        "explains": [{key: one[key] for key in ("id", "code", "role")} for one in explains]
    }


def record(**changes: Any) -> dict[str, Any]:
    """A healthy setup's record, with these top-level keys changed and the verdict to match."""
    made: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "rlhf-doctor", "version": "0.1.0"},
        "diagnosis": [],
        "findings": [],
        "hidden": 0,
        "skipped": [],
        "not_run": [],
        "passed": [
            {"code": "POL001", "slug": "policy-not-transformer-decoder", "title": "the policy is a decoder"},
            {"code": "VAL002", "slug": "value-not-scalar-per-state", "title": "the critic gives one scalar per state"},
        ],
        "errors": [],
        "crashed": [],
        "setup": {
            "origin": "setup.py:build",
            "declared": {"gamma": 1.0, "lam": 0.95, "kl_coef": 0.05},
            "trust_remote_code": False,
            "roles": {role: card(role) for role in ("policy", "reference", "reward", "value")},
        },
        "environment": {
            "versions": {"rlhf-doctor": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2",
                         "safetensors": "0.8.0", "python": "3.11.7"},
            "platform": "Linux",
            "command": "rlhf-doctor check setup.py:build",
            "stage": "probe",
            "seed": 0,
            "device": "cpu",
            "dtype": None,
            "started": STARTED,
            "seconds": 1.234,
            "inputs": [{"path": "setup.py", "bytes": 1234, "sha256": "0123456789abcdef" * 4},
                       {"path": "model.safetensors", "bytes": 123456789, "sha256": None}],
        },
    }  # fmt: skip
    made["trace"] = None
    made |= changes
    made["verdict"] = verdict(made)
    return made


def founding() -> dict[str, Any]:
    """A CNN reward model and a GRU critic beside Transformer policies, and what else a report can hold."""
    reward = finding(
        "REW001", "reward-not-transformer", "reward",
        "The reward model is convolutional: its outputs see 2 tokens back, the policy sees everything before. It "
        "should be a Transformer decoder like the policy. Start it from the SFT checkpoint with a linear head of one "
        "output.",
    )  # fmt: skip
    order = finding(
        "REW006", "reward-ignores-order", "reward",
        "The score of a text and of the same text with its sentences exchanged differ by 0.0003. They should differ "
        "about as much as other texts do.",
        title="the score depends on the response", confidence="measured", severity="warning",
        cause="REW001", cause_id="REW001-reward",
    )  # fmt: skip
    value = finding(
        "VAL001", "value-not-transformer", "value",
        "The critic is recurrent: each token's value is computed from the state after the one before. It should be a "
        "Transformer decoder like the policy.",
        title="the critic is a Transformer like the policy",
        evidence=[
            {"quantity": "operations that mix positions", "expected": "attention", "observed": "1 GRU",
             "tolerance": "", "where": "rnn", "reproduce": ""},
            {"quantity": "further operations per further token", "expected": "0", "observed": "6.0",
             "tolerance": "0", "where": "", "reproduce": "rlhf-doctor check setup.py:build --select VAL001"},
        ],
    )  # fmt: skip
    pickle = finding(
        "SYS010", "remote-code-or-pickle", "policy",
        "The policy's checkpoint is a pickle. Save it again as safetensors.",
        title="no checkpoint needs a pickle", severity="warning", confidence="measured",
    )  # fmt: skip
    normal = finding(
        "REW010", "reward-offset", "reward",
        "The reward's mean is −3.2, far from 0. That is normal: the pairwise loss leaves the offset free.",
        title="the reward's offset is known", severity="info", confidence="measured",
    )  # fmt: skip
    return record(
        findings=[reward, order, value, pickle, normal],
        diagnosis=[diagnosed(reward, order), diagnosed(value), diagnosed(pickle)],
        skipped=[
            {"code": "TOK006", "slug": "chat-template-mismatch", "title": "chat templates agree",
             "reason": "needs a tokenizer of each model"},
            {"code": "TOK007", "slug": "retokenisation-drift", "title": "text survives the round trip",
             "reason": "needs a tokenizer of each model"},
            {"code": "VAL003", "slug": "value-sees-future", "title": "values see the past alone",
             "reason": "VAL001 was found: mend that first"},
            {"code": "REW009", "slug": "reward-prefers-rejected", "title": "chosen scores above rejected",
             "reason": "needs preferences"},
        ],
        not_run=[{"code": "ADV001", "slug": "gae", "title": "advantages follow the formula", "stage": "trace"}],
        hidden=1,
        setup={
            "origin": "setup.py:build",
            "declared": {"gamma": 1.0, "lam": 0.95, "kl_coef": 0.05, "algorithm": "ppo"},
            "trust_remote_code": True,
            "roles": {
                "policy": card("policy"),
                "reference": card("reference"),
                "reward": card(
                    "reward", class_name="ConvolutionalScorer", model_type=None, kind="convolutional",
                    why="convolutions over time with kernels of 3 tokens; an output reaches 2 tokens back",
                    measured_shape="(3,)", where="forward's output", parameters=5857, trainable=5857, state="trained",
                    layers=None, hidden=None, head={"kind": "scalar", "name": "out.weight", "width": 1},
                    influence=influence(band_map(), SCORE),
                    census=census(convolution={"convolution": 2}, pooling={"amax": 1}, kernel_widths=[3]),
                ),
                "value": card(
                    "value", class_name="GRUCritic", model_type=None, kind="recurrent",
                    why="each token is computed from the state after the one before (gru); 6.0 further operations deep "
                    "for each further token",
                    measured_shape="(3, 16)", where="forward's output", parameters=6000, trainable=6000,
                    layers=None, hidden=None, head={"kind": "scalar", "name": "out.weight", "width": 1},
                    influence=influence(fading_map()),
                    census=census(recurrent={"gru": 1}, depth=[70, 142], depth_per_token=6.0),
                ),
            },
        },
    )  # fmt: skip


def critic_free() -> dict[str, Any]:
    """GRPO with a function as reward, an adapter-off reference, and one warning."""
    made = record()
    roles = dict(made["setup"]["roles"])
    roles["value"] = absent("value")
    roles["reward"] = absent("reward") | {"present": True, "origin": "callable", "kind": "function",
                                          "class_name": "length_reward", "why": "a function, not a model"}  # fmt: skip
    roles["reference"] = card("reference", origin="adapter-off", adapter="LORA", state="frozen")
    roles["policy"] = card("policy", adapter="LORA", trainable=512, state="partly trained", parameters=7_000_000_000)
    said = "Policy and reference differ in dtype. Use one."
    warned = finding("PRE002", "dtype-gap", "setup", said, severity="warning")
    setup = made["setup"] | {"roles": roles, "declared": {"algorithm": "grpo", "batch_size": 64}}
    return record(findings=[warned], diagnosis=[diagnosed(warned)], setup=setup)


def unreadable() -> dict[str, Any]:
    """Nothing could be read: no verdict on the setup."""
    setup = record()["setup"] | {
        "roles": {role: absent(role) for role in ("policy", "reference", "reward", "value")},
        "declared": {},
    }
    return record(
        setup=setup,
        passed=[],
        errors=[{"role": "policy", "message": "policy: model.safetensors is cut off after 12 of 4,096 bytes."}],
        crashed=[{"code": "POL004", "traceback": "Traceback (most recent call last):\n  ...\nKeyError: 'x'"}],
    )


def static() -> dict[str, Any]:
    """Files alone were read: nothing was measured."""
    made = record()
    unmeasured = dict.fromkeys(
        ("kind", "why", "emits", "fits", "expected_here", "measured_shape", "where", "dtype", "parameters",
         "trainable", "influence", "census")
    )  # fmt: skip
    roles = {
        role: one | unmeasured | {"state": "unknown", "origin": "checkpoint", "path": f"/models/{role}"}
        for role, one in made["setup"]["roles"].items()
    }
    return record(setup=made["setup"] | {"roles": roles}, environment=made["environment"] | {"stage": "static"})


def foreign() -> dict[str, Any]:
    """A state-space policy, an encoder as reward, a critic that sees its own token alone; the same code twice."""
    made = record()
    roles = dict(made["setup"]["roles"])
    roles["policy"] = card("policy", kind="hybrid state space", census=census(**ATTENTION, scan={"cumsum": 2}))
    roles["reward"] = card("reward", kind="transformer encoder", influence=influence(square_map(), [1.0] * LENGTH))
    diagonal = [[float(s == t) for s in range(LENGTH)] for t in range(LENGTH)]
    roles["value"] = card("value", kind="per-token", influence=influence(diagonal), census=census(), fits=False,
                          emits="vector per token", measured_shape="(3, 16, 2)")  # fmt: skip
    first = finding("POL001", "policy-not-transformer-decoder", "policy", "The policy is a hybrid. Use a decoder.")
    second = first | {"id": "POL001-policy-2", "message": "The policy has a scan. Use a decoder."}
    return record(findings=[first, second], diagnosis=[diagnosed(first), diagnosed(second)],
                  setup=made["setup"] | {"roles": roles})  # fmt: skip


def influence_row(edge: str, expected: bool | None, measured: bool | None, **changes: Any) -> dict[str, Any]:
    verdict = "unknown" if measured is None else "undeclared" if expected is None else ""
    verdict = verdict or {(True, True): "there", (True, False): "missing", (False, True): "unexpected"}.get(
        (expected, measured), "none"
    )
    ends = {"value target": "value", "reward": "reward"}
    start, end = edge.split(" → ")
    return {
        "edge": edge,
        "from": start,
        "to": ends.get(end, "policy"),
        "means": f"the {start} enters the {end}",
        "expected": expected,
        "why": "PPO has it so",
        "measured": measured,
        "gain": 1.0 if measured else None,
        "reason": "",
        "verdict": verdict,
    } | changes


def updated_row(role: str, measured: bool | None, verdict: str = "", **changes: Any) -> dict[str, Any]:
    expected = role in ("policy", "value")
    return {
        "role": role,
        "expected": expected,
        "measured": measured,
        "tensors": 21 if measured else 0,
        "largest": 0.0023 if measured else None,
        "reason": "",
        "verdict": verdict or ("there" if measured else "none"),
    } | changes


def number_row(name: str, declared: Any, measured: Any, reason: str = "") -> dict[str, Any]:
    agrees = None if declared is None or measured is None else declared == measured
    return {"name": name, "declared": declared, "measured": measured, "agrees": agrees, "reason": reason}


def token_row(name: str, measured: list[Any], declared: list[Any] | None = None, reason: str = "") -> dict[str, Any]:
    differs = [a != b for a, b in zip(measured, declared or measured, strict=True)]
    return {"name": name, "measured": measured, "declared": declared, "differs": differs, "reason": reason}


def tokens() -> list[dict[str, Any]]:
    words = ("The", " cat", " sat", "\n", " on", " <b>it</b>", "</s>", "<pad>")
    return [
        {"id": 40 + n, "text": word, "counted": n < 7, "trained": True, "offset": -1 if n == 5 else 0}
        for n, word in enumerate(words)
    ]


def traced() -> dict[str, Any]:
    """A step whose critic is trained on the KL alone: the score is missing, a loss term too many, numbers differ."""
    ignores = finding(
        "VAL009", "value-ignores-reward", "value",
        "The critic's training ignores the reward: with all 16 scores changed, the critic's gradient is identical to "
        "the last bit. It should be trained towards returns that hold the score.",
        title="the critic learns from the reward model's scores",
    )  # fmt: skip
    trace = {
        "answer": {
            "question": "Does the critic learn from the reward model's scores?",
            "learns": "no",
            "sentence": "No. With the scores of 16 responses changed, the critic's gradient stayed identical to the "
            "last bit.",
            "gain": 0.0,
            "changed": 16,
            "responded": 0,
            "identical": True,
        },
        "sentence": "Missing: reward → value target. Not expected, but there: reference → loss. Updated, but should "
        "not be: reference. Not measured: value → advantage.",
        "changed": ["one score", "all scores", "rollout outputs"],
        "unchanged": "",
        "wiring": [
            influence_row("reward → value target", True, False, gain=0.0, reason="identical to the last bit"),
            influence_row("reward → policy", True, True),
            influence_row("value → advantage", True, None, reason="no rollout value was seen that could be changed"),
            influence_row("reference → reward", None, True, gain=0.05, why="kl_in is not declared"),
            influence_row("reference → loss", False, True, gain=0.05),
        ],
        "updated": [
            updated_row("policy", True),
            updated_row("reference", True, "unexpected", tensors=2),
            updated_row("reward", False, reason="it has no parameters"),
            updated_row("value", True),
        ],
        "numbers": [
            number_row("temperature", 1.0, 1.0),
            number_row("gamma", 1.0, 0.99),
            number_row("lambda", 0.95, 0.95),
            number_row("gamma · lambda", 0.95, 0.9405),
            number_row("KL weight", "0.05 in the reward", "0.05 in the reward and 0.05 in the loss"),
            number_row("aggregation", None, "token-mean"),
            number_row("whitening", "whitened", None, "returns − values do not explain the policy's weights"),
        ],
        "sample": {
            "number": 3,
            "of": 16,
            "changed": True,
            "ended": True,
            "prompt": "Where is the cat?",
            "score": -0.4533,
            "left_out": 12,
            "left_out_after": 4,
            "tokens": tokens(),
            "rows": [
                token_row("reward", [0.0, -0.01, 0.0, 0.02, 0.0, 0.0, 0.0, None],
                          [0.0, -0.01, 0.0, 0.02, 0.0, 0.0, -0.4533, None]),
                token_row("value", [0.1, 0.2, -0.1, 0.0, 0.1, 0.2, 0.3, None]),
                token_row("return", [0.01, 0.01, 0.02, 0.02, 0.0, 0.0, 0.0, None],
                          [0.01, 0.01, 0.02, 0.02, 0.0, 0.0, 0.0, None]),
                token_row("advantage", [None] * 8, None, "returns − values do not explain the policy's weights"),
                token_row("weight in the loss", [0.013, -0.0042, 0.1, 0.2, 1e-7, -123456.0, 0.1, 0.2]),
            ],
        },
    }  # fmt: skip
    return record(findings=[ignores], diagnosis=[diagnosed(ignores)], trace=trace,
                  environment=record()["environment"] | {"stage": "trace"})  # fmt: skip


def watched() -> dict[str, Any]:
    """A step that was only watched, of an algorithm without a critic: nothing was changed, no sample was seen."""
    reason = "the step was watched and not run again"
    unknown = {"measured": None, "gain": None, "reason": reason, "verdict": "unknown"}
    names = ("reward → value target", "reward → policy", "value → advantage", "reference → reward", "reference → loss")
    trace = {
        "answer": traced()["trace"]["answer"]
        | {"learns": "unknown", "sentence": f"Not known: {reason}.", "gain": None, "changed": 0, "identical": False},
        "sentence": "The wiring could not be measured.",
        "changed": [],
        "unchanged": reason,
        "wiring": [influence_row(name, True, None) | unknown for name in names],
        "updated": [
            updated_row("policy", None, "unknown", reason="no whole step was seen"),
            updated_row("reference", None, "unknown", reason="it is the policy with its adapter off"),
            updated_row("reward", False),
            updated_row("value", None, "absent", reason="not part of this run"),
        ],
        "numbers": [number_row("temperature", None, None, "no gradient was seen at the policy's head")],
        "sample": None,
    }
    made = critic_free()
    return record(setup=made["setup"], trace=trace)


EVERY = {
    "traced": traced,
    "watched": watched,
    "foreign": foreign,
    "healthy": record,
    "founding": founding,
    "critic_free": critic_free,
    "unreadable": unreadable,
    "static": static,
}


def visible_text(page: str) -> str:
    """What a reader of the page sees, a line an element, without styles, scripts and the embedded record."""
    text = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    text = re.sub(r"</?(?:code|b|bdi|a|small|strong|span|em)\b[^>]*>", "", text)
    lines = (" ".join(html.unescape(line).split()) for line in re.sub(r"<[^>]*>", "\n", text).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def golden() -> dict[str, str]:
    """File name -> text of every golden file."""
    from rlhf_doctor.report import html as page
    from rlhf_doctor.report import json_, markdown, terminal

    made = founding()
    return {
        "founding.page.txt": visible_text(page.render(made)),
        "founding.terminal.txt": terminal.render(made, width=60),
        "founding.md": markdown.render(made),
        "founding.json": json_.render(made),
        "traced.page.txt": visible_text(page.render(traced())),
        "traced.terminal.txt": terminal.render(traced(), width=60),
        "traced.md": markdown.render(traced()),
        "critic_free.page.txt": visible_text(page.render(critic_free())),
        "unreadable.page.txt": visible_text(page.render(unreadable())),
        "unreadable.terminal.txt": terminal.render(unreadable(), width=60),
    }


GOLDEN = pathlib.Path(__file__).parent / "report" / "golden"

if __name__ == "__main__":  # writes the golden files again: read the difference before it is kept
    for name, text in golden().items():
        (GOLDEN / name).write_text(text, encoding="utf-8")
