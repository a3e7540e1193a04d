"""The figures of a report, one file each: `figures(table, analysis)` yields (name, matplotlib figure), or nothing."""
