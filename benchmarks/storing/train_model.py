"""Trains a small transformer on Python's own source and saves checkpoints: real weights, real Adam moments.

Runs in an environment that has torch (the CPU build will do) and needs nothing of this project:

    python train_model.py DIRECTORY --checkpoints 20 --steps-between 50 --bf16

Every file is one `torch.save`, under a name with its step, as scripts do it: `checkpoint_{step}.pt` has the
model and the optimizer in fp32, `weights_{step}.pt` (with `--bf16`) the weights alone in bfloat16. Prints one
line a checkpoint.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

_VOCABULARY = 256  # bytes
_CONTEXT = 128
_BATCH = 8
#: Enough that nothing is seen twice in a thousand steps.
_CORPUS_BYTES = 8 << 20


class Transformer(nn.Module):
    """A decoder that predicts the next byte; 4.8 M parameters at a width of 256 and with 6 layers."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, width)
        self.positions = nn.Embedding(_CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _VOCABULARY, bias=False)
        self.apply(_initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) for tokens (batch, length)."""
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class Block(nn.Module):
    """Attention and a feed-forward layer, normalised before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm_attention = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.from_heads = nn.Linear(width, width)
        self.norm_forward = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Of the same shape (batch, length, width)."""
        qkv = self.to_qkv(self.norm_attention(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.from_heads(attended.transpose(1, 2).flatten(2))
        return hidden + self.contract(functional.gelu(self.expand(self.norm_forward(hidden))))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def read_corpus() -> Tensor:
    """The standard library's source, one byte a token."""
    library = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(library.rglob("*.py")):
        if "site-packages" not in path.parts:
            text += path.read_bytes()
        if len(text) >= _CORPUS_BYTES:
            break
    return torch.frombuffer(text, dtype=torch.uint8)


def sample_batch(corpus: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pieces of the text, and the same pieces one byte further on."""
    starts = torch.randint(len(corpus) - _CONTEXT - 1, (_BATCH,), generator=generator)
    pieces = torch.stack([corpus[start : start + _CONTEXT + 1] for start in starts]).long()
    return pieces[:, :-1], pieces[:, 1:]


def save(directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, bf16: bool) -> None:
    """Write the files of one checkpoint."""
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, directory / f"checkpoint_{step}.pt")
    if bf16:
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        torch.save(weights, directory / f"weights_{step}.pt")


def train(arguments: argparse.Namespace) -> None:
    """Train, and save every so many steps."""
    arguments.directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    corpus = read_corpus()
    model = Transformer(arguments.width, arguments.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    last = arguments.steps_before + arguments.checkpoints * arguments.steps_between
    for step in range(1, last + 1):
        inputs, targets = sample_batch(corpus, generator)
        loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        since = step - arguments.steps_before
        if since > 0 and since % arguments.steps_between == 0:
            save(arguments.directory, step, model, optimizer, arguments.bf16)
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Train a small transformer and save checkpoints.")
    parser.add_argument("directory", type=Path, help="where to write them")
    parser.add_argument("--checkpoints", type=int, default=20, metavar="N")
    parser.add_argument("--steps-between", type=int, default=10, metavar="N")
    parser.add_argument("--steps-before", type=int, default=0, metavar="N", help="trained without saving")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--bf16", action="store_true", help="also write the weights alone in bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_arguments())
