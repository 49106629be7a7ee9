"""GSPO in the manner of prime-rl: an inference engine with its own copy of the weights that keeps the log-probs of what it
draws, bins of packed rows with restarting position ids, sequence-level ratio, truncated importance correction (TIS)
between engine and trainer, k2 KL in the loss, everything summed and divided by one global number of sequences."""

import copy

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel, PreTrainedTokenizerFast

VERBS = "open close read write move copy find sort merge split print clear start stop check build".split()
NOUNS = "file list table page line word block tree graph queue stack buffer index record field name value row column key node edge path".split()
GLUE = "a the into from of with by each all no two first last next empty full".split()
PROMPTS = [
    "sort the list", "read", "merge two tree into a graph", "clear all", "find the last empty row of each table",
    "move the first node with no edge", "print page by page", "split line", "build a full index", "check each key of the record",
    "copy", "stop the next queue",
]  # fmt: skip
PAD, EOS = 0, 1

GROUPS_PER_STEP, GROUP = 4, 4
MAX_NEW, TEMPERATURE = 8, 0.85
SEQ_LEN, MINIBATCHES = 48, 2
CLIP_LOW, CLIP_HIGH, TIS_CAP = 3e-4, 4e-4, 2.0
BETA, LR = 0.02, 5e-5


def make_tokenizer():
    vocab = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *VERBS, *NOUNS, *GLUE])}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def config(vocab, **more):
    return GPTNeoXConfig(
        vocab_size=vocab, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, pad_token_id=PAD,
        eos_token_id=EOS, bos_token_id=None, hidden_dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False, **more,
    )  # fmt: skip


class ScoreModel(nn.Module):
    """Backbone, linear head, the score of the last real token; batches are padded on the right."""

    def __init__(self, cfg, last_column=False):
        super().__init__()
        self.config, self.last_column = cfg, last_column
        self.gpt_neox = GPTNeoXModel(cfg)
        self.v_head = nn.Linear(cfg.hidden_size, 1)

    def forward(self, input_ids, attention_mask):
        values = self.v_head(self.gpt_neox(input_ids, attention_mask=attention_mask).last_hidden_state)[..., 0]
        if self.last_column:
            return values[:, -1]
        index = (torch.arange(input_ids.shape[1]) * attention_mask).argmax(-1)
        return values.gather(1, index[:, None])[:, 0]


def pretrain(model):
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    v, n, g = torch.arange(3, 3 + len(VERBS) + len(NOUNS) + len(GLUE)).split([len(VERBS), len(NOUNS), len(GLUE)])
    for _ in range(60):
        batch = torch.zeros(16, 16, dtype=torch.long)
        for row in batch:
            length = int(torch.randint(4, 14, ()))
            for j in range(length):
                pool = (v, g, n)[j % 3]
                row[j] = pool[int(torch.randint(len(pool) if torch.rand(()) < 0.4 else 4, ()))]
            row[length] = EOS
        mask = (batch != PAD).long()
        model(input_ids=batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss.backward()
        opt.step()
        opt.zero_grad()


class Progress:
    def __init__(self):
        self.step, self.next_prompt = 0, 0

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, sd):
        vars(self).update(sd)


