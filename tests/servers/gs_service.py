"""A program: the emulator of Google Cloud Storage, with what it leaves out of what the service documents.

Conditional uploads (`ifGenerationMatch=0`), pages of listings, ranges that count from the end or begin beyond
it, the hash of the whole object beside a part of it, and the words about missing buckets.

    gs_service.py PORT
"""

import re
import sys
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

#: The service gives up to 1000; with fewer, small listings have pages too.
PAGE = 7


def refuse(response, status, message):
    response.status = status
    response.json({"error": {"code": int(status), "message": message, "errors": [{"message": message}]}})


def in_a_bucket(handler):
    """Without the bucket, the service says so."""

    def handle(request, response, storage, *args, **kwargs):
        bucket = request.params["bucket_name"]
        if storage.get_bucket(bucket) is None:
            refuse(response, HTTPStatus.NOT_FOUND, "The specified bucket does not exist.")
        else:
            handler(request, response, storage, *args, **kwargs)

    return handle


def insert(request, response, storage, *args, **kwargs):
    if request.query.get("ifGenerationMatch") == ["0"]:
        data = request.data
        described = data.get("meta", data) if isinstance(data, dict) else {}
        name = request.query.get("name", [described.get("name")])[0]
        try:
            storage.get_file_obj(request.params["bucket_name"], name)
        except NotFound:
            pass
        else:
            message = "At least one of the pre-conditions you specified did not hold."
            refuse(response, HTTPStatus.PRECONDITION_FAILED, message)
            return
    as_emulated["insert"](request, response, storage, *args, **kwargs)


def ls(request, response, storage, *args, **kwargs):
    prefix = request.query.get("prefix", [""])[0]
    found, _ = storage.get_file_list(request.params["bucket_name"], prefix)
    after = request.query.get("pageToken", [""])[0]
    limit = min(PAGE, int(request.query.get("maxResults", [PAGE])[0]))
    first = request.query.get("startOffset", [""])[0]
    left = [item for item in found if item["name"] > after and item["name"] >= first]
    answer = {"kind": "storage#objects", "items": left[:limit]}
    if len(left) > limit:
        answer["nextPageToken"] = left[limit - 1]["name"]
    response.json(answer)


def download(request, response, storage, *args, **kwargs):
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.get_header("range", "") or "")
    if wanted is None:
        as_emulated["download"](request, response, storage, *args, **kwargs)
        return
    names = request.params["bucket_name"], request.params["object_id"]
    try:
        data, described = storage.get_file(*names, False), storage.get_file_obj(*names)
    except NotFound:
        refuse(response, HTTPStatus.NOT_FOUND, f"No such object: {'/'.join(names)}")
        return
    size = len(data)
    if wanted[1]:
        start, end = int(wanted[1]), min(int(wanted[2] or size), size - 1)
    else:
        start, end = max(0, size - int(wanted[2])), size - 1
    if start >= size:
        refuse(response, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "Request range not satisfiable")
        return
    response["X-Goog-Hash"] = f"crc32c={described['crc32c']},md5={described['md5Hash']}"
    response["Content-Range"] = f"bytes {start}-{end}/{size}"
    response.status = HTTPStatus.PARTIAL_CONTENT
    response.write_file(data[start : end + 1], content_type=described.get("contentType"))


as_emulated = {"insert": objects.insert, "download": objects.download}
objects.insert = in_a_bucket(insert)
objects.ls = in_a_bucket(ls)
objects.download = in_a_bucket(download)

if __name__ == "__main__":
    # The table of the server takes the functions when it is imported.
    from gcp_storage_emulator.server import create_server

    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True).run()
