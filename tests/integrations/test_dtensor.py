# SPDX-License-Identifier: Apache-2.0
"""A batch that is sharded over two processes gives the same bits as the whole batch."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tokenops


def _layer(x: torch.Tensor) -> tuple[tokenops.TokenMap, torch.Tensor, torch.Tensor]:
    token_map = tokenops.match(x, 3, num_prefix=1)
    merged, size = tokenops.merge_wavg(x, token_map)
    return token_map, token_map.unmerge(merged, residual=x), size


def _splits(tokens: int) -> dict[str, dict[str, Any]]:
    """Options of match with tensors or generators, the same at each call."""
    generator = torch.Generator().manual_seed(2)
    lists = torch.tensor([0, 2, 5]), torch.tensor([1, 3])
    each = torch.stack([torch.arange(tokens) % 4 == image for image in range(4)])
    return {
        "random": {"split": tokenops.random(5, generator)},
        "grid": {"split": tokenops.grid(2, 4, 1, 2), "num_prefix": 1},
        "grid, drawn": {"split": tokenops.grid(2, 4, 1, 2, generator), "num_prefix": 1},
        "lists": {"split": lists},
        "protected": {"protected": each[1]},
        "protected, each": {"protected": each, "order": "tome"},
        "threshold": {"threshold": torch.tensor(0.1)},
        "thresholds": {"threshold": torch.linspace(-0.3, 0.3, 4)},
    }


def _attend(x: torch.Tensor, policy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = x.unflatten(2, (2, -1)).transpose(1, 2)
    out = tokenops.policy_attention(q, q, q, policy, eps=1e-6)
    return out, tokenops.attention_scores(q, q, policy=policy, query_index=[0])


#: What Python puts around the operators.
PYTHON_SIDE = (
    lambda x: tokenops.match(x, 3).key_mask(),
    lambda x: tokenops.match(x, 3, threshold=0.1).key_mask(),
    lambda x: tokenops.match(x, 3).source_matrix(),
    lambda x: tokenops.match(x, 3).compose(tokenops.prune(x[..., 0], 9)).assign,
    lambda x: tokenops.prune(x[..., 0], 4, num_prefix=1).assign,
    lambda x: tokenops.prune(x[..., 0], 4, order="score", fuse=True).members,
    lambda x: tokenops.topk_keep(x[..., 0], 4, num_prefix=2),
)


def _worker(rank: int, folder: str) -> None:
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    import tokenops.integrations.dtensor

    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(0))
    sharded = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    whole = x.clone().requires_grad_()

    token_map, out, size = _layer(sharded)
    expected_map, expected, expected_size = _layer(whole)
    assert isinstance(out, DTensor)
    assert out.placements == (Shard(0),)
    assert torch.equal(token_map.assign.full_tensor(), expected_map.assign)
    assert torch.equal(out.full_tensor(), expected)
    assert torch.equal(size.full_tensor(), expected_size)

    for name in _splits(9):
        got = tokenops.match(sharded, 2, **_splits(9)[name])
        wanted = tokenops.match(whole, 2, **_splits(9)[name])
        assert got.assign.placements == (Shard(0),), name
        assert torch.equal(got.assign.full_tensor(), wanted.assign), name
        assert torch.equal(got.merge(sharded).full_tensor(), wanted.merge(whole)), name
    for mask in (torch.arange(9) == 4, torch.eye(9, dtype=torch.bool)[:4]):
        placement = Replicate() if mask.dim() == 1 else Shard(0)
        distributed = distribute_tensor(mask, mesh, [placement])
        got = tokenops.match(sharded, 2, protected=distributed)
        wanted = tokenops.match(whole, 2, protected=mask)
        assert torch.equal(got.assign.full_tensor(), wanted.assign)

    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(sharded.grad.full_tensor(), whole.grad)

    policy = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    sharded_policy = distribute_tensor(policy, mesh, [Shard(0)]).requires_grad_()
    policy.requires_grad_()
    results, expected_results = _attend(sharded, sharded_policy), _attend(whole, policy)
    for got, wanted in zip(results, expected_results, strict=True):
        assert got.placements == (Shard(0),)
        assert torch.equal(got.full_tensor(), wanted)
    sum(r.square().sum() for r in results).backward()
    sum(r.square().sum() for r in expected_results).backward()
    assert torch.equal(sharded.grad.full_tensor(), whole.grad)
    assert torch.equal(sharded_policy.grad.full_tensor(), policy.grad)
    for function in PYTHON_SIDE:
        got, wanted = function(sharded.detach()), function(whole.detach())
        assert got.placements == (Shard(0),)
        assert torch.equal(got.full_tensor(), wanted)
    dist.barrier()
    Path(folder, f"done{rank}").touch()
    os._exit(0)  # gloo's threads may crash at interpreter exit


def test_batch_sharding(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done0", "done1"]
