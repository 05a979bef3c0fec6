# SPDX-License-Identifier: Apache-2.0
"""The commands: arguments in, one call, an exit status out. Nobody imports them."""
