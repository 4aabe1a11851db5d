"""ModelArts' part inside the clean room: a stand-in of `model_service`, and requests through the three steps.

    python modelarts_child.py REPORT.jsonl ANSWERS_FOLDER MODEL_FOLDER ENGINE BODY.json

ENGINE is PyTorch or MindSpore: it decides which parent class there is and whether the service gets a file or a folder.
The body goes through _preprocess, _inference and _postprocess as a dict, as bytes and as text.
"""

import inspect
import json
import logging
import sys
import time
import types
from pathlib import Path
from typing import Any

from judge_child import Report, isolate_if_asked  # type: ignore[import-not-found,unused-ignore]


class BaseService:
    """What the platform's parent classes have in common."""

    def __init__(self, model_name: str, model_path: str) -> None:
        self.model_name = model_name
        self.model_path = model_path

    def _preprocess(self, data: Any) -> Any:
        return data

    def _inference(self, data: Any) -> Any:
        raise NotImplementedError("the built-in _inference knows no language model: override it")

    def _postprocess(self, data: Any) -> Any:
        return data


def stand_in(engine: str) -> None:
    """Put the modules of that engine's image into place."""
    package = types.ModuleType("model_service")
    package.__path__ = []
    name, parent = {
        "PyTorch": ("pytorch_model_service", "PTServingBaseService"),
        "MindSpore": ("model_service", "SingleNodeService"),
    }[engine]
    module = types.ModuleType("model_service." + name)
    setattr(module, parent, type(parent, (BaseService,), {"__module__": module.__name__}))
    setattr(package, name, module)
    log = types.ModuleType("log")
    log.getLogger = logging.getLogger  # type: ignore[attr-defined]
    sys.modules.update({"model_service": package, module.__name__: module, "log": log})


def find_service() -> type:
    """The service class in customize_service.py."""
    import customize_service  # type: ignore[import-not-found]

    own = [
        one
        for _, one in inspect.getmembers(customize_service, inspect.isclass)
        if issubclass(one, BaseService) and one.__module__ == "customize_service"
    ]
    if len(own) != 1:
        raise TypeError(f"customize_service has {len(own)} service classes, one is wanted")
    return own[0]


def model_path(folder: Path, engine: str) -> str:
    """PyTorch gets the model's file, MindSpore the folder."""
    files: list[Path] = sorted([*folder.glob("*.pth"), *folder.glob("*.pt")]) if engine == "PyTorch" else []
    return str(files[0] if files else folder)


def main(arguments: list[str]) -> None:
    """Load the service and send the requests; whatever happens is in the report."""
    report = Report(arguments[0])
    isolate_if_asked(report, arguments)
    answers, folder, engine = Path(arguments[1]), Path(arguments[2]), arguments[3]
    body = json.loads(Path(arguments[4]).read_text(encoding="utf-8"))
    text = json.dumps(body, ensure_ascii=False)
    bodies: tuple[tuple[str, Any], ...] = (("dict", body), ("bytes", text.encode("utf-8")), ("str", text))
    stage = "service"
    try:
        stand_in(engine)
        sys.path.insert(0, str(folder))
        service_class = find_service()
        stage, start = "load", time.perf_counter()
        service = service_class("qwen", model_path(folder, engine))
        report.write("constructed", seconds=time.perf_counter() - start)
        for number, (kind, one) in enumerate(bodies):
            stage, start = "request", time.perf_counter()
            answer = service._postprocess(service._inference(service._preprocess(one)))
            seconds = time.perf_counter() - start
            (answers / f"{number}.json").write_text(json.dumps(answer, ensure_ascii=False), encoding="utf-8")
            report.write("answered", number=number, kind=kind, seconds=seconds)
    except BaseException as error:
        report.write_error(stage, error)
        raise SystemExit(3) from None
    report.write("done")


if __name__ == "__main__":
    main(sys.argv[1:])
