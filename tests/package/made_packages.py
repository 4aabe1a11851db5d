"""Small contest packages that a test can spoil: a wheel, a program, and the zip of a folder."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

MODEL = '''"""A contest entry without a model."""

import sys


class Competition:
    def __init__(self):
        self.forms = {"choice": "Answer: A", "math": "Answer: 1", "generic-generate": "Answer: x"}
        print(f"Total parameters: {0.5:.2f}B")

    def get_results(self, jsondata_list):
        results = []
        for one in jsondata_list:
            answer = self.forms.get(one["type"], "```python\\npass\\n```")
            content = f"<think>{sys.version}</think><answer>{answer}</answer>"
            results.append({"id": one["id"], "content": content})
        return {"result": {"results": results}}
'''


def make_wheel(
    folder: Path, name: str, version: str = "1.0", tag: str = "py3-none-any", requires: Sequence[str] = ()
) -> Path:
    """Write a wheel with one module `NAME.py`."""
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "THOUGHT = 'easy'\n")
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def make_package(root: Path, *, is_bare: bool = False) -> Path:
    """Write the folder of a package with which nothing is wrong; a bare one needs no wheel, which is faster."""
    (root / "dependencies").mkdir(parents=True)
    (root / "competition_model.py").write_text(
        MODEL
        if is_bare
        else MODEL.replace("sys.version", "tinydep.THOUGHT").replace("import sys", "import sys\nimport tinydep")
    )
    (root / "requirements.txt").write_text("" if is_bare else "tinydep==1.0\n")
    if not is_bare:
        make_wheel(root / "dependencies", "tinydep")
    (root / "model").mkdir()
    (root / "model" / "weights.bin").write_bytes(b"\0" * 64)
    return root


def make_zip(root: Path, path: Path, prefix: str = "") -> Path:
    """Zip a folder's content, under a prefix if wanted."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(root).as_posix())
    return path
