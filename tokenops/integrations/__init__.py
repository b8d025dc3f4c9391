# SPDX-License-Identifier: Apache-2.0
"""Integrations with other libraries, none of which ``import tokenops`` imports."""
