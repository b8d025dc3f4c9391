# SPDX-License-Identifier: Apache-2.0
"""The operators as attributes of ``ops``, each served by the chosen backend."""

from tokenops import _backend


class _Operators:
    def __getattr__(self, name):
        def call(first, *rest):
            tensor = first[0] if isinstance(first, list) else first
            return _backend.dispatch(name, tensor)(first, *rest)

        return call


ops = _Operators()
