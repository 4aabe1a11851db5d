"""Enter finished .om files into qcompile.json.

This needs nothing but Python 3.7: `qcompile atc` copies the file beside build_om.sh, where it runs on the machine with CANN.

    python3 finish_manifest.py [DIRECTORY]

A graph's entry keeps its role and interface; its file becomes the .om, its data the weight files beside it, and `onnx`
remembers what it was built from. The manifest is written once every graph is there, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

MANIFEST_NAME = "qcompile.json"
WORK_FOLDER = "atc_build"
RECORD_NAME = "done.json"
OM_MAGIC = b"IMOD"


def finish(directory: str, build: dict[str, Any]) -> list[str]:
    """Write the manifest; returns the names of the .om files it lists.

    Args:
        directory: The compiled-model directory; `atc_build/NAME/done.json` are the records of finished graphs.
        build: What to say under `build`: soc_version, cann_version, host_cpu; `simulated` where it is.

    Raises:
        ValueError: A graph has no finished .om, or the manifest cannot be used.
    """
    path = os.path.join(directory, MANIFEST_NAME)
    with open(path, encoding="utf-8") as stream:
        manifest = json.load(stream)
    listed = []
    for graph in manifest["graphs"]:
        source = graph.get("onnx") or graph["file"]
        name = source["name"].rsplit(".onnx", 1)[0]
        record = read_record(directory, name)
        if record is None:
            raise ValueError(f"{directory}: no finished .om for {source['name']}")
        if "onnx" not in graph:  # the runtime ignores both
            graph["onnx"], graph["onnx_data"] = source, graph.get("data") or []
        graph["file"] = file_entry(directory, record["om"])
        graph["data"] = [file_entry(directory, weight) for weight in record["weights"]]
        listed.append(record["om"])
    kept = {key: value for key, value in (manifest.get("build") or {}).items() if key != "simulated"}
    manifest["build"] = dict(kept, **build)
    temporary = path + ".tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(manifest, stream, indent=1, ensure_ascii=False)
            stream.write("\n")
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return listed


def uncompiled(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest said before `finish`: its graphs are the .onnx files again."""
    graphs = []
    for graph in manifest["graphs"]:
        kept = {key: value for key, value in graph.items() if key not in {"onnx", "onnx_data"}}
        if "onnx" in graph:
            kept.update(file=graph["onnx"], data=graph.get("onnx_data", []))
        graphs.append(kept)
    return {**{key: value for key, value in manifest.items() if key != "build"}, "graphs": graphs}


def read_record(directory: str, name: str) -> dict[str, Any] | None:
    """Return the record of a finished graph whose files are still there with their sizes, or None."""
    try:
        with open(os.path.join(directory, WORK_FOLDER, name, RECORD_NAME), encoding="utf-8") as stream:
            record: dict[str, Any] = json.load(stream)
        files = [record["om"], *record["weights"]]
        sizes = dict(record["sizes"])
        if any(os.path.getsize(os.path.join(directory, file)) != sizes[file] for file in files):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


def write_record(directory: str, name: str, key: str, om: str, weights: Sequence[str]) -> None:
    """Write the record of a finished graph: what it was built from (key), and the files that came of it."""
    sizes = {file: os.path.getsize(os.path.join(directory, file)) for file in [om, *weights]}
    path = os.path.join(directory, WORK_FOLDER, name, RECORD_NAME)
    with open(path + ".tmp", "w", encoding="utf-8") as stream:
        json.dump({"key": key, "om": om, "weights": list(weights), "sizes": sizes}, stream)
    os.replace(path + ".tmp", path)


def file_entry(directory: str, name: str) -> dict[str, Any]:
    """Return name, size and sha256 of a file."""
    path = os.path.join(directory, name)
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for chunk in iter(lambda: stream.read(4 << 20), b""):
            digest.update(chunk)
    return {"name": name, "size_bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


def collect(directory: str, name: str, key: str) -> str:
    """Move what ATC left in atc_build/NAME into place: NAME.om (or NAME_linux_aarch64.om) and weight/*.

    Raises:
        ValueError: There is no .om, or more than one, or it is none.
    """
    folder = os.path.join(directory, WORK_FOLDER, name)
    found = [file for file in sorted(os.listdir(folder)) if file.endswith(".om") and file.startswith(name)]
    fitting = [file for file in found if file == name + ".om" or file.startswith(name + "_linux_")]
    if len(fitting) != 1:
        raise ValueError(f"{folder}: {len(fitting)} .om files of that name, one is expected")
    _require_om(os.path.join(folder, fitting[0]))
    weights = []
    if os.path.isdir(os.path.join(folder, "weight")):
        os.makedirs(os.path.join(directory, "weight"), exist_ok=True)
        for file in sorted(os.listdir(os.path.join(folder, "weight"))):
            weights.append("weight/" + file)
            os.replace(os.path.join(folder, "weight", file), os.path.join(directory, "weight", file))
        os.rmdir(os.path.join(folder, "weight"))
    os.replace(os.path.join(folder, fitting[0]), os.path.join(directory, fitting[0]))
    write_record(directory, name, key, fitting[0], weights)
    return fitting[0]


def _require_om(path: str) -> None:
    """Raise ValueError for a file that does not start as compiled models do: a full disk, or something else named atc."""
    with open(path, "rb") as stream:
        start = stream.read(len(OM_MAGIC))
    if start != OM_MAGIC:
        size = os.path.getsize(path)
        raise ValueError(f"{path}: {size} bytes that start with {start!r}; an .om file starts with {OM_MAGIC!r}")


def main(arguments: Sequence[str]) -> int:
    """Collect one graph (`collect NAME KEY`), tell whether it is finished (`done NAME KEY`), or finish the manifest."""
    directory = os.path.dirname(os.path.abspath(__file__))
    try:
        if arguments[:1] == ["collect"]:
            sys.stdout.write(collect(directory, arguments[1], arguments[2]) + "\n")
        elif arguments[:1] == ["done"]:
            record = read_record(directory, arguments[1])
            return 0 if record is not None and record["key"] == arguments[2] else 1
        elif os.path.isfile(os.path.join(directory, MANIFEST_NAME)):
            build = dict(word.split("=", 1) for word in arguments)
            sys.stdout.write(f"{MANIFEST_NAME}: lists {', '.join(finish(directory, build))}\n")
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
