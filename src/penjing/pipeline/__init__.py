"""The one way through, from a source to a verdict, and what looks at its results again."""
