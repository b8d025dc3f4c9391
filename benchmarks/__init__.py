# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: ``registry`` says what is timed, ``run`` times it, ``report`` makes the tables."""
