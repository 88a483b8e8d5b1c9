"""A bucket on this machine: gcp-storage-emulator, and what tensorstore wants of it beyond that.

``python -m tests.bucket_emulator`` serves a bucket called "bucket" until it is killed, and says at
which address first; gcsfs and Orbax find it by the variables of `environment`. Added are the number
of an object's version with its content, and conditions on that number: OCDBT, in which Orbax saves,
writes its manifest only over the version that it read.
"""

import functools
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any


def environment(address: str) -> dict[str, str]:
    """Variables by which a process takes ``address`` for Google's storage."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_CLOUD_PROJECT": "project",
        # Without it gcsfs asks another service, which is not emulated, what kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def with_versions(handler: Callable[..., None]) -> Callable[..., None]:
    """A handler of the emulator that keeps to conditions on an object's version and tells it."""

    @functools.wraps(handler)
    def handle(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> None:
        query = {name: values[0] for name, values in request.query.items()}
        params = request.params or {}
        name = params.get("object_id", query.get("name"))
        known = storage.objects.get(params.get("bucket_name"), {}).get(name)
        version = "0" if known is None else known["generation"]
        if query.get("ifGenerationMatch", version) != version:
            assert request.data is not None  # reads what was sent, or the client would wait
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif known is not None and query.get("ifGenerationNotMatch") == version:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage, *rest, **more)
            if query.get("alt") == "media":
                response["x-goog-generation"] = version

    return handle


def main() -> None:
    """Serves."""
    from gcp_storage_emulator import server

    server.HANDLERS = tuple(
        (pattern, {method: with_versions(handler) for method, handler in handlers.items()})
        for pattern, handlers in server.HANDLERS
    )
    served = server.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    served.start()
    print(f"http://localhost:{served._api._httpd.server_port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
