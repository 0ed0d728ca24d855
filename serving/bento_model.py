"""Where BentoML keeps what is to be served: its model store, or the bento that this code was packed into.

python -m serving.bento_model artifact/ mamba        # -> mamba:VERSION, listed by `bentoml models list`
YUNMIN_ARTIFACT=bentoml:mamba:latest bentoml serve
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from yunmin.cli import run
from yunmin.errors import ConfigError, MissingExtraError

SCHEME = "bentoml:"
PACKED = "artifact"
_ROOT = Path(__file__).parents[1]


def own_artifact(root: Path = _ROOT) -> str:
    """What the bento around this code was built to serve.

    Args:
        root: folder that has the package `serving`.

    Returns:
        The artifact packed into it, else its one model as `bentoml:NAME:VERSION`; empty outside of a bento, and where
        the bento holds neither.

    Raises:
        ConfigError: it has several models.
    """
    if not (root.parent / "bento.yaml").is_file():
        return ""
    if (root / PACKED).is_dir():
        return str(root / PACKED)
    tags = [str(model.tag) for model in _bentoml().Bento.from_path(str(root.parent)).info.all_models]
    if len(tags) > 1:
        raise ConfigError(f"{root.parent / 'bento.yaml'}: expected one model, found {', '.join(tags)}")
    return SCHEME + tags[0] if tags else ""


def stored_artifact(tag: str, root: Path = _ROOT) -> tuple[str, str]:
    """The folder of a model in BentoML's store, and its name.

    Args:
        tag: NAME, NAME:latest or NAME:VERSION.
        root: folder that has the package `serving`; a container's bento brings a store of its own, which comes first.

    Raises:
        ConfigError: there is none.
        MissingExtraError: BentoML is not installed.
    """
    bentoml = _bentoml()
    from bentoml._internal.models import ModelStore

    packed = root.parent / "models"
    stores: list[dict[str, Any]] = [{}]
    if (root.parent / "bento.yaml").is_file() and packed.is_dir():
        stores.insert(0, {"_model_store": ModelStore(packed)})
    for store in stores:
        try:
            model = bentoml.models.get(tag, **store)
        except (bentoml.exceptions.NotFound, bentoml.exceptions.BentoMLException, ValueError):
            continue
        return str(model.path), str(model.tag.name)
    raise ConfigError(f"{SCHEME}{tag}: BentoML's store has no such model; `bentoml models list` shows what it has")


def store_artifact(artifact: Path, tag: str) -> str:
    """Copies a finished artifact into BentoML's store.

    Args:
        artifact: folder that `yunmin export` wrote.
        tag: NAME (a version is made up) or NAME:VERSION.

    Returns:
        The tag with its version.

    Raises:
        ArtifactError: the folder is no artifact, or damaged.
        ConfigError: the tag is impossible or taken.
    """
    bentoml = _bentoml()
    from yunmin.artifact import read_manifest

    if tag.endswith(":latest"):  # BentoML would make a folder of that name, where it keeps a pointer to the newest
        raise ConfigError(f"{tag}: latest names the newest version; expected NAME or NAME:VERSION")
    read_manifest(artifact)
    labels = {"framework": "yunmin"}
    try:
        with bentoml.models.create(tag, labels=labels, metadata={"source": artifact.resolve().name}) as model:
            shutil.copytree(artifact, model.path, dirs_exist_ok=True)
    except (bentoml.exceptions.BentoMLException, ValueError) as error:
        raise ConfigError(f"{tag}: {error}") from None
    return str(model.tag)


def _bentoml() -> Any:
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # before BentoML is imported
    try:
        import bentoml
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "serve", "models of BentoML") from None
    return bentoml


def main(argv: list[str]) -> int:
    """`python -m serving.bento_model ARTIFACT NAME[:VERSION]`."""
    arguments = argparse.ArgumentParser("python -m serving.bento_model", description=store_artifact.__doc__)
    arguments.add_argument("artifact", type=Path, help="folder that `yunmin export` wrote")
    arguments.add_argument("tag", help="NAME or NAME:VERSION in BentoML's store")
    options = arguments.parse_args(argv)
    print(store_artifact(options.artifact, options.tag))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
