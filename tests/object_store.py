"""An S3 protocol server on loopback that can go away and come back with what it holds."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

BUCKET = "simmatch-test"


class ObjectStore:
    """moto's server, in this process; its content outlives `stop`.

    Attributes
    ----------
    environment: what a client needs to reach it.
    """

    def __init__(self) -> None:
        self._port = 0
        self._server = self._serve()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "simmatch-key",
            "AWS_SECRET_ACCESS_KEY": "simmatch-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Be there again, at the same address."""
        self._server = self._serve()

    def stop(self) -> None:
        """Refuse connections."""
        self._server.stop()

    def _serve(self):  # type: ignore[no-untyped-def]  # moto's own class
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        server.start()
        self._port = server.get_host_and_port()[1]
        return server


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A store with one empty bucket, which this process and those that it starts will use."""
    import s3fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ObjectStore()
    with mock.patch.dict(os.environ, store.environment):
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem(use_listings_cache=False).makedirs(BUCKET, exist_ok=True)
        try:
            yield store
        finally:
            store.stop()
            s3fs.S3FileSystem.clear_instance_cache()
