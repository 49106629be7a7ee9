"""A PPO full-finetune recipe after torchtune's: plain decoders that return tensors, masks and positions given to every call."""

import copy
import random
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast


class Trajectory(NamedTuple):
    query_responses: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    masks: torch.Tensor
    position_ids: torch.Tensor
    response_padding_masks: torch.Tensor
    value_padding_masks: torch.Tensor
    value_seq_idxs: torch.Tensor
    scores: torch.Tensor
    seq_lens: torch.Tensor


class PPOStats(NamedTuple):
    loss: torch.Tensor
    policy_loss: torch.Tensor
    value_loss: torch.Tensor
    ratios: torch.Tensor
    clipfrac: torch.Tensor
    approx_policy_kls: torch.Tensor


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


class MultiHeadAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.register_buffer(
            "theta", 10_000.0 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim), persistent=False
        )

    def rope(self, x, input_pos):
        angle = (input_pos[..., None] * self.theta)[:, None]  # [b, 1, s, d/2]
        a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return (
            torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
            .flatten(3)
            .type_as(x)
        )

    def forward(self, x, mask, input_pos):
        q, k, v = (
            p(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(self.rope(q, input_pos), self.rope(k, input_pos), v, attn_mask=mask)
        return self.output_proj(out.transpose(1, 2).flatten(2))


class TransformerSelfAttentionLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn, self.sa_norm, self.mlp_norm = MultiHeadAttention(dim, heads), RMSNorm(dim), RMSNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def forward(self, x, mask, input_pos):
        x = x + self.attn(self.sa_norm(x), mask, input_pos)
        return x + self.mlp(self.mlp_norm(x))


class TransformerDecoder(nn.Module):
    """tokens [b, s], mask [b, 1, s, s] (True attends), input_pos [b, s] -> [b, s, out_dim]."""

    def __init__(self, vocab, dim, layers, heads, out_dim):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(TransformerSelfAttentionLayer(dim, heads) for _ in range(layers))
        self.norm, self.output = RMSNorm(dim), nn.Linear(dim, out_dim, bias=False)

    def forward(self, tokens, *, mask=None, input_pos=None):
        s = tokens.shape[1]
        if mask is None:
            mask = torch.ones(s, s, dtype=torch.bool).tril()[None, None]
        if input_pos is None:
            input_pos = torch.arange(s)[None]
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, mask, input_pos)
        return self.output(self.norm(h)).float()


def get_causal_mask_from_padding_mask(padding_mask):
    """padding_mask is True at real tokens. Padded rows attend to themselves."""
    s = padding_mask.shape[1]
    mask = padding_mask[:, None, :] & torch.ones(s, s, dtype=torch.bool).tril()
    return (mask | torch.eye(s, dtype=torch.bool))[:, None]


def get_position_ids_from_padding_mask(padding_mask):
    return ((padding_mask.cumsum(-1) - 1) * padding_mask).long()


def logits_to_logprobs(logits, sequences, temperature=1.0):
    return F.log_softmax(logits / temperature, dim=-1).gather(2, sequences[..., None]).squeeze(-1)


def truncate_sequence_at_first_stop_token(sequences, stop_tokens, fill_value):
    eos_mask = torch.isin(sequences, stop_tokens)
    padding_mask = (eos_mask.cumsum(-1) - eos_mask.long()).bool()  # what follows the first stop token
    return padding_mask, sequences.masked_fill(padding_mask, fill_value)


def masked_mean(x, mask):
    return torch.where(mask, x, 0.0).sum() / (mask.sum() + 1e-8)


def whiten(x, mask, shift_mean=True):
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask) * mask.sum() / (mask.sum() - 1)
    whitened = (x - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def get_rewards_ppo(scores, logprobs, ref_logprobs, kl_coeff, valid_score_idxs):
    kl = logprobs - ref_logprobs
    kl_reward = -kl_coeff * kl
    total = kl_reward.clone()
    total[torch.arange(len(scores)), valid_score_idxs] += scores
    return total, kl, kl_reward


class RandomPrompts:
    """An infinite dataloader over the prompts, its order in its own generator."""

    def __init__(self, n, batch_size):
        self.n, self.batch_size, self.generator = n, batch_size, torch.Generator().manual_seed(3)

    def next(self):
        return torch.randperm(self.n, generator=self.generator)[: self.batch_size].tolist()

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


class PPOFullFinetuneRecipe:
    gamma, lmbda, kl_coeff, epsilon, value_coeff, value_clip_range = 1.0, 0.95, 0.02, 0.2, 0.1, 0.2
    temperature, lr, max_generated_tokens = 1.0, 3e-5, 12
    batch_size, forward_batch_size, ppo_epochs, ppo_batch_size = 16, 4, 2, 8
    penalise_no_eos, min_response_length, reward_penalty = True, 2, -3.0

    def __init__(self, tokenizer, prompts, policy, ref, value, reward, fault):
        self.tok, self.prompts, self.fault = tokenizer, prompts, fault
        self._policy_model, self._ref_policy_model, self._value_model, self._reward_model = policy, ref, value, reward
        self._optimizer = torch.optim.AdamW(
            chain(policy.parameters(), value.parameters()), lr=self.lr, weight_decay=0.0
        )
        self._dataloader = RandomPrompts(len(prompts), self.batch_size)
        self.pad_id, self.stop_tokens = tokenizer.pad_token_id, torch.tensor([tokenizer.eos_token_id])

    def generate(self, prompt, temperature):
        tokens, padding_mask = prompt, prompt != self.pad_id
        logits = []
        for _ in range(self.max_generated_tokens):
            last = self._policy_model(
                tokens,
                mask=get_causal_mask_from_padding_mask(padding_mask),
                input_pos=get_position_ids_from_padding_mask(padding_mask),
            )[:, -1]
            token = torch.multinomial(F.softmax(last / temperature, dim=-1), 1)
            logits.append(last)
            tokens, padding_mask = torch.cat([tokens, token], 1), F.pad(padding_mask, (0, 1), value=True)
        return tokens, torch.stack(logits, 1), padding_mask

    def generate_trajectory(self, input_ids):
        context_length = input_ids.shape[1]
        # 1. sample; generation runs on after a stop token
        query_responses, logits, padding_mask = self.generate(
            input_ids, temperature=0.6 if self.fault == "sampled_cooler" else self.temperature
        )
        responses = query_responses[:, context_length:].clone()
        masks, position_ids = (
            get_causal_mask_from_padding_mask(padding_mask),
            get_position_ids_from_padding_mask(padding_mask),
        )
        # 2. log-probabilities of the policy and the reference
        logprobs = logits_to_logprobs(logits, responses, self.temperature)
        ref_masks = None if self.fault == "ref_without_mask" else masks
        ref_logits = self._ref_policy_model(query_responses, input_pos=position_ids, mask=ref_masks)
        ref_logprobs = logits_to_logprobs(ref_logits[:, context_length - 1 : -1], responses, self.temperature)
        # 3. values, one for every state before a response token
        values = self._value_model(query_responses, input_pos=position_ids, mask=masks)[:, context_length - 1 : -1, 0]
        # 4. what follows the first stop token becomes padding
        response_padding_masks, responses = truncate_sequence_at_first_stop_token(
            responses, self.stop_tokens, self.pad_id
        )
        query_responses = torch.cat([input_ids, responses], 1)
        # 5. scores, read at the last token of each response
        seq_lens = (~response_padding_masks).sum(-1) - 1  # index of the last token, as in torchtune
        scores = self._reward_model(query_responses, input_pos=position_ids, mask=masks)[..., 0]
        scores = scores.gather(1, (seq_lens + context_length)[:, None]).squeeze(-1)
        penalty = torch.zeros_like(seq_lens, dtype=torch.bool)
        if self.penalise_no_eos:
            penalty |= ~torch.isin(responses, self.stop_tokens).any(-1)
        if self.min_response_length is not None:
            penalty |= seq_lens + 1 < self.min_response_length
        scores = scores.masked_fill(penalty, self.reward_penalty)
        # 6. nothing of padding goes on
        logprobs, ref_logprobs = (x.masked_fill(response_padding_masks, 1.0) for x in (logprobs, ref_logprobs))
        # 7. values keep one position more: that after the last token
        value_seq_idxs = torch.where(
            (seq_lens > 0) & (seq_lens < self.max_generated_tokens - 1), seq_lens + 1, seq_lens
        )
        value_padding_masks = response_padding_masks.scatter(1, value_seq_idxs[:, None], False)
        values = values.masked_fill(value_padding_masks, 0.0)
        return Trajectory(
            query_responses,
            logprobs,
            ref_logprobs,
            values,
            masks,
            position_ids,
            response_padding_masks,
            value_padding_masks,
            value_seq_idxs,
            scores,
            seq_lens,
        )

    @torch.no_grad()
    def generate_trajectory_batched(self, input_ids):
        chunks = [self.generate_trajectory(c) for c in input_ids.split(self.forward_batch_size)]
        return Trajectory(*map(torch.cat, zip(*chunks)))

    def estimate_advantages(self, values, rewards, masks):
        last_gae_lam, advantages = 0, []
        for t in reversed(range(values.shape[1])):
            next_values = values[:, t + 1] if t < values.shape[1] - 1 else 0.0
            delta = rewards[:, t] + self.gamma * next_values - values[:, t]
            last_gae_lam = delta + self.gamma * self.lmbda * last_gae_lam
            advantages.append(last_gae_lam)
        advantages = torch.stack(advantages[::-1], 1)
        returns = advantages + values
        advantages = whiten(advantages, masks, shift_mean=self.fault != "whiten_keeps_mean")
        return torch.where(masks, advantages, 0.0), returns

    def _ppo_step(self, tr, advantages, returns, context_length):
        logits = self._policy_model(tr.query_responses, input_pos=tr.position_ids, mask=tr.masks)[
            :, context_length - 1 : -1
        ]
        pi_logprobs = logits_to_logprobs(logits, tr.query_responses[:, context_length:], self.temperature)
        pi_logprobs = pi_logprobs.masked_fill(tr.response_padding_masks, 1.0)
        phi_values = self._value_model(tr.query_responses, input_pos=tr.position_ids, mask=tr.masks)[
            :, context_length - 1 : -1, 0
        ]
        phi_values = phi_values.masked_fill(tr.value_padding_masks, 0.0)

        ratios = torch.exp(pi_logprobs - tr.logprobs)
        clipped = ratios.clamp(1 - self.epsilon, 1 + self.epsilon)
        policy_loss = masked_mean(
            torch.maximum(-advantages * ratios, -advantages * clipped), ~tr.response_padding_masks
        )
        values_clipped = tr.values + (phi_values - tr.values).clamp(-self.value_clip_range, self.value_clip_range)
        value_loss = torch.maximum((phi_values - returns) ** 2, (values_clipped - returns) ** 2)
        value_loss = 0.5 * masked_mean(value_loss, ~tr.value_padding_masks)
        loss = policy_loss + self.value_coeff * value_loss
        loss.backward()
        with torch.no_grad():
            real = ~tr.response_padding_masks
            approx = 0.5 * masked_mean((pi_logprobs - tr.logprobs) ** 2, real)
            return PPOStats(
                *(
                    x.detach()
                    for x in (
                        loss,
                        policy_loss,
                        value_loss,
                        masked_mean(ratios, real),
                        masked_mean((ratios != clipped).float(), real),
                        approx,
                    )
                )
            )

    def train_step(self):
        texts = [self.prompts[i] for i in self._dataloader.next()]
        input_ids = self.tok(texts, return_tensors="pt", padding=True)["input_ids"]
        context_length = input_ids.shape[1]
        trajectory = self.generate_trajectory_batched(input_ids)
        rewards, kl, kl_rewards = get_rewards_ppo(
            trajectory.scores, trajectory.logprobs, trajectory.ref_logprobs, self.kl_coeff, trajectory.value_seq_idxs
        )
        advantages, returns = self.estimate_advantages(
            trajectory.values, rewards, masks=~trajectory.response_padding_masks
        )
        stats = []
        for _ in range(self.ppo_epochs):
            for idxs in torch.randperm(self.batch_size).split(self.ppo_batch_size):
                batch = Trajectory(*map(partial(torch.index_select, dim=0, index=idxs), trajectory))
                stats.append(self._ppo_step(batch, advantages[idxs], returns[idxs], context_length))
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
        stats = PPOStats(*map(torch.stack, zip(*stats)))
        return {
            "scores": trajectory.scores.mean().item(),
            "kl": kl.sum(1).mean().item(),
            "loss": stats.loss.mean().item(),
            "policy_loss": stats.policy_loss.mean().item(),
            "value_loss": stats.value_loss.mean().item(),
            "clipfrac": stats.clipfrac.mean().item(),
            "response_lengths": (trajectory.seq_lens + 1).float().mean().item(),
        }


def call_tokens(model, ids, mask):
    real = mask.bool()
    return model(ids, mask=get_causal_mask_from_padding_mask(real), input_pos=get_position_ids_from_padding_mask(real))


def call_reward(model, ids, mask):
    last = (mask.long() * torch.arange(1, mask.shape[1] + 1)).argmax(-1)
    return call_tokens(model, ids, mask)[torch.arange(len(ids)), last, 0]


def make(fault=None):
    torch.manual_seed(21)
    rng = random.Random(21)
    words = [f"t{i}" for i in range(70)]
    vocab = ["<pad>", "<bos>", "<eos>", "<unk>", *words]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    prompts = [" ".join(rng.choices(words, k=rng.randint(3, 8))) for _ in range(24)]

    policy = TransformerDecoder(len(vocab), 48, 2, 4, len(vocab))
    opt = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for _ in range(50):  # SFT
        rows = [rng.choices(words, k=4) + rng.choices(words[:25], k=rng.randint(1, 12)) + ["<eos>"] for _ in range(16)]
        ids = torch.tensor([tok.convert_tokens_to_ids(r + ["<pad>"] * (17 - len(r))) for r in rows])
        loss = F.cross_entropy(
            policy(ids)[:, :-1].flatten(0, 1), ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100).flatten()
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
    policy.zero_grad()
    ref = copy.deepcopy(policy).eval().requires_grad_(False)

    reward = TransformerDecoder(len(vocab), 48, 2, 4, 1).eval().requires_grad_(False)
    for p in chain(*(layer.parameters() for layer in reward.layers)):
        if p.dim() == 2:
            p.mul_(3.0)
    sample = torch.randint(4, len(vocab), (64, 12))
    sample[::2, -1] = tok.eos_token_id
    output, reward.output = reward.output, nn.Identity()
    h = reward(sample)[:, -1]
    reward.output = output
    w = torch.randn(48)
    w -= h.mean(0) * (w @ h.mean(0)) / h.mean(0).square().sum()
    reward.output.weight.copy_(w[None] / (h @ w).std())
    value = copy.deepcopy(reward).requires_grad_(True)  # the value checkpoint is the reward model's

    recipe = PPOFullFinetuneRecipe(tok, prompts, policy, ref, value, reward, fault)
    r = recipe
    return {
        "policy": policy,
        "reference": ref,
        "reward": reward,
        "value": value,
        "tokenizer": tok,
        "prompts": prompts,
        "optimizers": [r._optimizer],
        "state": [r._dataloader],
        "step": r.train_step,
        "calls": {"policy": call_tokens, "reference": call_tokens, "value": call_tokens, "reward": call_reward},
        "declared": {
            "algorithm": "ppo",
            "gamma": r.gamma,
            "lam": r.lmbda,
            "kl_coef": r.kl_coeff,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "temperature": r.temperature,
            "clip_range": r.epsilon,
            "clip_range_value": r.value_clip_range,
            "vf_coef": r.value_coeff,
            "whiten_advantages": True,
            "learning_rate": r.lr,
            "critic_learning_rate": r.lr,
            "ppo_epochs": r.ppo_epochs,
            "num_minibatches": 2,
            "batch_size": r.batch_size,
            "response_length": r.max_generated_tokens,
            "value_init": "reward",
            "loss_aggregation": "token-mean",
            "reference": "policy",
        },
    }


def healthy():
    return make()


def whiten_keeps_mean():
    return make("whiten_keeps_mean")


def sampled_cooler():
    return make("sampled_cooler")


def ref_without_mask():
    return make("ref_without_mask")
