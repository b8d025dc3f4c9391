# SPDX-License-Identifier: Apache-2.0
"""What all Triton kernels share: how one is launched, for which device, and what it compiles to.

Imported by ``ops/*/triton/`` alone, which in turn are imported when a kernel is first called, so
that ``import tokenops`` needs no Triton.
"""
