"""Sampling, masks and scores: against generation without a cache, and under changes that must not matter."""

from dataclasses import replace

import pytest
import torch
import transformers

from reference_impl import ops, roles, rollout, task

EOS, PAD = 2, 0


def draw(models, prompts, T=6, temperature=1.0):
    prompt, mask = rollout.encode_prompts(models.tokenizer, prompts)
    return rollout.sample(models.policy, prompt, mask, T=T, temperature=temperature, eos=EOS, pad=PAD)


def test_response_mask_ends_with_the_first_end_of_sequence():
    response = torch.tensor([[5, EOS, PAD, PAD], [5, PAD, 6, EOS], [5, 6, 7, 8], [EOS, EOS, 5, EOS]])
    mask, ended = rollout.response_mask(response, EOS)
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert ended.tolist() == [True, True, False, True]
    same_id, _ = rollout.response_mask(torch.tensor([[5, EOS, EOS, EOS]]), EOS)
    assert same_id.int().tolist() == [[1, 1, 0, 0]]


def test_prompts_are_padded_on_the_left(models):
    short, long = "describe the fox :", "how would you describe the fox to me ?"
    ids, mask = rollout.encode_prompts(models.tokenizer, [short, long])
    assert ids.shape == (2, 10)
    assert mask[0].tolist() == [0] * 5 + [1] * 5
    assert mask[1].all()
    assert models.tokenizer.decode(ids[0, 5:]) == "<s> describe the fox :"
    assert roles.positions(mask)[0].tolist() == [0] * 5 + [0, 1, 2, 3, 4]


def test_sampling_with_the_cache_is_sampling_without(models):
    prompts = task.prompts()[:5]
    cold = draw(models, prompts, temperature=1e-6)  # the most likely token, always
    for i, prompt in enumerate(prompts):
        ids = models.tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(int(cold.mask[i].sum())):
            ids = torch.cat([ids, models.policy(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        kept = cold.ids[i][cold.attention_mask[i].bool()]
        assert kept.tolist() == ids[0].tolist()


def test_tokens_are_drawn_from_the_tempered_distribution(models):
    # One token, many times: frequencies against softmax(logits / 0.5), within five standard errors.
    n, prompt = 4000, task.prompts()[0]
    torch.manual_seed(0)
    drawn = draw(models, [prompt] * n, T=1, temperature=0.5).response[:, 0]
    ids = models.tokenizer(prompt, return_tensors="pt")["input_ids"]
    p = (models.policy(input_ids=ids).logits[0, -1] / 0.5).softmax(-1)
    frequency = drawn.bincount(minlength=len(p)) / n
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-3).all()


def test_nothing_follows_the_end_of_sequence(models):
    torch.manual_seed(0)
    r = draw(models, task.prompts(), T=20)
    assert r.ended.any()
    assert not r.ended.all()
    P = r.ids.shape[1] - r.mask.shape[1]
    assert torch.equal(r.attention_mask[:, P:].bool(), r.mask)
    assert (r.response[~r.mask] == PAD).all()
    last = ops.pool_last(r.response.double(), r.mask)
    assert torch.equal(last == EOS, r.ended)


def test_sampling_stops_when_every_row_has_ended(models):
    with torch.no_grad():
        models.policy.lm_head.weight.zero_()
        models.policy.model.norm.weight.zero_()
    torch.manual_seed(0)  # uniform over the vocabulary
    r = draw(models, task.prompts()[:1], T=40)
    assert r.mask.shape[1] == int(r.mask.sum()) <= 40


def test_scores_are_those_of_the_model_class_alone(models):
    torch.manual_seed(0)
    r = draw(models, task.prompts()[:8])
    scores = rollout.score(models.reward, r)
    pads = (r.response == PAD) & r.mask  # the model class takes a drawn pad token for padding, so leave those rows out
    assert pads.any(1).sum() <= 2
    for i in (~pads.any(1)).nonzero().flatten():
        kept = r.ids[i][r.attention_mask[i].bool()][None]
        torch.testing.assert_close(models.reward(input_ids=kept).logits[0, 0], scores[i], rtol=1e-5, atol=1e-6)


def test_the_penalty_is_for_responses_that_never_end(models):
    torch.manual_seed(0)
    r = draw(models, task.prompts(), T=20)
    difference = rollout.score(models.reward, r) - rollout.score(models.reward, r, missing_eos_penalty=1.5)
    torch.testing.assert_close(difference, torch.where(r.ended, 0.0, 1.5))


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 5)])
def test_more_padding_changes_nothing(models, left, right):
    torch.manual_seed(0)
    r = draw(models, task.prompts()[:8])
    T = r.mask.shape[1]

    def pad(x):
        return torch.nn.functional.pad(x, (left, right))

    for model in (models.policy, models.value, models.reward):
        model.double()
    logp = roles.response_logprobs(models.policy, r.ids, r.attention_mask, T, 0.7)
    padded = roles.response_logprobs(models.policy, pad(r.ids), pad(r.attention_mask), T + right, 0.7)[:, :T]
    torch.testing.assert_close(padded[r.mask], logp[r.mask], rtol=0, atol=1e-10)
    v = roles.scalars(models.value, r.ids, r.attention_mask)[:, -T - 1 : -1]
    shifted = roles.scalars(models.value, pad(r.ids), pad(r.attention_mask))[:, -T - right - 1 : -1][:, :T]
    torch.testing.assert_close(shifted[r.mask], v[r.mask], rtol=0, atol=1e-10)
    wide = rollout.Rollout(pad(r.ids), pad(r.attention_mask), torch.nn.functional.pad(r.mask, (0, right)), r.ended)
    torch.testing.assert_close(rollout.score(models.reward, wide), rollout.score(models.reward, r), rtol=0, atol=1e-10)


