"""What `tools/benchmark.py` measures: one module for each of its words, `runtimes`, and the files that are written."""
