# SPDX-License-Identifier: Apache-2.0
"""Drop-ins: tokenops with the names, arguments and results of other projects.

There is one module for each project, imported only on request. The modules use only the public
names of tokenops and its argument checks.
"""
