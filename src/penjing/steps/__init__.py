"""What every technique receives and returns: drafts, plans, and what is known of the world."""
