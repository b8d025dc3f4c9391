# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton kernels, which all operators share.

``launch`` imports Triton. Only ``ops/*/triton/`` import ``launch``, and they are imported when a
kernel is first called, so ``import tokenops`` does not need Triton.
"""

#: Versions of Triton for which ``tests/stand_in.py`` passes on NVIDIA's launcher: a launch that
#: bypasses the binder has the same grid, block, shared memory, stream, pointers and numbers.
VERIFIED = ("3.6.0", "3.7.1")


def release(version: str) -> str:
    """Remove the local version that vendors append: ``"3.6.0+git1a2b3c"`` becomes ``"3.6.0"``."""
    return version.partition("+")[0]
