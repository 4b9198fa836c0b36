"""The package ``sageattention`` where it is installed (SageAttention 2, arXiv 2410.02367, 2411.10958): which version there is.

It is imported by the first call of its kernel, not before.
"""

import importlib.metadata
import importlib.util

PACKAGE = "sageattention"


def sage_version() -> str | None:
    """Of the installed package, "unknown" where it does not say; None without one."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def require_sage(where: str) -> None:
    """Raises ``ValueError`` without the package."""
    if sage_version() is None:
        raise ValueError(
            f"{where}: {PACKAGE} must be installed for an attention that is planned with it, got none. pip install {PACKAGE} "
            "(its authors' page says which version fits which device), or plan another attention: paro-int8 needs no package."
        )
