"""Runnable examples, and the data they need."""
