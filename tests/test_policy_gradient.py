# SPDX-License-Identifier: Apache-2.0
"""Tests of the code, the table and the statements in docs/policy-gradient.md."""

import math
import re
from pathlib import Path

import pytest
import torch

import tokenops

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs/policy-gradient.md").read_text("utf-8")
KEPT, DROPPED = [0, 1, 3, 5], [2, 4]


class Example:
    """One attention layer whose policy keeps some tokens and drops the others, in float64."""

    def __init__(self, q, k, v, g, policy):
        self.q, self.k, self.v, self.g = q, k, v, g  # [B, H, N, D]
        self.policy = policy  # [B, N]
        self.is_self = torch.eye(q.shape[2], dtype=torch.bool)

    def reading_kept_rows(self):
        """The same layer with a loss that reads kept tokens only."""
        g = self.g * self.policy[:, None, :, None]
        return Example(self.q, self.k, self.v, g, self.policy)

    def logits(self):
        return self.q @ self.k.mT / math.sqrt(self.q.shape[-1])

    def policy_map(self, policy):
        """The policy of each query and key: a token's own key is always kept."""
        return torch.where(self.is_self, 1, policy[:, None, None])

    def probabilities(self):
        """P_ij of the document."""
        e = self.logits().exp()
        return e / (e * self.policy_map(self.policy)).sum(-1, keepdim=True)

    def loss(self, policy):
        """The formula of the document, also for negative policies."""
        w = self.logits().exp() * self.policy_map(policy)
        return (w @ self.v / w.sum(-1, keepdim=True) * self.g).sum()

    def terms(self):
        """T_ij of the document, [B, H, N, N], without the diagonal."""
        p = self.probabilities()
        out = (p * self.policy_map(self.policy)) @ self.v
        delta = (self.g * out).sum(-1, keepdim=True)
        return (p * (self.g @ self.v.mT - delta)).masked_fill(self.is_self, 0)

    def differences(self, step=1e-5):
        """Central differences of fourth order: the loss may have large third derivatives."""
        grad = torch.empty_like(self.policy)
        for b, j in torch.cartesian_prod(*(torch.arange(n) for n in grad.shape)).tolist():
            move = torch.zeros_like(grad)
            move[b, j] = step
            near, far = (
                self.loss(self.policy + n * move) - self.loss(self.policy - n * move)
                for n in (1, 2)
            )
            grad[b, j] = (8 * near - far) / (12 * step)
        return grad

    def mask(self, eps=0.0, policy_grad="exact"):
        policy = self.policy.clone().requires_grad_()
        out = tokenops.policy_attention(
            self.q, self.k, self.v, policy, eps=eps, policy_grad=policy_grad
        )
        return torch.autograd.grad(out, policy, self.g)[0]

    def token_map(self):
        return tokenops.prune(self.policy, int(self.policy[0].sum()))

    def rows(self, token_map, t):
        """Kept rows of [B, H, N, D]."""
        rows = token_map.merge(t.transpose(1, 2).flatten(2))
        return rows.unflatten(2, (t.shape[1], -1)).transpose(1, 2)

    def probe(self, eps=0.0):
        policy, token_map = self.policy.clone().requires_grad_(), self.token_map()
        position = token_map.members[:, : token_map.num_tokens]
        q, g = (self.rows(token_map, t) for t in (self.q, self.g))
        out = tokenops.policy_attention(q, self.k, self.v, policy, query_position=position, eps=eps)
        return torch.autograd.grad(out, policy, g)[0]

    def gather(self, eps=0.0):
        policy, token_map = self.policy.clone().requires_grad_(), self.token_map()
        q, k, v, g = (self.rows(token_map, t) for t in (self.q, self.k, self.v, self.g))
        out = tokenops.policy_attention(q, k, v, token_map.merge(policy[..., None]), eps=eps)
        return torch.autograd.grad(out, policy, g)[0]

    def biased(self, bias):
        """Softmax with a bias that depends on the policy, except for a token's own key."""
        policy = self.policy.clone().requires_grad_()
        s = self.logits() + torch.where(self.is_self, 0, bias(policy)[:, None, None])
        out = s.softmax(-1) @ self.v
        return torch.autograd.grad(out, policy, self.g)[0]


