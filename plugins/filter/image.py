"""Filters that the role image computes with."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Image = dict[str, Any]

# Debian with Python, a step on the way to other images: it stays on the host that builds.
BASE: Image = {"name": "base", "contexts": ["images/base"], "base": "debian"}


def image_wanted(
    containers: Mapping[str, Any], names: Iterable[str], variables: Mapping[str, str]
) -> dict[str, Image]:
    """Return the images of the containers of these names, as image_plan wants them.

    containers is the catalogue, in which an image's upstream is the name of a variable.
    """

    def wanted(image: Image) -> Image:
        return {**image, "upstream": variables[image["upstream"]] if "upstream" in image else ""}

    return {name: wanted(containers[name]["image"]) for name in names}


def image_plan(
    wanted: Mapping[str, Image],
    *,
    root: str,
    stack: str,
    debian: str,
    revision: int,
    source: str,
    registry: str = "",
    push: bool = False,
) -> list[Image]:
    """Return where each image wanted comes from, and the reference that it will have.

    wanted: by name, an image's contexts (folders below root, the last one wins), base and upstream.
    Added are name, ref and origin: upstream (the official image, where source is "registry"),
    registry (the private one) or build. What is built is named by its content. The step that others
    stand on comes first.
    """

    def planned(image: Image) -> Image:
        image = {"base": "base", "upstream": "", **image}
        own = f"{stack}/{image['name']}:{fingerprint(image, root, debian, revision)}"
        if registry and image["name"] != "base":
            return {**image, "origin": "build" if push else "registry", "ref": f"{registry}/{own}"}
        if image["upstream"] and source == "registry":
            return {**image, "origin": "upstream", "ref": image["upstream"]}
        return {**image, "origin": "build", "ref": own}

    return [planned(BASE), *(planned({"name": name, **image}) for name, image in wanted.items())]


def image_missing(plan: Iterable[Image], images: Iterable[Mapping[str, Any]]) -> list[Image]:
    """Return what of plan is not among images, which are as the engine's GET /images/json tells.

    The base image is left out unless a missing image is built on it.
    """
    lists = [image[name] or [] for image in images for name in ("RepoTags", "RepoDigests")]
    refs = {ref for found in lists for ref in found}
    missing = [image for image in plan if image["ref"] not in refs]
    builds = [image for image in missing if image["origin"] == "build"]
    based = any(image["base"] == "base" for image in builds)
    return [image for image in missing if based or image["name"] != "base"]


def fingerprint(image: Image, root: str, debian: str, revision: int) -> str:
    """Return twelve hexadecimal digits for all that an image is made of."""
    folders = image["contexts"] + ([] if image["base"] == "debian" else BASE["contexts"])
    made_of = [content(root, folder) for folder in folders]
    told = json.dumps([made_of, debian, image["upstream"], revision])
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def content(root: str, folder: str) -> list[tuple[str, str]]:
    """Return the files of a folder below root, each with its SHA-256, without tests and caches."""
    top = Path(root, folder)
    files = {path.relative_to(top): path for path in sorted(top.rglob("*")) if path.is_file()}
    return [
        (str(name), hashlib.sha256(path.read_bytes()).hexdigest())
        for name, path in files.items()
        if not any(
            part in ("tests", "__pycache__") or part.endswith("cache") for part in name.parts[:-1]
        )
    ]


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "image_wanted": image_wanted,
            "image_plan": image_plan,
            "image_missing": image_missing,
        }
