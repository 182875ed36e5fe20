"""The pipeline from a source to a verdict, and re-checking its results."""
