# SPDX-License-Identifier: Apache-2.0
"""The search for faster launch settings, without a GPU."""

import pytest

pytest.importorskip("triton")

from benchmarks import launches, tune
from benchmarks.ahead_of_time import record
from tokenops._triton import launch
from tokenops._triton.launch import Settings


def test_walk_finds_the_best():
    def time(s):
        tiles = abs(s.block_m - 16) + abs(s.block_n - 256) / 16
        return tiles + abs(s.num_warps - 8) + abs(s.num_stages - 3)

    start = Settings(64, 64, 4, 1)
    best, seconds, before = tune.walk(start, lambda s: 10 + time(s))
    assert best == Settings(16, 256, 8, 3)
    assert (seconds, before) == (10, 10 + time(start))


def test_walk_stays_where_nothing_is_clearly_faster():
    start = Settings(64, 64, 4, 1)
    assert tune.walk(start, lambda s: 1.0 if s == start else 0.995)[0] == start
    assert tune.walk(start, lambda s: 1.0 if s == start else float("inf"))[0] == start


def test_replaced_heuristics():
    def settings():
        with record("sm_90") as recorded:
            launches.cases()["wavg size bf16 C768 B1024"]()
        return recorded[0].launch.settings

    def pick(*arguments):
        return trial

    shipped, trial = settings(), Settings(16, 16)
    before = dict(launch.heuristics)
    with tune.replaced(dict.fromkeys(before, pick)):
        assert settings() == trial != shipped
    assert settings() == shipped
    assert launch.heuristics == before
