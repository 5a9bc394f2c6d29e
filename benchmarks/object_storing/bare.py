"""What moving bytes costs without us: a loop of boto3 with its defaults, in a process of its own.

    python bare.py put SIZE [lean]        puts objects of 64 MiB out of memory, SIZE bytes in all
    python bare.py get KEY THREADS        gets an object in ranges of 8 MiB, THREADS at a time, in order

Prints the seconds, and the processor seconds, of the loop as JSON. `lean`: no signature over the payload and
no checksum but those that the server wants, as our store does.
"""

import json
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import boto3
from botocore.config import Config

BUCKET = "benchmark"
PUT_BYTES = 64 << 20
GET_BYTES = 8 << 20


def put(size: int, *, is_lean: bool) -> None:
    lean = Config(
        request_checksum_calculation="when_required", s3={"payload_signing_enabled": False}, retries={}
    )
    client = boto3.client("s3", config=lean if is_lean else None)
    content = os.urandom(PUT_BYTES)
    client.put_object(Bucket=BUCKET, Key="bare/first", Body=b"first")
    begin = _clocks()
    for offset in range(0, size, PUT_BYTES):
        part = content[: min(PUT_BYTES, size - offset)]
        client.put_object(Bucket=BUCKET, Key=f"bare/{offset:012d}", Body=part)
    _report(begin)


def get(key: str, threads: int) -> None:
    client = boto3.client("s3", config=Config(max_pool_connections=threads))
    size = client.head_object(Bucket=BUCKET, Key=key)["ContentLength"]

    def fetch(offset: int) -> int:
        wanted = f"bytes={offset}-{min(offset + GET_BYTES, size) - 1}"
        return len(client.get_object(Bucket=BUCKET, Key=key, Range=wanted)["Body"].read())

    begin = _clocks()
    done = 0
    ahead: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        for offset in range(0, size, GET_BYTES):
            if len(ahead) == threads:
                done += ahead.popleft().result()
            ahead.append(pool.submit(fetch, offset))
        done += sum(future.result() for future in ahead)
    assert done == size, "all of it has come"
    _report(begin)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _report(begin: tuple[float, float]) -> None:
    wall, processor = _clocks()
    print(json.dumps([wall - begin[0], processor - begin[1]]))


if __name__ == "__main__":
    if sys.argv[1] == "put":
        put(int(sys.argv[2]), is_lean=sys.argv[3:] == ["lean"])
    else:
        get(sys.argv[2], int(sys.argv[3]))
