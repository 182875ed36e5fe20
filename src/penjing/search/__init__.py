"""Search: from a goal to the recipe and the artifact that meet it."""
