"""The project's optional packages, imported when they are first needed."""

import importlib
from types import ModuleType


def require(package: str, extra: str = "corpora") -> ModuleType:
    """Import a package of one of the project's extras when it is first needed.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {package!r}, which is not installed here: pip install 'cratelab[{extra}]'"
        ) from error