def random_example(seed, batch=2, heads=3, tokens=9, width=4, keep=5):
    generator = torch.Generator().manual_seed(seed)
    shape = 4, batch, heads, tokens, width
    q, k, v, g = torch.randn(shape, generator=generator, dtype=torch.float64)
    ranks = torch.rand(batch, tokens, generator=generator).argsort(1)
    return Example(2 * q, k, v, g, (ranks < keep).double())


SEEDS = range(5)


# ---- the document ----


@pytest.fixture(scope="module")
def document():
    """Names that the document's blocks of code define, run in order."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def example(document):
    x, project = document["x"], document["project"]
    q, k, v = (project(x, document[w]) for w in ("wq", "wk", "wv"))
    g = document["g"].unflatten(-1, (2, 3)).transpose(1, 2)
    return Example(q, k, v, g, torch.tensor([[1, 1, 0, 1, 0, 1]]).double())


def compute_table(example):
    """Rows of the document's table by their first column."""
    kept = example.reading_kept_rows()
    return {
        "policy": example.policy[0],
        "`mask`, all rows read": example.mask()[0],
        "`mask`": kept.mask()[0],
        "the formula": kept.terms().sum((1, 2))[0],
        "central differences": kept.differences()[0],
        "`probe`": kept.probe()[0],
        "`gather`": kept.gather()[0],
        "`(1 - p) * -1e5`": kept.biased(lambda p: (1 - p) * -1e5)[0],
        "`log p`": kept.biased(torch.log)[0],
    }


def render_table(rows):
    header = ["gradient of the policy of token", *map(str, range(6))]
    lines = [header, ["---", *["---:"] * 6]]
    for name, values in rows.items():
        digits = 0 if name == "policy" else 3 if "1e5" in name else 9
        lines.append([name, *(f"{value + 0.0:.{digits}f}" for value in values.tolist())])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def parse_table():
    text = DOCUMENT.partition("<!-- numbers:start -->")[2].partition("<!-- numbers:end -->")[0]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.strip().splitlines()]
    return {name: cells for name, *cells in lines[2:]}


def test_the_table_is_what_comes_out(example):
    expected, written = compute_table(example), parse_table()
    assert list(written) == list(expected), f"\n{render_table(expected)}"
    for name, cells in written.items():
        digits = max(len(cell.partition(".")[2]) for cell in cells)
        values = torch.tensor([float(cell) for cell in cells], dtype=torch.float64)
        ok = torch.isclose(values, expected[name], 0, 0.6 * 10.0**-digits, equal_nan=True)
        assert ok.all(), f"row {name!r}:\n{render_table(expected)}"


def test_the_blocks_of_code_compute_the_table(document, example):
    kept = example.reading_kept_rows()
    assert torch.equal(document["policy"][..., 0].detach(), example.policy)
    for name, expected in (
        ("mask", example.mask()),
        ("probe", kept.probe()),
        ("gather", kept.gather()),
    ):
        torch.testing.assert_close(document[name][..., 0], expected)


def test_scores_get_the_gradient_of_the_policy(document, example):
    """Through topk_keep; the class token is always kept."""
    scores = document["scores"].detach().clone().requires_grad_()
    policy = tokenops.topk_keep(scores, 3, num_prefix=1)
    out = tokenops.policy_attention(example.q, example.k, example.v, policy)
    (grad,) = torch.autograd.grad(out, scores, example.g)
    torch.testing.assert_close(grad[:, 1:], example.mask()[:, 1:])
    assert grad[0, 0] == 0


