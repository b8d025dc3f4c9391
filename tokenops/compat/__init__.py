# SPDX-License-Identifier: Apache-2.0
"""Drop-ins: tokenops under the names, arguments and results of the projects it serves.

One module for each project; none is imported before it is asked for. They use the public
names of tokenops and its checks of arguments, nothing else.
"""
