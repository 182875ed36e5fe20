"""What people read about a run: one HTML file and tables for the terminal, both made from a record alone.

Nothing here imports torch: a report can be written where only `record.json` is.
"""
