"""One file a mixer; `base.py` is the seam, `scan.py` a computation that several share."""
