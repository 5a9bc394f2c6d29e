"""A line that carries nothing for longer than connecting may take does not fail the request."""

import socket
import threading
import time

import pytest

from replicated.store import open_store
from replicated.store.s3 import client

SIZE = 32 << 20
CONNECT_TIMEOUT_S = 0.3


@pytest.fixture
def slow_server():
    """A server that lets a client wait before it takes what does not fit into the buffers of the system."""
    listening = socket.create_server(("127.0.0.1", 0))
    received = []

    def serve():
        connection, _ = listening.accept()
        with connection:
            # Not for anything to happen: this is the line that is slow.
            time.sleep(5 * CONNECT_TIMEOUT_S)
            _, _, body = connection.recv(1 << 16).partition(b"\r\n\r\n")
            size = len(body)
            while size < SIZE and (data := connection.recv(1 << 20)):
                size += len(data)
            received.append(size)
            connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "tag"\r\nContent-Length: 0\r\n\r\n')

    thread = threading.Thread(target=serve)
    thread.start()
    yield listening.getsockname()[1], received
    listening.close()
    thread.join()


def test_pack_is_sent_over_a_line_that_stops_for_a_while(slow_server, monkeypatch):
    port, received = slow_server
    monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", CONNECT_TIMEOUT_S)
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    store = open_store("s3://bucket/prefix", create=False, environment=environment, patience_s=0)
    store.put("packs/aa/pack", [bytes(SIZE)], is_unique=True, is_checked=False)
    assert received == [SIZE]
    store.close()
