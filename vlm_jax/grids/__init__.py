# SPDX-License-Identifier: Apache-2.0
"""Every cell of a scaling run: trained, evaluated, written down as a row."""
