"""ModelArts' config.json: made field by field, and judged by our schema."""

from collections.abc import Sequence
from typing import Any

import jsonschema
from packaging.utils import canonicalize_name

from qcompile.package.findings import Finding
from qcompile.package.schemas import load_schema
from qcompile.package.wheels import Wheel

NAME = "config.json"
_TEXT = {"type": "string"}
_REQUEST = {
    "prompt": _TEXT,
    "messages": {"type": "array", "items": {"type": "object"}},
    "max_new_tokens": {"type": "integer"},
    "temperature": {"type": "number"},
    "top_p": {"type": "number"},
    "seed": {"type": "integer"},
}
_RESPONSE = {"text": _TEXT, "finish_reason": _TEXT, "usage": {"type": "object"}}
_ALGORITHM = "qwen_text_generation"
_LOADING_S = "120"
_PROBE_S = "10"


def preset_config(model_type: str, runtime: str, wheels: Sequence[Wheel]) -> dict[str, Any]:
    """The configuration for a preset engine: PyTorch or MindSpore, with what pip installs, in order."""
    packages = [
        {"package_name": wheel.name, "package_version": str(wheel.version), "restraint": "EXACT"}
        for wheel in in_order(wheels)
    ]
    return {
        "model_algorithm": _ALGORITHM,
        "model_type": model_type,
        "runtime": runtime,
        "metrics": {"f1": 0, "recall": 0, "precision": 0, "accuracy": 0},
        "apis": [_api()],
        "dependencies": [{"installer": "pip", "packages": packages}],
    }


def engine_config(image: str | None) -> dict[str, Any]:
    """The configuration for an engine of one's own; `image` is its address in SWR, for an import from OBS."""
    return {
        "model_algorithm": _ALGORITHM,
        "model_type": "Image",
        **({"swr_location": image} if image else {}),
        "metrics": {"f1": 0, "recall": 0, "precision": 0, "accuracy": 0},
        "apis": [_api()],
        "health": {
            "url": "/health",
            "protocol": "http",
            "initial_delay_seconds": _LOADING_S,
            "timeout_seconds": _PROBE_S,
        },
    }


def check_config(record: Any, file: str) -> list[Finding]:
    """Every rule of the schema that a configuration breaks."""
    validator = jsonschema.Draft202012Validator(load_schema("modelarts_config"))
    findings = []
    for error in sorted(validator.iter_errors(record), key=lambda error: error.json_path):
        where = error.json_path.removeprefix("$").lstrip(".")
        message = f"{where}: {error.message[:200]}" if where else error.message[:200]
        findings.append(Finding(file, message, _cure(error), "ModelArts.3015"))
    return findings


def in_order(wheels: Sequence[Wheel]) -> list[Wheel]:
    """What others require first: ModelArts installs in the order of the list."""
    by_name = {wheel.name: wheel for wheel in wheels}
    ordered: dict[str, Wheel] = {}

    def add(wheel: Wheel, above: frozenset[str]) -> None:
        for requirement in wheel.requires:
            needed = by_name.get(canonicalize_name(requirement.name))
            if needed is not None and needed.name not in ordered and needed.name not in above:
                add(needed, above | {wheel.name})
        ordered.setdefault(wheel.name, wheel)

    for wheel in wheels:
        add(wheel, frozenset())
    return list(ordered.values())


def _api() -> dict[str, Any]:
    return {
        "url": "/",
        "method": "post",
        "request": {"Content-type": "application/json", "data": {"type": "object", "properties": _REQUEST}},
        "response": {"Content-type": "application/json", "data": {"type": "object", "properties": _RESPONSE}},
    }


def _cure(error: jsonschema.ValidationError) -> str:
    path = [str(part) for part in error.absolute_path]
    cures = {
        "runtime": "a preset engine needs the full image tag; an image of one's own must not name a runtime",
        "dependencies": "installer pip; name, version and restraint (EXACT, ATLEAST, ATMOST); none for an image",
        "health": "only for model_type Image: url, protocol http, seconds as texts",
        "apis": "url '/' for preset engines; Content-type application/json or multipart/form-data; data a JSON schema",
        "model_algorithm": "a letter first, at most 36 characters, no Chinese, none of & ! ' \" < > =",
        "model_type": "PyTorch, MindSpore, TensorFlow, XGBoost, Scikit_Learn, Spark_MLlib or Image",
        "metrics": "f1, recall, precision, accuracy as numbers",
    }
    return cures.get(path[0] if path else "", "leave it out, or add what is missing; see docs/packaging.md")
