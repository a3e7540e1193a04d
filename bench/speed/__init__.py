"""How fast, how large: a whole layer around each mixer, and whole trainings, timed side by side on one device.

settings.py says what is measured (configs/speed.yaml and the command line), layer.py builds it, naive.py is the form
that speed-ups are ratios to, clock.py measures one step, rounds.py lets all cells take turns, figures.py makes medians,
shares and exponents of it, training.py times the training module, verb.py writes and prints.
"""
