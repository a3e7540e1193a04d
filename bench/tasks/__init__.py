"""One file a task; `base.py` is the seam."""
