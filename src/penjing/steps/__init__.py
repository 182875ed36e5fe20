"""What every technique receives and returns: drafts, plans, and the context of a run."""
