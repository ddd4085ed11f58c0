"""What to say when a package that only federated CLIP needs is not installed."""

from __future__ import annotations


def missing_package(error: ModuleNotFoundError) -> ImportError:
    """The error to raise in place of the one that an import met; it says what to install.

    try:
        import peft
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    """
    return ImportError(
        f"LoRA for federated CLIP needs the package '{error.name}', which is not installed. "
        "Install what is missing: pip install -r requirements-federated.txt -r requirements.txt",
        name=error.name,
    )
