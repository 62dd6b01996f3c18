"""What people and programs see of a run: lines, a bar, a summary, a job log, events.

``terminal`` is the only one that writes to the terminal; ``display`` puts them together.
"""
