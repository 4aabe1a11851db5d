"""The mean of models that went different ways from one start.

    python -m models.reasoner.merge runs/a/model runs/b/model --out runs/mean/model

Runs of reinforcement learning with different seeds share what they learned and differ in their noise, so their mean keeps
the one and loses much of the other ("Model soups", Wortsman et al., 2022, arXiv 2203.05482).
"""

import argparse
from pathlib import Path

from models.reasoner.architectures import load_model, save_model
from models.reasoner.arguments import model_directory, output_directory


def merge(directories: list[Path], out: Path) -> Path:
    """Write the mean of the models' weights, with the first one's config and tokenizer.

    Args:
        directories: Models of one architecture in Hugging Face form.
        out: Where to.

    Raises:
        ValueError: Weights of other names or shapes than the first model's.
    """
    model = load_model(directories[0])
    total = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for directory in directories[1:]:
        state = load_model(directory).state_dict()
        if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in total.items()}:
            raise ValueError(f"{directory}: weights of other names or shapes than {directories[0]} has")
        for name, tensor in state.items():
            total[name] += tensor.double()
    model.load_state_dict({name: (tensor / len(directories)).float() for name, tensor in total.items()})
    save_model(model, directories[0], out)
    return out


def main(arguments: list[str] | None = None) -> None:
    """The command line in the module's docstring."""
    parser = argparse.ArgumentParser(description="Average the weights of several models.")
    parser.add_argument("models", nargs="+", type=model_directory)
    parser.add_argument("--out", type=output_directory, required=True)
    options = parser.parse_args(arguments)
    try:
        print(merge(options.models, options.out))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
