# SPDX-License-Identifier: Apache-2.0
"""What all Triton kernels share: launches, and the devices that they are for.

Imported by ``ops/*/triton/`` alone, which in turn are imported when a kernel is first called, so
that ``import tokenops`` needs no Triton.
"""

#: Versions of Triton whose launcher for NVIDIA devices was seen to make the same launches past the
#: binder as through it: grid, block, shared memory, stream, every pointer and every number.
VERIFIED = ("3.6.0", "3.7.1")


def release(version: str) -> str:
    """A version without the commit that vendors append: ``"3.6.0+git1a2b3c"`` is 3.6.0."""
    return version.partition("+")[0]
