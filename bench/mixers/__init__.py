"""One file a mixer; `base.py` is the seam."""
