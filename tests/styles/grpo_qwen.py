"""Group-relative training of a tiny Qwen2: GRPO, DAPO and Dr. GRPO from one loop; rewards from rules, a model, or both."""

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

CORPUS = [
    "count to three : one two three",
    "count to five : one two three four five",
    "say a colour : green is a colour",
    "say a number : seven is a number",
    "name an animal : a horse is an animal",
    "name a city : paris is a city",
    "which is larger : nine is larger than six",
    "which is smaller : two is smaller than eight",
    "spell out ten : t e n makes ten",
    "what comes next : after four comes five",
]
QUESTIONS = ["count to three :", "say a colour :", "name a city :", "which is larger :"]


def setup_tokenizer():
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    t.train_from_iterator(
        CORPUS * 3,
        trainers.UnigramTrainer(
            vocab_size=110, special_tokens=["<|pad|>", "<|im_end|>", "<|unk|>"], unk_token="<|unk|>"
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        padding_side="left",
    )


def rule_reward(prompts, responses):
    """New words are good, words of the prompt and repetitions are not."""
    out = []
    for p, r in zip(prompts, responses):
        words = r.split()
        asked = set(p.split())
        fresh = len({w for w in words if w not in asked})
        out.append(0.4 * fresh - 0.5 * (len(words) - len(set(words))) - 0.3 * sum(w in asked for w in words) - 1.0)
    return out


def sft(model, tok):
    enc = tok([c + tok.eos_token for c in CORPUS], return_tensors="pt", padding=True)
    labels = enc.input_ids.masked_fill(enc.attention_mask == 0, -100)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        opt.zero_grad()
        model(**enc, labels=labels).loss.backward()
        opt.step()
    model.zero_grad(set_to_none=True)


def build_judge(config, tok):
    judge = Qwen2ForSequenceClassification(config).eval()
    enc = tok([c + tok.eos_token for c in CORPUS], return_tensors="pt", padding=True)
    with torch.no_grad():
        h = judge.model(**enc).last_hidden_state[:, 6:][enc.attention_mask[:, 6:] > 0]
        centre = h.mean(0)
        w = torch.randn_like(centre)
        w -= (w @ centre) / (centre @ centre) * centre
        judge.score.weight.copy_((w / (h @ w).std())[None])
    return judge.requires_grad_(False)


def per_token(model, ids, mask, width, temperature):
    pos = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=pos, use_cache=False).logits[:, -width - 1 : -1]
    return -F.cross_entropy((logits / temperature).flatten(0, 1), ids[:, -width:].flatten(), reduction="none").view(
        len(ids), width
    )


