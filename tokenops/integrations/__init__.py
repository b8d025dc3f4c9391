# SPDX-License-Identifier: Apache-2.0
"""Patches that bring tokenops into other libraries' models; each imports its library on use."""
