"""Training on several machines that have nothing but a repository in common, with torch.distributed (gloo).

Each rank holds a slice of one model (a wide layer, split by columns), trains it, and saves its slice; all of
them together are one checkpoint, which can be read once every rank has stored its own. With torchrun:

    export REPLICATE_REPOSITORY=s3://bucket/team
    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-id run-7 --rdzv-backend c10d \
        --rdzv-endpoint HOST:29400 examples/distributed_training.py

What it needs: `pip install torch`. `.ci/distributed` runs it in network namespaces, each with its own home.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

import replicate

FEATURES, WIDTH = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="checkpoints to make")
    parser.add_argument("--wait", type=float, default=0, help="seconds to wait until the last one is stored")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Every rank calls it; what is recorded is what rank 0 gives.
    experiment = replicate.init(params={"width": WIDTH, "world_size": world_size}, name="distributed")

    torch.manual_seed(rank)
    mine = torch.nn.Linear(FEATURES, WIDTH // world_size)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.05)
    inputs = torch.linspace(-1, 1, 8 * FEATURES).reshape(8, FEATURES)
    checkpoint = None
    for step in range(options.steps):
        optimizer.zero_grad()
        loss = mine(inputs).square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)

        part = Path(f"model/slice-{rank}-of-{world_size}.pt")
        part.parent.mkdir(exist_ok=True)
        torch.save(mine.state_dict(), part)
        checkpoint = experiment.checkpoint(
            part,
            step=step,
            metrics={"loss": total / world_size} if rank == 0 else None,
            primary_metric=("loss", "minimize") if rank == 0 else None,
        )
    if options.wait and checkpoint is not None:
        checkpoint.wait(options.wait)
    print(f"rank {rank} of {world_size}: experiment {experiment.id}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