# ---- the statements, on random layers ----


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("reads", ["all rows", "kept rows"])
def test_mask_is_the_formula_and_the_differences(seed, reads):
    layer = random_example(seed)
    layer = layer if reads == "all rows" else layer.reading_kept_rows()
    grad, scale = layer.mask(), layer.mask().abs().max()
    torch.testing.assert_close(grad, layer.terms().sum((1, 2)), rtol=1e-9, atol=1e-9)
    assert ((grad - layer.differences()).abs().max() / scale).item() < 1e-8
    assert (grad[layer.policy == 0].abs() > 1e-4).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_mask_and_probe_agree_where_dropped_rows_have_no_gradient(seed, eps):
    layer = random_example(seed)
    kept = layer.reading_kept_rows()
    torch.testing.assert_close(kept.mask(eps), kept.probe(eps), rtol=1e-9, atol=1e-11)
    # probe has no dropped rows, so their gradient does not matter
    assert torch.equal(layer.probe(eps), kept.probe(eps))
    if eps == 0:
        missing = (layer.terms() * (1 - layer.policy)[:, None, :, None]).sum((1, 2))
        torch.testing.assert_close(layer.mask() - layer.probe(), missing, rtol=1e-8, atol=1e-10)
        assert (missing.abs() > 1e-6).all()  # for kept tokens as well


