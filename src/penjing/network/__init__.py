"""The captured form: capturing a network, reading its graph, exporting it again."""
