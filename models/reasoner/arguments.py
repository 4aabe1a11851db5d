"""The types of what command lines are given here: looked at before minutes of work, without torch."""

import argparse
import math
from pathlib import Path

_PARTS = {
    "weights": ("*.safetensors", "pytorch_model*.bin"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "vocab.json"),
}


def model_directory(text: str) -> Path:
    """What a command line names as a model: a directory in Hugging Face form.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    path = Path(text)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{text} has no config.json; wanted the directory of a model in Hugging Face form"
        )
    for what, patterns in _PARTS.items():
        if not any(any(path.glob(pattern)) for pattern in patterns):
            raise argparse.ArgumentTypeError(
                f"{text} has no {what} ({' or '.join(patterns)}); wanted the directory of a model in Hugging Face form"
            )
    return path


def output_directory(text: str) -> Path:
    """What a command line names as a directory to write: one, or a place where it can be made.

    Raises:
        argparse.ArgumentTypeError: A file stands there or on the way.
    """
    path = Path(text)
    standing = next((place for place in (path, *path.parents) if place.exists()), path)
    if standing.exists() and not standing.is_dir():
        raise argparse.ArgumentTypeError(f"{standing} is a file; wanted a directory, give another one")
    return path


def output_file(text: str) -> Path:
    """What a command line names as a file to write.

    Raises:
        argparse.ArgumentTypeError: It is a directory, or stands in none.
    """
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written; wanted a file in a directory that exists")
    return path


def count(text: str) -> int:
    """A whole number, 0 or more.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    return _whole(text, 0)


def positive(text: str) -> int:
    """A whole number, 1 or more.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    return _whole(text, 1)


def share(text: str) -> float:
    """A number from 0 to 1.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a share from 0 to 1")
    return number


def _whole(text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a whole number, {least} or more")
    return int(text)
