"""Ours, in a process of its own like the peers: saves what is named on stdin, and prints the seconds.

    python save_replicate.py REPOSITORY_URL

A name is saved as a checkpoint, and the answer comes when it is stored; a pair of a number and a directory
asks for that checkpoint to be checked out there.
"""

import json
import sys
import time
from pathlib import Path

import replicate

project = replicate.Project(repository=sys.argv[1], directory=Path.cwd())
experiment = project.experiments.create(quiet=True)
checkpoints = []
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    begin = time.perf_counter()
    if isinstance(request, str):
        checkpoints.append(experiment.checkpoint(path=request, quiet=True))
        checkpoints[-1].wait()
    else:
        number, directory = request
        checkpoints[number].checkout(directory, quiet=True)
    print(time.perf_counter() - begin, flush=True)
experiment.stop()
