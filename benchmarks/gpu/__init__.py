# SPDX-License-Identifier: Apache-2.0
"""The parts of ``benchmarks.gpu_check`` and ``benchmarks.gpu_cache``.

``runner`` runs steps within a deadline and keeps an archive of all results, ``steps`` says what is
run, ``bars`` compares with what is to be reached, ``record`` keeps what each case came to. Those
four know no torch. The programs that steps run: ``describe``, ``library``, ``ceilings``, ``suite``.
``prefill`` and ``libcuda.c`` compile Triton's kernels for a GPU that is not there.
"""
