"""The benchmark: `python bench/run.py`. README.md says what is measured, and how."""
