"""The main job on real input: five examples, each a script of its own; `python -m examples` runs them all."""
