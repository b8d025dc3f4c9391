# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: ``measure`` times the cases, ``report`` makes the tables, ``compare`` two commits."""
