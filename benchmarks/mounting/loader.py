"""Reads a directory as a training does, epoch after epoch, and prints the seconds of each as JSON.

    python loader.py DIRECTORY --epochs 2 --workers 2 [--torch]

Each epoch visits all files in another order: worker processes, new ones for each epoch as PyTorch's
`DataLoader` makes them, open, read and decode the files of a batch and hand it over as one array. With
`--torch` it is PyTorch's own; without, the same pattern with `multiprocessing`: as many batches are under
way, and they are made in the same way. Needs nothing of this project.
"""

import argparse
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_BATCH_FILES = 64
#: Batches that a worker has been asked for and that were not taken yet, as in PyTorch.
_AHEAD = 2
#: What a sample is cut to.
_SAMPLE_BYTES = 1024


class Files:
    """The samples; PyTorch's loader takes it as a data set."""

    def __init__(self, directory: str) -> None:
        self.paths = sorted(
            os.path.join(folder, name) for folder, _, names in os.walk(directory) for name in names
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> np.ndarray:
        with open(self.paths[number], "rb") as file:
            content = file.read()
        return np.frombuffer(content, np.uint8, _SAMPLE_BYTES).astype(np.float32) / 255


def _work(files: Files, wanted: Any, made: Any) -> None:
    while (numbers := wanted.get()) is not None:
        try:
            made.put(np.stack([files[number] for number in numbers]))
        except OSError as error:
            made.put(error)


def _load(files: Files, workers: int, order: Sequence[int]) -> Iterable[Any]:
    """The batches of one epoch; those of the workers by turns, as PyTorch gives them."""
    context = multiprocessing.get_context("fork")
    queues = [(context.SimpleQueue(), context.SimpleQueue()) for _ in range(workers)]
    processes = [context.Process(target=_work, args=(files, *pair), daemon=True) for pair in queues]
    for process in processes:
        process.start()
    batches = [order[begin : begin + _BATCH_FILES] for begin in range(0, len(order), _BATCH_FILES)]
    for number in range(len(batches) + _AHEAD * workers):
        if number < len(batches):
            queues[number % workers][0].put(batches[number])
        if number >= _AHEAD * workers:
            batch = queues[number % workers][1].get()
            if isinstance(batch, OSError):
                raise batch
            yield batch
    for (wanted, _), process in zip(queues, processes, strict=True):
        wanted.put(None)
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--torch", action="store_true")
    options = parser.parse_args()
    files = Files(options.directory)
    orders = random.Random(len(files))
    seconds = []
    for _ in range(options.epochs):
        begin = time.perf_counter()
        if options.torch:
            from torch.utils.data import DataLoader  # not everybody has it

            batches = DataLoader(files, batch_size=_BATCH_FILES, shuffle=True, num_workers=options.workers)
        else:
            batches = _load(files, options.workers, orders.sample(range(len(files)), len(files)))
        seen = sum(len(batch) for batch in batches)
        seconds.append(time.perf_counter() - begin)
        if seen != len(files):
            raise SystemExit(f"error: {seen} of {len(files)} files were read")
    print(json.dumps({"files": len(files), "seconds": seconds}))


if __name__ == "__main__":
    main()
