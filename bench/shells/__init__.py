"""What stands around every mixer, one file a shell, named like it; base.py has the seam, directions.py two of one."""
