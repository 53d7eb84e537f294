"""The main job on real input: ten examples, each a script of its own; `python -m examples` runs them all."""

import importlib.util
from pathlib import Path

missing = [
    name
    for name, module in {"matplotlib": "matplotlib", "scikit-learn": "sklearn", "tqdm": "tqdm"}.items()
    if importlib.util.find_spec(module) is None
]
if missing:
    root = Path(__file__).resolve().parents[1]
    raise ModuleNotFoundError(f"the examples need {', '.join(missing)}: pip install -e '{root}[examples]'")
