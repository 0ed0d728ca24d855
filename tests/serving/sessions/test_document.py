"""The OpenAPI document names every endpoint of sessions, and nothing that is not there."""

from __future__ import annotations

import json

from serving.api.openapi import openapi_document
from serving.api.sessions import SESSION_ROUTES


def test_the_document_names_the_endpoints_of_sessions_and_their_methods() -> None:
    paths = openapi_document()["paths"]
    served = {(route.path, method) for route in SESSION_ROUTES for method in (route.methods or set()) - {"HEAD"}}
    documented = {
        (path, method.upper())
        for path, operations in paths.items()
        for method in operations
        if path.startswith(("/v1/sessions", "/v1/states")) and method != "parameters"
    }
    assert documented == served


def test_every_reference_of_the_document_is_in_it() -> None:
    document = openapi_document()
    names = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
    assert {"Session", "SessionRequest", "ForkRequest"} <= names
