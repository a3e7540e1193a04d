"""The figures of a report, one file each: `figures(table, analysis)` yields (name, matplotlib figure), or nothing.

Beside them tints.py and variants.py: what several figures need and can do without matplotlib.
"""
