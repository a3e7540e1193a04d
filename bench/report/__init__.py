"""The report room: from records to tables, figures and the proof that they are fair. It reads nothing else."""
