"""The programs of page/, which are no package, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent.parent / "page"


def page_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"page_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
