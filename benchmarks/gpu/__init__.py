"""The stages of `python -m benchmarks.cuda`. What needs a GPU goes through `timer`; all else is plain logic."""
