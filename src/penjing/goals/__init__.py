"""Goals: parsing, and choosing the candidate that meets them best. Reads records alone."""