def make(fault=None, flavour="grpo"):
    torch.manual_seed(3)
    tok = setup_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tok),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=96,
        tie_word_embeddings=flavour == "grpo",
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        num_labels=1,
    )
    model = Qwen2ForCausalLM(config)
    sft(model, tok)
    model.eval()
    ref = None
    if flavour != "dapo":
        ref = Qwen2ForCausalLM(config).eval()
        ref.load_state_dict(model.state_dict())
        ref.requires_grad_(False)
    judge = None if flavour == "grpo" else build_judge(config, tok)
    G, new, T = 4, 14, 0.9 if flavour == "grpo" else 1.0
    low, high = (0.2, 0.28) if flavour == "dapo" else (0.2, 0.2)
    beta = {"grpo": 0.04, "dapo": 0.0, "drgrpo": 0.1}[flavour]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01)
    questions = [q for q in QUESTIONS for _ in range(G)]  # the G answers to one question stand together
    enc = tok(questions, return_tensors="pt", padding=True)

    def score(ids, mask, answers, finished):
        if flavour == "grpo":
            return torch.tensor(rule_reward(questions, answers))
        with torch.no_grad():
            pos = (mask.cumsum(1) - 1).clamp(min=0)
            points = judge(input_ids=ids, attention_mask=mask, position_ids=pos).logits.squeeze(-1)
        if flavour == "drgrpo":  # the judge and, for the form, a rule
            return points + torch.tensor([0.5 if len(a.split()) >= 3 else -0.5 for a in answers])
        return points - 0.5 * (~finished).float()

    def group_advantages(r):
        if fault == "groups_across_questions":
            g = r.view(G, -1)
            return ((g - g.mean(0)) / (g.std(0) + 1e-4)).view(-1)
        g = r.view(-1, G)
        centred = g - g.mean(1, keepdim=True)
        if flavour != "drgrpo":
            centred = centred / (g.std(1, keepdim=True) + 1e-4)
        return centred.reshape(-1)

    def objective(rows, ids, mask, action, adv, old, anchor):
        lp = per_token(model, ids[rows], mask[rows], action.shape[1], T)
        act, a = action[rows], adv[rows, None]
        ratio = torch.exp((lp - old[rows]) * act)
        loss = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
        if beta:
            d = (anchor[rows] - lp) * act
            if flavour == "drgrpo":
                kl = 0.5 * d**2
            elif fault == "k1_in_loss":
                kl = -d
            else:
                kl = d.exp() - d - 1
            loss = loss + beta * kl
        loss = loss * act
        if flavour == "grpo":
            return (loss.sum(1) / act.sum(1)).mean()
        if flavour == "dapo":
            return loss.sum() / act.sum()
        return (loss.sum(1) / new).mean()

    def step():
        with torch.no_grad():
            ids = model.generate(**enc, do_sample=True, temperature=T, top_k=0, top_p=1.0, max_new_tokens=new)
            width = ids.shape[1] - enc.input_ids.shape[1]
            comp = ids[:, -width:]
            eos = comp == tok.eos_token_id
            first = torch.where(eos.any(1), eos.int().argmax(1), width)
            action = (torch.arange(width)[None] <= first[:, None]).float()
            mask = torch.cat([enc.attention_mask, action.long()], 1)
            answers = [tok.decode(c[: int(n)], skip_special_tokens=True) for c, n in zip(comp, action.sum(1))]
            rewards = score(ids, mask, answers, eos.any(1))
            adv = group_advantages(rewards)
            old = per_token(model, ids, mask, width, T)
            anchor = per_token(ref, ids, mask, width, T) if ref is not None else None
            rows = torch.arange(len(ids))
            if flavour == "dapo":  # dynamic sampling: a question whose answers are all alike teaches nothing
                rows = rows[(rewards.view(-1, G).std(1) > 1e-6).repeat_interleave(G)]
        if len(rows) == 0:
            return {"reward": rewards.mean().item()}
        epochs, parts = (2, 2) if flavour == "drgrpo" else (1, 1)
        for _ in range(epochs):
            for part in rows[torch.randperm(len(rows))].chunk(parts):
                optimizer.zero_grad()
                objective(part, ids, mask, action, adv, old, anchor).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        return {"reward": rewards.mean().item(), "completion_length": action.sum(1).mean().item()}

    declared = {
        "grpo": dict(
            algorithm="grpo",
            group_size=4,
            kl_coef=0.04,
            kl_in="loss",
            kl_estimator="k3",
            temperature=0.9,
            clip_range=0.2,
            loss_aggregation="seq-mean",
            ppo_epochs=1,
            learning_rate=2e-5,
            batch_size=16,
            response_length=14,
            policy_init="sft",
        ),
        "dapo": dict(algorithm="grpo", group_size=4, loss_aggregation="token-mean", missing_eos_penalty=0.5),
        "drgrpo": dict(algorithm="grpo", group_size=4, kl_coef=0.1, kl_in="loss", kl_estimator="k2"),
    }[flavour]
    return dict(
        policy=model,
        reference=ref,
        reward=rule_reward if judge is None else judge,
        tokenizer=tok,
        prompts=QUESTIONS,
        optimizers=[optimizer],
        step=step,
        declared=declared,
    )


def healthy():
    return make()


def healthy_dapo():
    return make(flavour="dapo")


def healthy_dr_grpo_mixed_rewards():
    return make(flavour="drgrpo")


def groups_across_questions():
    return make("groups_across_questions")


def k1_in_loss():
    return make("k1_in_loss")
