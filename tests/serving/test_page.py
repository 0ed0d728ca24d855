"""How the page's files are served; `tests/serving/page` has the page in a browser."""

from __future__ import annotations

import re

import httpx

from serving.api.page import FILES
from tests.serving.fixtures import Running


def test_files_are_served_with_a_policy_and_kept_until_they_change(running: Running) -> None:
    for path in ("/", "/docs", *(f"/page/{name}" for name in FILES)):
        response = httpx.get(running.url + path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "script-src 'self'" in policy or path.startswith("/page/")
        assert "'unsafe-inline'" not in policy or path == "/docs"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-cache"
        known = {"if-none-match": response.headers["etag"]}
        assert httpx.get(running.url + path, headers=known).status_code == 304
        assert httpx.get(running.url + path, headers={"if-none-match": '"other"'}).status_code == 200
    assert httpx.get(f"{running.url}/page/other.js").json()["error"]["code"] == "not_found"


def test_the_page_names_no_other_host() -> None:
    for name, file in FILES.items():
        found = re.findall(rb"https?://[\w.]+", file.content)
        assert set(found) <= {b"http://www.w3.org"}, name  # the namespace of SVG, which nobody fetches