@pytest.mark.parametrize("seed", SEEDS)
def test_probe_and_gather_agree_for_kept_tokens(seed):
    layer = random_example(seed)
    kept = layer.policy == 1
    probe, gather = layer.probe(), layer.gather()
    torch.testing.assert_close(probe[kept], gather[kept], rtol=1e-9, atol=1e-11)
    assert (gather[~kept] == 0).all()
    # With eps, dropped keys count for the maximum and for the mean: a difference of order eps.
    gaps = [
        (layer.probe(eps)[kept] - layer.gather(eps)[kept]).abs().max().item()
        for eps in (1e-8, 1e-6)
    ]
    assert gaps[0] > 0
    assert gaps[1] / gaps[0] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_kept_gradients_are_those_of_gather(seed):
    layer = random_example(seed).reading_kept_rows()
    torch.testing.assert_close(
        layer.mask(policy_grad="kept"), layer.gather(), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_the_values_agree(seed):
    layer = random_example(seed)
    token_map = layer.token_map()
    position = token_map.members[:, : token_map.num_tokens]
    q, k, v = (layer.rows(token_map, t) for t in (layer.q, layer.k, layer.v))
    mask = tokenops.policy_attention(layer.q, layer.k, layer.v, layer.policy)
    probe = tokenops.policy_attention(q, layer.k, layer.v, layer.policy, query_position=position)
    gather = tokenops.policy_attention(q, k, v)
    torch.testing.assert_close(layer.rows(token_map, mask), probe)
    torch.testing.assert_close(probe, gather)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_diagonal_contributes_nothing(seed):
    """If the loss reads one row only, the decision about its token has no gradient."""
    layer = random_example(seed)
    for j in range(3):
        row = torch.zeros(9, dtype=torch.float64)
        row[j] = 1
        alone = Example(layer.q, layer.k, layer.v, layer.g * row[:, None], layer.policy)
        grad = alone.mask()
        assert (grad[:, j] == 0).all()
        assert (grad.abs().sum(1) > 0).all()
    single = random_example(seed, tokens=1, keep=seed % 2)
    assert (single.mask() == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_dropped_hidden_states_get_no_gradient_from_kept_rows(seed):
    layer = random_example(seed).reading_kept_rows()
    leaves = [t.clone().requires_grad_() for t in (layer.q, layer.k, layer.v)]
    out = tokenops.policy_attention(*leaves, layer.policy)
    for grad in torch.autograd.grad(out, leaves, layer.g):
        dropped = (layer.policy == 0)[:, None, :, None].expand_as(grad)
        assert (grad[dropped] == 0).all()
        assert (grad[~dropped] != 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_values_of_dropped_tokens_get_a_gradient_of_the_order_of_eps(seed):
    layer = random_example(seed).reading_kept_rows()
    sizes = []
    for eps in (1e-8, 1e-6):
        v = layer.v.clone().requires_grad_()
        out = tokenops.policy_attention(layer.q, layer.k, v, layer.policy, eps=eps)
        (grad,) = torch.autograd.grad(out, v, layer.g)
        sizes.append(grad[(layer.policy == 0)[:, None, :, None].expand_as(grad)].abs().max().item())
    assert sizes[0] > 0
    assert sizes[1] / sizes[0] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_two_layers(seed):
    """The gradient is a sum over layers; for a dropped token, probe and gather have one term."""
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(2, 1, 7, 6, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64) / 6**0.5
    decision = torch.tensor([[1, 0, 1, 1, 0, 1, 0]]).double()[..., None]
    token_map = tokenops.prune(decision[..., 0], 4)
    g = g * decision

    def layer(queries, keys, weights, policy, position=None):
        q, k, v = (
            (t @ w).unflatten(-1, (2, 3)).transpose(1, 2)
            for t, w in zip((queries, keys, keys), weights, strict=True)
        )
        out = tokenops.policy_attention(q, k, v, policy, query_position=position)
        return queries + out.transpose(1, 2).flatten(2)

    one, two, both = (decision.clone().requires_grad_() for _ in range(3))
    out = layer(x, x, weights[0], one)
    out = layer(out, out, weights[1], two)
    first, second = torch.autograd.grad(out, (one, two), g)

    position = token_map.members[:, : token_map.num_tokens]
    probe = layer(token_map.merge(x), x, weights[0], both, position)
    probe = layer(probe, probe, weights[1], token_map.merge(both))
    torch.testing.assert_close(probe, token_map.merge(out))
    (grad,) = torch.autograd.grad(probe, both, token_map.merge(g))
    torch.testing.assert_close(grad, first + second * decision)
    assert (second[decision == 0].abs() > 1e-6).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_ways_that_do_not_work(seed):
    layer = random_example(seed)
    kept = layer.policy == 1
    exact, log = layer.mask(), layer.biased(torch.log)
    torch.testing.assert_close(log[kept], exact[kept])
    assert log[~kept].isnan().all()
    large = layer.biased(lambda p: (1 - p) * -1e5)
    torch.testing.assert_close(large[kept], 1e5 * exact[kept])
    assert (large[~kept] == 0).all()
    policy = layer.policy.clone().requires_grad_()
    hidden = layer.logits().masked_fill((policy == 0)[:, None, None] & ~layer.is_self, -math.inf)
    assert not hidden.softmax(-1).requires_grad


@pytest.mark.parametrize("seed", SEEDS)
def test_the_effect_of_a_whole_token(seed):
    layer = random_example(seed, batch=1, heads=1)
    probabilities = layer.probabilities()
    out = tokenops.policy_attention(layer.q, layer.k, layer.v, layer.policy)
    for j in range(9):
        turned = layer.policy.clone()
        turned[0, j] = 1 - turned[0, j]
        other = tokenops.policy_attention(layer.q, layer.k, layer.v, turned)
        p = probabilities[..., j : j + 1]
        factor = p / (1 + p) if layer.policy[0, j] == 0 else -p / (1 - p)
        expected = out + factor * (layer.v[:, :, j : j + 1] - out)
        rows = [i for i in range(9) if i != j]
        torch.testing.assert_close(other[:, :, rows], expected[:, :, rows])


def test_images_that_keep_different_numbers():
    """A padded map, in both modes that remove tokens."""
    layer = random_example(0, batch=3)
    layer.policy[0, :] = 1
    layer.policy[2, 1:] = 0
    layer.policy[2, 0] = 1
    policy = layer.policy[..., None].clone().requires_grad_()
    token_map = tokenops.prune(policy[..., 0], policy.sum((1, 2)).int())
    live = token_map.key_mask()
    assert torch.equal(live.sum(1).double(), layer.policy.sum(1))
    q, k, v, g = (layer.rows(token_map, t) for t in (layer.q, layer.k, layer.v, layer.g))
    gather = tokenops.policy_attention(q, k, v, token_map.merge(policy), key_padding_mask=~live)
    probe = tokenops.policy_attention(q, layer.k, layer.v, policy, query_position=token_map.members)
    rows = live[:, None, :, None]
    torch.testing.assert_close(gather * rows, probe * rows)
    expected = layer.reading_kept_rows().mask()
    (grad,) = torch.autograd.grad(probe, policy, g)
    torch.testing.assert_close(grad[..., 0], expected)
    (grad,) = torch.autograd.grad(gather, policy, g)
    torch.testing.assert_close(grad[..., 0], expected * layer.policy)