def make(fault=None):
    torch.manual_seed(1234)
    tok = make_tokenizer()
    policy = GPTNeoXForCausalLM(config(len(tok), hidden_size=48, intermediate_size=128, initializer_range=0.05))
    pretrain(policy)
    reference = policy if fault == "reference_is_policy" else copy.deepcopy(policy).eval().requires_grad_(False)
    engine = copy.deepcopy(policy).eval().requires_grad_(False)
    reward = ScoreModel(
        config(len(tok), hidden_size=32, intermediate_size=64, initializer_range=0.3),
        last_column=fault == "score_at_last_column",
    )
    with torch.no_grad():
        text = torch.randint(3, len(tok), (128, 10))
        s = reward(text, torch.ones_like(text))
        reward.v_head.weight /= s.std()
        reward.v_head.bias.copy_(reward.v_head.bias - reward(text, torch.ones_like(text)).mean())
    reward.eval().requires_grad_(False)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=400)
    progress = Progress()

    def update_weights():
        if fault == "engine_never_updated":
            return
        engine.load_state_dict(policy.state_dict())

    @torch.no_grad()
    def infer(prompts):
        """The engine draws and returns for each request the ids and the log-probs that it drew them with."""
        enc = tok(prompts, return_tensors="pt", padding=True)
        ids, mask = enc["input_ids"], enc["attention_mask"]
        alive = torch.ones(len(prompts), dtype=torch.bool)
        out = [{"prompt": row[m.bool()].tolist(), "completion": [], "logprobs": []} for row, m in zip(ids, mask)]
        for _ in range(MAX_NEW):
            pos = (mask.cumsum(1) - 1).clamp(min=0)
            logits = engine(input_ids=ids, attention_mask=mask, position_ids=pos, use_cache=False).logits[:, -1]
            dist = F.log_softmax(logits / TEMPERATURE, -1)
            nxt = torch.multinomial(dist.exp(), 1).masked_fill(~alive[:, None], PAD)
            report = F.log_softmax(logits, -1) if fault == "raw_engine_logprobs" else dist
            lp = report.gather(1, nxt)[:, 0]
            for i in torch.nonzero(alive)[:, 0].tolist():
                out[i]["completion"].append(int(nxt[i]))
                out[i]["logprobs"].append(float(lp[i]))
            ids = torch.cat([ids, nxt], 1)
            mask = torch.cat([mask, alive.long()[:, None]], 1)
            alive &= nxt[:, 0] != EOS
            if not alive.any():
                break
        return out

    @torch.no_grad()
    def score(samples):
        rows = [s["prompt"] + s["completion"] for s in samples]
        width = max(map(len, rows))
        ids = torch.tensor([r + [PAD] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        return reward(ids, mask)

    def pack(samples):
        """First fit, longest first; a bin is one row of SEQ_LEN tokens."""
        bins = []
        for s in sorted(samples, key=lambda s: -len(s["prompt"]) - len(s["completion"])):
            size = len(s["prompt"]) + len(s["completion"])
            room = next(
                (b for b in bins if sum(len(x["prompt"]) + len(x["completion"]) for x in b) + size <= SEQ_LEN), None
            )
            if room is None:
                bins.append([s])
            else:
                room.append(s)
        return [to_micro_batch(b) for b in bins]

    def to_micro_batch(samples):
        keys = ("input_ids", "position_ids", "segment", "loss_mask", "advantages", "inference_logprobs")
        mb = {k: [] for k in keys}
        for i, s in enumerate(samples):
            p, c = len(s["prompt"]), len(s["completion"])
            mb["input_ids"] += s["prompt"] + s["completion"]
            mb["position_ids"] += range(p + c)
            mb["segment"] += [i] * (p + c)
            mb["loss_mask"] += [False] * p + [True] * c
            mb["advantages"] += [s["advantage"]] * (p + c)
            if fault == "engine_logprobs_shifted":
                mb["inference_logprobs"] += ([0.0] * p + s["logprobs"])[1:] + [0.0]
            else:
                mb["inference_logprobs"] += [0.0] * p + s["logprobs"]
        tail = SEQ_LEN - len(mb["input_ids"])
        fill = {"input_ids": PAD, "segment": -1, "loss_mask": False, "advantages": 0.0, "inference_logprobs": 0.0}
        for k, x in fill.items():
            mb[k] += [x] * tail
        mb["position_ids"] += range(tail)
        mb = {k: torch.tensor(v)[None] for k, v in mb.items()}
        mb["count"] = len(samples)
        return mb

    def logprobs(model, mb):
        """Log-prob of each token of the row given what stands before it in its own segment; 0 for the first."""
        seg = mb["segment"][0]
        if fault == "segments_see_each_other":
            attention = torch.ones_like(mb["input_ids"])
        else:
            ok = (seg[:, None] == seg[None, :]).tril()
            attention = torch.zeros(ok.shape).masked_fill(~ok, torch.finfo(torch.float32).min)[None, None]
        logits = model(
            input_ids=mb["input_ids"], position_ids=mb["position_ids"], attention_mask=attention, use_cache=False
        ).logits
        lp = F.log_softmax(logits[:, :-1] / TEMPERATURE, -1).gather(-1, mb["input_ids"][:, 1:, None])[..., 0]
        return F.pad(lp, (1, 0))

    def segment_mean(x, mb):
        """Mean over each sequence's completion, at every one of its tokens."""
        seg, mask = mb["segment"][0], mb["loss_mask"][0]
        member = F.one_hot(seg.clamp(min=0), mb["count"]).to(x.dtype) * mask[:, None]
        return member @ ((x[0] @ member) / member.sum(0)), member.sum(0)

    def loss_fn(mb, sequences, n_bins):
        new = logprobs(policy, mb)
        mask, adv = mb["loss_mask"][0], mb["advantages"][0]
        log_ratio, lengths = segment_mean(new - mb["trainer_logprobs"], mb)
        ratio = torch.exp(log_ratio)
        clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        if fault == "clip_takes_the_larger":
            objective = torch.maximum(ratio * adv, clipped * adv)
        else:
            objective = torch.minimum(ratio * adv, clipped * adv)
        tis = torch.exp(mb["trainer_logprobs"] - mb["inference_logprobs"]).clamp(max=TIS_CAP)[0].detach()
        kl = 0.5 * (new - mb["reference_logprobs"])[0].square()
        beta = BETA
        if fault == "kl_divided_twice":
            beta = BETA / n_bins
        if fault == "kl_subtracted":
            per_token = -tis * objective - beta * kl
        else:
            per_token = -tis * objective + beta * kl
        seg = mb["segment"][0].clamp(min=0)
        per_sequence = per_token.masked_fill(~mask, 0.0) / lengths[seg]
        if fault == "mean_over_bins":
            return per_sequence.sum() / mb["count"] / n_bins
        return per_sequence.sum() / sequences

    def step():
        update_weights()
        start = progress.next_prompt
        texts = [PROMPTS[(start + k) % len(PROMPTS)] for k in range(GROUPS_PER_STEP)]
        progress.next_prompt = (start + GROUPS_PER_STEP) % len(PROMPTS)
        samples = infer([t for t in texts for _ in range(GROUP)])
        rewards = score(samples).view(GROUPS_PER_STEP, GROUP)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)).flatten()
        for s, a in zip(samples, advantages.tolist()):
            s["advantage"] = a

        order = torch.randperm(len(samples)).tolist()
        size = len(samples) // MINIBATCHES
        batches = [pack([samples[i] for i in order[k : k + size]]) for k in range(0, len(order), size)]
        with torch.no_grad():
            for mb in (mb for bins in batches for mb in bins):
                mb["trainer_logprobs"] = logprobs(policy, mb)
                mb["reference_logprobs"] = logprobs(reference, mb)
        total = 0.0
        for bins in batches:
            sequences = sum(mb["count"] for mb in bins)
            for mb in bins:
                loss = loss_fn(mb, sequences, len(bins))
                loss.backward()
                total += float(loss)
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        progress.step += 1
        return {"loss": total, "reward": float(rewards.mean())}

    return {
        "policy": policy,
        "reference": reference,
        "reward": reward,
        "value": None,
        "tokenizer": tok,
        "prompts": PROMPTS,
        "optimizers": [optimizer],
        "state": [scheduler, engine, progress],
        "step": step,
        "declared": {
            "algorithm": "grpo",
            "group_size": GROUP,
            "kl_coef": BETA,
            "kl_estimator": "k2",
            "kl_in": "loss",
            "temperature": TEMPERATURE,
            "clip_range": (CLIP_LOW, CLIP_HIGH),
            "loss_aggregation": "seq-mean",
            "ppo_epochs": 1,
            "num_minibatches": MINIBATCHES,
            "batch_size": GROUPS_PER_STEP * GROUP,
            "response_length": MAX_NEW,
            "learning_rate": LR,
        },
    }


def healthy():
    return make()


def reference_is_policy():
    return make("reference_is_policy")


def score_at_last_column():
    return make("score_at_last_column")


def engine_never_updated():
    return make("engine_never_updated")


def raw_engine_logprobs():
    return make("raw_engine_logprobs")


def engine_logprobs_shifted():
    return make("engine_logprobs_shifted")


def segments_see_each_other():
    return make("segments_see_each_other")


def clip_takes_the_larger():
    return make("clip_takes_the_larger")


def kl_divided_twice():
    return make("kl_divided_twice")


def kl_subtracted():
    return make("kl_subtracted")


def mean_over_bins():
    return make("mean_over_bins")