def test_the_order_of_the_batch_changes_nothing(models):
    torch.manual_seed(0)
    r, order = draw(models, task.prompts()[:8]), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    models.policy.double()
    T = r.mask.shape[1]
    logp = roles.response_logprobs(models.policy, r.ids, r.attention_mask, T, 1.0)
    mixed = roles.response_logprobs(models.policy, r.ids[order], r.attention_mask[order], T, 1.0)
    torch.testing.assert_close(mixed, logp[order], rtol=0, atol=1e-10)


def test_logprobs_are_those_of_the_model_class_alone(models):
    torch.manual_seed(0)
    r = draw(models, task.prompts()[:4])
    T = r.mask.shape[1]
    logp = roles.response_logprobs(models.policy, r.ids, r.attention_mask, T, 0.5)
    for i in range(4):
        kept = r.ids[i][r.attention_mask[i].bool()]
        n = int(r.mask[i].sum())
        table = (models.policy(input_ids=kept[None]).logits[0] / 0.5).log_softmax(-1)
        expected = torch.stack([table[p - 1, kept[p]] for p in range(len(kept) - n, len(kept))])
        torch.testing.assert_close(logp[i, :n], expected, rtol=1e-5, atol=1e-5)


# ---- drawing


def test_a_token_is_drawn_where_the_cumulative_probability_passes_the_number():
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]], dtype=torch.float64).log().expand(7, 4)
    u = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.701, 0.999, 1 - 2**-53], dtype=torch.float64)
    assert rollout.draw(logits, 1.0, u).tolist() == [0, 0, 2, 2, 3, 3, 3]
    # At temperature 1/2 the probabilities go with their squares: 4, 0, 25 and 9 of 38.
    u = torch.tensor([3.9, 4.1, 28.9, 29.1, 0, 0, 0], dtype=torch.float64) / 38
    assert rollout.draw(logits, 0.5, u).tolist()[:4] == [0, 2, 2, 3]


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 2] = 0.0
    assert rollout.draw(logits, 1.0, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [2, 2, 2]


def test_the_generator_moves_as_much_whenever_responses_end(models):
    prompt, mask = rollout.encode_prompts(models.tokenizer, task.prompts()[:1])

    def drawn(eos):
        torch.manual_seed(0)
        r = rollout.sample(models.policy, prompt, mask, T=30, temperature=1.0, eos=eos, pad=PAD)
        return r.response[0].tolist(), torch.get_rng_state()

    whole, state = drawn(len(models.tokenizer))
    part, other = drawn(whole[3])
    assert len(part) < len(whole) == 30
    assert part == whole[: len(part)]
    assert torch.equal(state, other)


def test_positions_are_counted_without_the_padding(models):
    # Llama's rotary positions are relative, GPT-2's are not: a row must read alike however far it is padded.
    torch.manual_seed(0)
    size = {"vocab_size": 62, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**size, initializer_range=0.5)
    models = replace(models, policy=transformers.GPT2LMHeadModel(config).double().eval())
    prompts = task.prompts()[:6]
    cold = draw(models, prompts, temperature=1e-6)
    logp = roles.response_logprobs(models.policy, cold.ids, cold.attention_mask, cold.mask.shape[1], 1.0)
    for i, prompt in enumerate(prompts):
        ids = models.tokenizer(prompt, return_tensors="pt")["input_ids"]
        for t in range(int(cold.mask[i].sum())):
            table = models.policy(input_ids=ids).logits[0, -1].log_softmax(-1)
            assert cold.response[i, t] == table.argmax()
            assert logp[i, t].item() == pytest.approx(table.max().item(), abs=1e-10)
            ids = torch.cat([ids, table.argmax()[None, None]], 1)


def test_a_row_is_sampled_alike_in_any_batch(models):
    models.policy.double()
    prompt, mask = rollout.encode_prompts(models.tokenizer, task.prompts()[:6])

    def responses(prompt, mask):
        torch.manual_seed(0)
        return rollout.sample(models.policy, prompt, mask, T=12, temperature=1.0, eos=EOS, pad=PAD)

    pad = torch.nn.functional.pad
    one, wider = responses(prompt, mask), responses(pad(prompt, (5, 0)), pad(mask, (5, 0)))
    assert torch.equal(one.response, wider.response)
    assert torch.equal(one.mask, wider.mask)


def both_ways(policy, prompt, mask, T):
    """The responses with a growing cache and with one of fixed size, from the same random numbers."""
    for static in (False, True):
        torch.manual_seed(0)
        yield rollout.sample(policy, prompt, mask, T=T, temperature=1.0, eos=EOS, pad=PAD, static=static)


@pytest.mark.parametrize("kind", ["Llama", "GPT-2"])
def test_a_cache_of_fixed_size_gives_the_same_tokens(models, kind):
    policy = models.policy.double()
    if kind == "GPT-2":
        torch.manual_seed(0)
        size = {"vocab_size": 62, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 2}
        policy = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, initializer_range=0.5)).double().eval()
    shapes = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *others, **options):
        shapes.append((query.shape[2], key.shape[2]))
        return attention(query, key, *others, **options)

    prompt, mask = rollout.encode_prompts(models.tokenizer, task.prompts()[:8])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        growing, fixed = both_ways(policy, prompt, mask, T=9)
    assert torch.equal(growing.ids, fixed.ids)
    assert torch.equal(growing.mask, fixed.mask)
    assert len(set(growing.mask.sum(1).tolist())) > 1
    P = prompt.shape[1]
    assert {key for _, key in shapes[: len(shapes) // 2]} == set(range(P, P + 9))
    assert set(shapes[len(shapes) // 2 :]) == {(P, P + 9), (1, P + 9)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_gives_the_same_tokens(models):
    models.policy.double().cuda()
    prompt, mask = (x.cuda() for x in rollout.encode_prompts(models.tokenizer, task.prompts()[:8]))
    one_by_one, graphed = both_ways(models.policy, prompt, mask, T=20)
    assert torch.equal(one_by_one.ids, graphed.ids)


def test_models_that_cannot_read_the_prompts_are_named(models):
    prompt, _ = rollout.encode_prompts(models.tokenizer, task.prompts()[:4])
    roles.check_models(models, prompt, 20)
    with pytest.raises(ValueError, match=r"10 tokens and 60 more do not fit the policy model's context of 64"):
        roles.check_models(models, prompt.expand(4, -1)[:, :10], 60)
    models.reward.set_input_embeddings(torch.nn.Embedding(40, 64))
    with pytest.raises(ValueError, match=r"the reward model reads 40 tokens, the policy 62"):
        roles.check_models(models, prompt, 20)
