"""ONNX files: writing them from a network, and rewriting them for runtimes."""
