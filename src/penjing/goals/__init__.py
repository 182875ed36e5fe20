"""Goals: their words, and which candidate meets them best. Reads records alone."""
