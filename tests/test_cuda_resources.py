# SPDX-License-Identifier: Apache-2.0
"""Resources of the compiled CUDA kernels: the output of ptxas, and the budget."""

import shutil

import pytest

from benchmarks import budget, cuda_resources, store

ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120")
COLUMNS = ("kernel", "arch", *budget.NUMBERS)

MATCH = "_ZN8tokenops8matching12_GLOBAL__N_111match_imageILb1ELi8ELi2EEEvPKfPi"
MERGE = "_ZN8tokenops7merging5mergeIN3c108BFloat16EEEvPKT_PS4_"

LOG = f"""\
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '{MERGE}' for 'sm_100'
ptxas info    : Function properties for {MERGE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 7.612 ms
ptxas info    : Compiling entry function '{MATCH}' for 'sm_80'
ptxas info    : Function properties for {MATCH}
    24 bytes stack frame, 20 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 2336 bytes smem
ptxas info    : Compile time = 118.574 ms
ptxas info    : Compiling entry function '{MERGE}' for 'sm_90a'
ptxas info    : Function properties for {MERGE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 1 barriers, 32768 bytes smem, 429 bytes cmem[0]
"""


def row(kernel, arch, registers, stack=0, spills=0, shared=0):
    numbers = map(str, (registers, stack, spills, shared))
    return dict(zip(COLUMNS, (kernel, arch, *numbers), strict=True))


#: Sorted by kernel, then by architecture.
ROWS = [
    row("match_image<true, 8, 2>", "sm_80", 255, 24, 32, 2336),
    row("merge<BFloat16>", "sm_90a", 38, shared=32768),
    row("merge<BFloat16>", "sm_100", 40),
]

needs_names = pytest.mark.skipif(shutil.which("c++filt") is None, reason="there is no c++filt")


@needs_names
def test_parse():
    assert cuda_resources.parse(LOG) == ROWS
    assert cuda_resources.parse("ptxas info    : 0 bytes gmem\n") == []


def test_within_the_budget():
    assert budget.excesses(ROWS[1:], ROWS[1:]) == []
    fewer = [row("merge<BFloat16>", "sm_100", 39)]
    assert budget.excesses(fewer, ROWS) == []


def test_beyond_the_budget():
    more = [row("merge<BFloat16>", "sm_90a", 39, shared=32769)]
    assert budget.excesses(more, ROWS) == [
        "merge<BFloat16> sm_90a: 39 registers, at most 38 allowed",
        "merge<BFloat16> sm_90a: 32769 shared, at most 32768 allowed",
    ]


def test_no_budget_allows_a_stack():
    """A stack is an error even if the budget has one."""
    assert budget.excesses(ROWS[:1], ROWS) == [
        "match_image<true, 8, 2> sm_80: 24 stack, at most 0 allowed",
        "match_image<true, 8, 2> sm_80: 32 spills, at most 0 allowed",
    ]


def test_kernels_that_the_budget_does_not_know():
    unknown = [row("merge<BFloat16>", "sm_120", 40, spills=4)]
    assert budget.excesses(unknown, ROWS) == [
        "merge<BFloat16> sm_120: not in the budget",
        "merge<BFloat16> sm_120: 4 spills, at most 0 allowed",
    ]


def test_kernels_that_are_missing():
    assert cuda_resources.missing(ROWS, ROWS) == []
    assert cuda_resources.missing(ROWS[:2], ROWS) == ["merge<BFloat16> sm_100: not compiled"]


@needs_names
def test_command(tmp_path, monkeypatch, capsys):
    log, library = tmp_path / "ptxas.log", tmp_path / "library.so"
    monkeypatch.setattr(cuda_resources, "BUDGET", tmp_path / "cuda.csv")
    files = [str(log), str(library)]
    library.write_bytes(bytes(1000))
    without_spills = LOG[LOG.rindex("ptxas info    : Compiling") :]
    log.write_text(without_spills)
    assert cuda_resources.main([*files, "--write"]) == 0
    assert store.read(cuda_resources.BUDGET) == ROWS[1:2]
    assert cuda_resources.main(files) == 0
    assert "1 kernels for sm_90a" in capsys.readouterr().out
    log.write_text(LOG)
    assert cuda_resources.main(files) == 1
    assert "merge<BFloat16> sm_100: not in the budget" in capsys.readouterr().out
    log.write_text(without_spills)
    monkeypatch.setattr(cuda_resources, "LARGEST", 999)
    assert cuda_resources.main(files) == 1
    assert "the library has 1000 bytes, at most 999 allowed" in capsys.readouterr().out
    monkeypatch.undo()
    log.write_text("")  # nothing was compiled
    assert cuda_resources.main(files) == 1


# ---- the budget ----


def test_the_budget_knows_each_kernel_on_each_architecture():
    rows = store.read(cuda_resources.BUDGET)
    assert all(tuple(r) == COLUMNS for r in rows)
    pairs = [(r["kernel"], r["arch"]) for r in rows]
    assert len(set(pairs)) == len(pairs)
    assert {arch for _, arch in pairs} == set(ARCHS)
    kernels = {arch: {k for k, a in pairs if a == arch} for arch in ARCHS}
    for arch in ARCHS:
        assert kernels[arch] == kernels[ARCHS[0]], arch


def test_the_budget_has_no_stack_and_no_spills():
    rows = store.read(cuda_resources.BUDGET)
    assert rows
    assert {(r["stack"], r["spills"]) for r in rows} == {("0", "0")}
    assert all(0 < int(r["registers"]) <= 255 for r in rows)
    assert budget.excesses(rows, rows) == []
