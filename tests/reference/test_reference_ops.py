"""The equations against tables by hand, slow definitions in float64, and relations between them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reference_impl import ops

NAN = math.nan
DOUBLE = torch.float64


def t(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=DOUBLE)


def b(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def lengths_mask(lengths: list[int], T: int) -> Tensor:
    return torch.arange(T) < torch.tensor(lengths)[:, None]


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, Tensor]:
    T = draw(st.integers(2, 9))
    return draw(st.integers(0, 10**6)), lengths_mask(draw(st.lists(st.integers(2, T), min_size=1, max_size=4)), T)


# ---- log-probabilities


def test_logprobs_by_hand():
    logits = t([0.0, math.log(3)], [0.0, math.log(3)])
    near(ops.logprobs(logits, torch.tensor([0, 1])), t(math.log(1 / 4), math.log(3 / 4)))
    # At temperature 1/2 the odds are squared: 1 to 9.
    near(ops.logprobs(logits, torch.tensor([0, 1]), 0.5), t(math.log(1 / 10), math.log(9 / 10)))


def test_logprobs_widens_half_precision_only():
    for given_, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (DOUBLE, DOUBLE)):
        assert ops.logprobs(torch.zeros(1, 4, dtype=given_), torch.tensor([2])).dtype == expected


def test_logprobs_of_all_tokens_sum_to_one():
    logits = torch.randn(1, 7, dtype=DOUBLE).expand(7, 7)
    assert ops.logprobs(logits, torch.arange(7), 0.7).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_entropy_by_hand():
    near(ops.entropy(torch.zeros(3, 8, dtype=DOUBLE)), torch.full((3,), math.log(8), dtype=DOUBLE))
    near(ops.entropy(t(0.0, math.log(3))), torch.tensor(math.log(4) - 0.75 * math.log(3), dtype=DOUBLE))


@pytest.mark.parametrize("chunk_elements", [1, 2 * 11 * 3, 2 * 11 * 5, 10**6])
def test_token_logprobs_is_the_same_in_chunks(chunk_elements):
    torch.manual_seed(0)
    head = nn.Linear(4, 11, dtype=DOUBLE)
    hidden, a = torch.randn(2, 5, 4, dtype=DOUBLE, requires_grad=True), torch.randint(11, (2, 5))
    expected = torch.log_softmax(head(hidden) / 0.7, -1).gather(-1, a[..., None]).squeeze(-1)
    actual = ops.token_logprobs(hidden, head, a, 0.7, chunk_elements)
    near(actual, expected)
    weights = torch.randn(2, 5, dtype=DOUBLE)
    inputs = [hidden, head.weight, head.bias]
    for x, y in zip(
        torch.autograd.grad((actual * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        near(x, y)


def test_token_logprobs_never_holds_all_logits():
    seen = list[int]()
    head = nn.Linear(4, 11)
    head.register_forward_hook(lambda *call: seen.append(call[-1].numel()))
    ops.token_logprobs(torch.zeros(2, 9, 4), head, torch.zeros(2, 9, dtype=torch.long), chunk_elements=50)
    assert len(seen) == 5
    assert max(seen) <= 50


# ---- KL


def test_kl_estimators_by_hand():
    logp, ref = t(math.log(0.5)), t(math.log(0.25))
    near(ops.k1(logp, ref), t(math.log(2)))
    near(ops.k2(logp, ref), t(math.log(2) ** 2 / 2))
    near(ops.k3(logp, ref), t(0.5 - 1 + math.log(2)))


def test_exact_kl_by_hand():
    # (1/4, 3/4) against (1/2, 1/2).
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    near(ops.exact_kl(t(0.0, math.log(3)), t(0.0, 0.0)), torch.tensor(expected, dtype=DOUBLE))


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_k1_and_k3_average_to_the_exact_kl(seed):
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(6, dtype=DOUBLE, generator=g).log_softmax(0) for _ in range(2))
    exact = ops.exact_kl(p, q)
    for estimator in (ops.k1, ops.k3):
        near((p.exp() * estimator(p, q)).sum(), exact)
    assert (ops.k3(p, q) >= 0).all()
    assert (ops.k2(p, q) >= 0).all()


def test_k2_has_the_gradient_of_the_kl():
    z, q = torch.randn(5, dtype=DOUBLE, requires_grad=True), torch.randn(5, dtype=DOUBLE).log_softmax(0)
    p = z.log_softmax(0)
    (on_samples,) = torch.autograd.grad((p.detach().exp() * ops.k2(p, q)).sum(), z, retain_graph=True)
    (exact,) = torch.autograd.grad(ops.exact_kl(z, q), z)
    near(on_samples, exact)


# ---- rewards and advantages


def test_pool_last_reads_the_last_real_position():
    x = t([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [1.0, 2.0, NAN])
    mask = b([1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 0])
    near(ops.pool_last(x, mask), t(3.0, 4.0, 9.0, 2.0))
    near(ops.pool_last(x, b([1, 0, 1], [1, 1, 0], [0, 1, 0], [0, 1, 0])), t(3.0, 5.0, 8.0, 2.0))


def test_pool_last_names_the_empty_rows():
    with pytest.raises(ValueError, match=r"\[1\]"):
        ops.pool_last(torch.zeros(2, 2), b([1, 0], [0, 0]))


def test_shaped_rewards_by_hand():
    kl = t([1.0, -2.0, 3.0], [4.0, NAN, NAN])
    mask = b([1, 1, 1], [1, 0, 0])
    near(ops.shaped_rewards(t(10.0, -10.0), kl, mask, 0.5), t([-0.5, 1.0, 8.5], [-12.0, 0.0, 0.0]))


def test_gae_by_hand():
    r, v, mask = t([0.0, 0.0, 1.0], [1.0, NAN, NAN]), t([0.5, 1.0, 0.5], [2.0, NAN, NAN]), b([1, 1, 1], [1, 0, 0])
    # Deltas with gamma 1/2: 0 + 0.5 - 0.5 = 0;  0 + 0.25 - 1 = -0.75;  1 - 0.5 = 0.5. gamma lambda = 1/4.
    expected = t([0.0 - 0.75 / 4 + 0.5 / 16, -0.75 + 0.5 / 4, 0.5], [-1.0, 0.0, 0.0])
    near(ops.gae(r, v, mask, gamma=0.5, lam=0.5), expected)


@given(batches(), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_gae_is_its_definition(batch, gamma, lam):
    seed, mask = batch
    g = torch.Generator().manual_seed(seed)
    r, v = (torch.randn(mask.shape, dtype=DOUBLE, generator=g).masked_fill(~mask, NAN) for _ in range(2))
    actual = ops.gae(r, v, mask, gamma, lam)
    for row, n in enumerate(mask.sum(1).tolist()):
        delta = [r[row, i] + (gamma * v[row, i + 1] if i + 1 < n else 0.0) - v[row, i] for i in range(n)]
        for i in range(n):
            definition = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, n))
            assert actual[row, i].item() == pytest.approx(float(definition), abs=1e-10)
        assert (actual[row, n:] == 0).all()


@given(batches())
@settings(deadline=None, max_examples=20)
def test_gae_relations(batch):
    seed, mask = batch
    g = torch.Generator().manual_seed(seed)
    r, v = (torch.randn(mask.shape, dtype=DOUBLE, generator=g) * mask for _ in range(2))
    # lambda 1, gamma 1: what is still to come, less the value. The values telescope away.
    near(ops.gae(r, v, mask, 1.0, 1.0), (r.flip(1).cumsum(1).flip(1) - v) * mask, 1e-10)
    # lambda 0: the one-step error; gamma 0 too: the reward less the value.
    near(ops.gae(r, v, mask, 0.0, 0.9), r - v)
    near(ops.gae(r, v, mask, 0.9, 0.0)[:, -1], (r - v)[:, -1])
    # A critic that is right about a constant reward at the end leaves no advantage.
    score = torch.randn(len(mask), dtype=DOUBLE, generator=g)
    right = score[:, None] * mask
    near(ops.gae(ops.shaped_rewards(score, right * 0, mask, 0.0), right, mask, 1.0, 0.3), right * 0, 1e-10)


# ---- masked statistics


def test_masked_statistics_are_those_of_the_kept_values():
    x, mask = t([1.0, 2.0, NAN], [4.0, NAN, NAN]), b([1, 1, 0], [1, 0, 0])
    near(ops.masked_mean(x, mask), torch.tensor(7 / 3, dtype=DOUBLE))
    near(ops.masked_var(x, mask), torch.tensor(7 / 3, dtype=DOUBLE))  # (16 + 1 + 25) / 9 / 2
    near(ops.masked_mean(x, mask, 14), torch.tensor(0.5, dtype=DOUBLE))
    with pytest.raises(ValueError, match="1 values"):
        ops.masked_var(x, b([0, 0, 0], [1, 0, 0]))


def test_whiten_gives_mean_0_and_variance_1_of_the_kept_values():
    torch.manual_seed(0)
    x, mask = 3 + 5 * torch.randn(4, 6, dtype=DOUBLE), lengths_mask([6, 1, 3, 5], 6)
    kept = x[mask]
    white = ops.whiten(x.masked_fill(~mask, NAN), mask)
    near(white[mask], (kept - kept.mean()) / kept.std(), 1e-8)
    assert (white[~mask] == 0).all()
    near(ops.whiten(x, mask, shift_mean=False)[mask], (kept - kept.mean()) / kept.std() + kept.mean(), 1e-8)
    near(ops.whiten(7 * x - 2, mask), white, 1e-8)


def test_explained_variance_of_known_critics():
    returns, mask = t([1.0, 2.0, 4.0], [0.0, 3.0, NAN]), b([1, 1, 1], [1, 1, 0])
    for v, expected in ((returns, 1.0), (returns * 0 + 5, 0.0), (-returns, -3.0), (returns + 9, 1.0)):
        near(ops.explained_variance(v, returns, mask), torch.tensor(expected, dtype=DOUBLE))


# ---- losses


def test_policy_loss_by_hand():
    old = t([0.0, 0.0], [0.0, 0.0])
    logp = t([math.log(1.5), math.log(0.5)], [math.log(1.5), math.log(0.5)])
    advantage, mask = t([1.0, 1.0], [-1.0, -1.0]), b([1, 1], [1, 1])
    # Epsilon 0.2. A > 0: min(1.5, 1.2) and min(0.5, 0.8); A < 0: min(-1.5, -1.2) and min(-0.5, -0.8).
    expected = -(1.2 + 0.5 - 1.5 - 0.8) / 4
    near(ops.clipped_policy_loss(logp, old, advantage, mask, 0.2), torch.tensor(expected, dtype=DOUBLE))
    for row, column, cut in ((0, 0, 1.0), (0, 1, 0.0), (1, 0, 0.0), (1, 1, 1.0)):
        one = torch.zeros_like(mask)
        one[row, column] = True
        near(ops.clip_fraction(logp, old, advantage, one, 0.2), torch.tensor(cut, dtype=DOUBLE))
    # Without a clip it is the importance-weighted advantage.
    near(ops.clipped_policy_loss(logp, old, advantage, mask, 1e9), torch.tensor(0.0, dtype=DOUBLE))


def test_policy_loss_at_ratio_1_is_the_policy_gradient():
    torch.manual_seed(0)
    mask = lengths_mask([3, 1], 3)
    advantage = torch.randn(2, 3, dtype=DOUBLE).masked_fill(~mask, NAN)
    logp = torch.randn(2, 3, dtype=DOUBLE, requires_grad=True)
    old = logp.detach().masked_fill(~mask, NAN)
    loss = ops.clipped_policy_loss(logp, old, advantage, mask, 0.2)
    near(loss, -advantage[mask].mean())
    (gradient,) = torch.autograd.grad(loss, logp)
    near(gradient, (-advantage / 4).masked_fill(~mask, 0))


def test_policy_loss_has_no_gradient_where_it_is_clipped():
    logp = t([math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5)]).requires_grad_()
    advantage = t([1.0, 1.0, -1.0, -1.0])
    loss = ops.clipped_policy_loss(logp, torch.zeros_like(logp), advantage, b([1, 1, 1, 1]), 0.2)
    (gradient,) = torch.autograd.grad(loss, logp)
    near(gradient, t([0.0, -0.5 / 4, 1.5 / 4, 0.0]))


def test_value_loss_by_hand():
    v, old, returns = t([1.0, 3.0, 0.1, NAN]), t([0.0, 0.0, 0.0, NAN]), t([2.0, 2.0, 2.0, NAN])
    mask = b([1, 1, 1, 0])
    # Epsilon 0.5: clipped values 0.5, 0.5, 0.1; the larger error counts: 1.5², 1.5², 1.9².
    near(
        ops.clipped_value_loss(v, old, returns, mask, 0.5),
        torch.tensor((2.25 + 2.25 + 3.61) / 6, dtype=DOUBLE),
    )
    near(ops.clipped_value_loss(v, old, returns, mask, 1e9), torch.tensor((1 + 1 + 3.61) / 6, dtype=DOUBLE))


def test_value_loss_gradient_points_at_the_returns_and_skips_the_mask():
    v = t([1.0, -1.0, 5.0]).requires_grad_()
    loss = ops.clipped_value_loss(v, t([1.0, -1.0, NAN]), t([2.0, -3.0, NAN]), b([1, 1, 0]), 0.2)
    (gradient,) = torch.autograd.grad(loss, v)
    near(gradient, t([(1 - 2) / 2, (-1 + 3) / 2, 0.0]))


def test_losses_in_pieces_add_up():
    torch.manual_seed(0)
    mask = lengths_mask([4, 1, 3, 2], 4)
    x, y, z = (torch.randn(4, 4, dtype=DOUBLE) for _ in range(3))
    n = mask.sum()
    for loss in (ops.clipped_policy_loss, ops.clipped_value_loss):
        pieces = [loss(x[i], y[i], z[i], mask[i], 0.2, n) for i in (slice(0, 1), slice(1, 4))]
        near(pieces[0] + pieces[1], loss(x, y, z, mask, 0.2))


def test_bradley_terry_by_hand():
    equal = t(0.3, -2.0)
    near(ops.bradley_terry_loss(equal, equal), torch.tensor(math.log(2), dtype=DOUBLE))
    # sigma(ln 3) = 3/4.
    near(ops.bradley_terry_loss(t(math.log(3)), t(0.0)), torch.tensor(-math.log(0.75), dtype=DOUBLE))
    near(ops.bradley_terry_loss(t(1.0), t(1.0), 0.5), torch.tensor(math.log(2) + 2.0, dtype=DOUBLE))
    near(ops.bradley_terry_loss(t(7.0), t(5.0)), ops.bradley_terry_loss(t(1.0), t(-1.0)))


def test_wrong_shapes_and_dtypes_are_refused():
    mask = b([1, 1])
    with pytest.raises(AssertionError, match="shape"):
        ops.gae(torch.zeros(1, 3), torch.zeros(1, 2), mask, 1.0, 1.0)
    with pytest.raises(AssertionError, match="bool"):
        ops.masked_mean(torch.zeros(1, 2), mask.long())
    with pytest.raises(AssertionError, match="floating"):
        ops.masked_mean(mask.long(), mask)
