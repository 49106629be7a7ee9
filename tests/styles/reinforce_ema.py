"""Plain REINFORCE: one update per batch, no ratio, a moving-average baseline, KL in the rewards-to-go, everything right-padded."""

import copy

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributions import Categorical
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

SUBJ, VERB, OBJ = (
    "he she they we nobody".split(),
    "likes sees eats finds wants keeps".split(),
    "fish bread tea books shoes keys rain light".split(),
)
MISC = "and then but very old new red blue today again never always slowly".split()
VOCAB = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *SUBJ, *VERB, *OBJ, *MISC])}
PROMPTS = [
    "he likes",
    "she",
    "they never wants",
    "nobody sees old shoes and",
    "we eats fish but",
    "today he finds",
    "she keeps",
    "then",
    "we always likes very new",
    "they",
    "again nobody wants tea and bread and",
    "blue fish",
]
BATCH, MAX_NEW, BETA, LR, DECAY = 12, 10, 0.1, 2e-5, 0.9


class MovingAverage:
    """Baseline: what batches have earned lately."""

    def __init__(self, decay):
        self.decay, self.value = decay, None

    def update(self, x):
        self.value = x if self.value is None else self.decay * self.value + (1 - self.decay) * x

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, d):
        self.value = d["value"]


def pretrain(model, eos, n=50):
    """A little language: short clauses of any length."""
    opt = torch.optim.Adam(model.parameters(), 6e-3)
    ids_of = lambda words: [VOCAB[w] for w in words]
    for _ in range(n):
        ids, labels = torch.zeros(16, 14, dtype=torch.long), torch.full((16, 14), -100)
        for row in range(16):
            r = lambda k: int(torch.randint(k, ()))
            words = []
            for _ in range(1 + r(3)):
                words += [SUBJ[r(5)], VERB[r(6)]] + ([MISC[r(13)]] if r(2) else []) + [OBJ[r(8)]]
            seq = (ids_of(words) + [eos])[r(3) :][:14]
            ids[row, : len(seq)] = labels[row, : len(seq)] = torch.tensor(seq)
        loss = model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss
        opt.zero_grad()
        loss.backward()
        opt.step()


def make(fault=None):
    torch.manual_seed(5)
    raw = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )
    PAD, EOS = tok.pad_token_id, tok.eos_token_id
    cfg = dict(
        vocab_size=len(VOCAB),
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=40,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=EOS,
    )
    actor = GPT2LMHeadModel(GPT2Config(**cfg))
    pretrain(actor, EOS)
    actor.eval()
    sft = copy.deepcopy(actor).requires_grad_(False)
    judge = (
        GPT2ForSequenceClassification(GPT2Config(**cfg, num_labels=1, initializer_range=0.15))
        .eval()
        .requires_grad_(False)
    )
    with torch.no_grad():
        h = judge.transformer(torch.randint(1, len(VOCAB), (128, 12))).last_hidden_state[:, -1]
        w, m = judge.score.weight[0], h.mean(0)
        w -= m * (w @ m) / (m @ m)
        w /= (h @ w).std()
    opt = torch.optim.Adam(actor.parameters(), lr=LR)
    baseline = MovingAverage(DECAY)

    @torch.no_grad()
    def sample(texts):
        """Writes each row's tokens directly behind its prompt; pads only ever stand on the right."""
        enc = tok(texts, padding=True, return_tensors="pt")
        start = enc.attention_mask.sum(1)
        ids = torch.cat([enc.input_ids, torch.full((len(texts), MAX_NEW), PAD)], 1)
        length, alive, rows = start.clone(), torch.ones(len(texts), dtype=torch.bool), torch.arange(len(texts))
        for _ in range(MAX_NEW):
            att = (torch.arange(ids.size(1)) < length[:, None]).long()
            logits = actor(input_ids=ids, attention_mask=att).logits[rows, length - 1]
            token = Categorical(logits=logits).sample()
            ids[rows[alive], length[alive]] = token[alive]
            length = length + alive.long()
            alive = alive & (token != EOS)
            if not alive.any():
                break
        return ids[:, : int(length.max())], start, length

    def token_logp(model, ids, att):
        logits = model(input_ids=ids, attention_mask=att).logits
        if fault == "shifted":  # the distribution after a token, asked for that same token
            return logits.log_softmax(-1)[:, 1:].gather(2, ids[:, 1:, None]).squeeze(2)
        return logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)

    def step():
        texts = [PROMPTS[i] for i in torch.randperm(len(PROMPTS))[:BATCH]]
        ids, start, length = sample(texts)
        t = torch.arange(ids.size(1))
        att = (t < length[:, None]).long()
        acts = ((t >= start[:, None]) & (t < length[:, None]))[:, 1:]
        with torch.no_grad():
            score = judge(input_ids=ids, attention_mask=att).logits.squeeze(-1)
            ref = token_logp(sft, ids, att)
        logp = token_logp(actor, ids, att)
        log_ratio = (logp.detach() - ref) * acts
        reward = BETA * log_ratio if fault == "kl_bonus" else -BETA * log_ratio
        reward[torch.arange(len(ids)), length - 2] += score  # columns are those of ids[:, 1:]
        togo = reward.flip(1).cumsum(1).flip(1)
        b = score.mean().item() if baseline.value is None else baseline.value
        advantage = togo - b
        loss = -(advantage * logp * acts).sum() / acts.sum()
        if fault != "never_zeroed":
            opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(actor.parameters(), 5.0)
        opt.step()
        baseline.update(togo[torch.arange(len(ids)), start - 1].mean().item())
        return {"loss": loss.item(), "score": score.mean().item(), "kl": log_ratio.sum(1).mean().item(), "baseline": b}

    return dict(
        policy=actor,
        reference=sft,
        reward=judge,
        value=None,
        tokenizer=tok,
        prompts=PROMPTS,
        optimizers=[opt],
        state=[baseline],
        step=step,
        declared=dict(
            algorithm="reinforce",
            gamma=1.0,
            lam=1.0,
            kl_coef=BETA,
            kl_in="reward",
            kl_estimator="k1",
            temperature=1.0,
            learning_rate=LR,
            batch_size=BATCH,
            response_length=MAX_NEW,
            ppo_epochs=1,
            num_minibatches=1,
            whiten_advantages=False,
            loss_aggregation="token-mean",
        ),
    )


def healthy():
    return make()


def kl_bonus():
    return make("kl_bonus")


def never_zeroed():
    return make("never_zeroed")


def shifted():
    return make("shifted")
