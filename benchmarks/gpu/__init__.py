# SPDX-License-Identifier: Apache-2.0
"""Parts of ``benchmarks.gpu_check`` and ``benchmarks.gpu_cache``.

``runner`` runs the steps that ``steps`` lists, ``bars`` compares results with limits, ``record``
keeps the result of each case: these four need no torch. ``library``, ``ceilings`` and ``suite`` are
programs of steps. ``prefill`` and ``libcuda.c`` compile Triton kernels without a GPU.
"""
