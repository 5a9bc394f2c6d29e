"""Train a classifier of handwritten digits and record the run: two lines of replicate.

    python train.py --learning-rate 0.01

The data set ships with scikit-learn; it is written to `data/` first, as a real project would have it.
"""

import argparse
from pathlib import Path

import joblib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import replicate


def write_data(directory: Path) -> None:
    """Write the data set as two arrays, unless it is there."""
    directory.mkdir(exist_ok=True)
    if not (directory / "images.npy").exists():
        digits = load_digits()
        np.save(directory / "images.npy", digits.data / 16.0)
        np.save(directory / "labels.npy", digits.target)


def load_data(directory: Path):
    """Training and test halves; the same split every time."""
    images, labels = np.load(directory / "images.npy"), np.load(directory / "labels.npy")
    return train_test_split(images, labels, test_size=0.3, random_state=0, stratify=labels)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()

    write_data(Path("data"))
    train_x, test_x, train_y, test_y = load_data(Path("data"))
    model = MLPClassifier(
        hidden_layer_sizes=(64,), learning_rate_init=arguments.learning_rate, random_state=0
    )

    experiment = replicate.init(path=".", params=vars(arguments))
    for epoch in range(arguments.epochs):
        model.partial_fit(train_x, train_y, classes=np.arange(10))
        joblib.dump(model, "model.joblib")
        experiment.checkpoint(
            path="model.joblib",
            step=epoch,
            metrics={"loss": model.loss_, "accuracy": model.score(test_x, test_y)},
            primary_metric=("accuracy", "maximize"),
        )


if __name__ == "__main__":
    main()
