"""Writes checkpoints whose tensors are known, with `torch.save` where there is torch, else in its layout.

    python save_states.py head DIRECTORY BYTES STEPS     # the last 5 % of a model change from one to the next
    python save_states.py pairs DIRECTORY                # two versions of a small model, see `write_pairs`

Needs numpy, nothing of this project. Prints a line of JSON for each file: its name, its size, and how many of
its bytes no file before it had; what is no tensor counts as new each time. At the end, what wrote the files.
"""

import json
import sys
from pathlib import Path

import numpy as np

try:
    import torch
except ImportError:
    torch = None

_State = dict[str, np.ndarray]
_RANK = 8
_CHANGING_SHARE = 0.05


def save(state: _State, path: Path, new: set[str]) -> None:
    """Write one file and say what it holds; `new`: the tensors that no file before had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if torch is None:
        from torch_layout import save as save_layout

        save_layout(state, path)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    size = path.stat().st_size
    known = sum(array.nbytes for name, array in state.items() if name not in new)
    print(json.dumps({"name": path.name, "size": size, "new": size - known}), flush=True)


def weights(random: np.random.Generator, *shape: int) -> np.ndarray:
    """As a layer has them after training: small, around zero."""
    return random.normal(0.0, 0.02, shape).astype(np.float32)


def transformer(random: np.random.Generator, width: int, layers: int, vocabulary: int) -> _State:
    """The weights of a decoder, in the shapes that they usually have."""
    state = {"embedding": weights(random, vocabulary, width)}
    for layer in range(layers):
        state[f"{layer}.attention.in"] = weights(random, 3 * width, width)
        state[f"{layer}.attention.in_bias"] = weights(random, 3 * width)
        state[f"{layer}.attention.out"] = weights(random, width, width)
        state[f"{layer}.attention.out_bias"] = weights(random, width)
        state[f"{layer}.norm"] = weights(random, width)
        state[f"{layer}.expand"] = weights(random, 4 * width, width)
        state[f"{layer}.expand_bias"] = weights(random, 4 * width)
        state[f"{layer}.contract"] = weights(random, width, 4 * width)
        state[f"{layer}.contract_bias"] = weights(random, width)
    return state


def write_head(directory: Path, size_bytes: int, steps: int) -> None:
    """A model of that size of which all but the last tensors are frozen."""
    random = np.random.default_rng(0)
    parameters = size_bytes // 4
    width = 768 if parameters > 20_000_000 else 192
    head = int(parameters * _CHANGING_SHARE) // width
    layers = max(1, parameters // (12 * width * width) * 2 // 3)
    rest = parameters - head * width - layers * 12 * width * width
    state = transformer(random, width, layers, max(256, rest // width))
    for step in range(steps):
        state["head"] = weights(random, head, width)
        save(state, directory / f"checkpoint_{step}.pt", set(state) if step == 0 else {"head"})


def write_pairs(directory: Path) -> None:
    """Model and Adam's moments saved under two names; a base with LoRA adapters, which alone change."""
    random = np.random.default_rng(1)
    model = transformer(random, 256, 6, 256)
    state = {
        f"{part}.{name}": weights(random, *array.shape)
        for part in ("model", "exp_avg", "exp_avg_sq")
        for name, array in model.items()
    }
    save(state, directory / "same" / "epoch_1.pt", set(state))
    save(state, directory / "same" / "epoch_2.pt", set())
    adapters = [name for name in model if name.endswith((".in", ".out"))]
    for epoch in (1, 2):
        changed = set()
        for name in adapters:
            outputs, inputs = model[name].shape
            for part, shape in ("A", (_RANK, inputs)), ("B", (outputs, _RANK)):
                model[f"{name}.lora_{part}"] = weights(random, *shape)
                changed.add(f"{name}.lora_{part}")
        save(model, directory / "lora" / f"epoch_{epoch}.pt", set(model) if epoch == 1 else changed)


def main() -> None:
    kind, directory, *numbers = sys.argv[1:]
    if kind == "head":
        write_head(Path(directory), *map(int, numbers))
    else:
        write_pairs(Path(directory))
    print(json.dumps("its layout, without torch" if torch is None else f"torch {torch.__version__}"))


if __name__ == "__main__":
    main()
