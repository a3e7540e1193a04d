"""The plan of a sweep: what is done, what is missing and why, what it will cost, and what its seeds can show.

It reads the sweep, the store and the pilots (`pilots.jsonl`), and submits nothing. What no record and no pilot tells is
'unknown'. Only a pilot (pilot.py) trains; the rest never loads torch.
"""
