"""Counts of a running server's windows, read from its metrics: what limits them right now."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fusedstep.counts import WindowCounts
from fusedstep.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PREFIX = "fusedstep:"
TRACE = f"{PREFIX}trace_info"  # there before the first turn
TIMEOUT = 10.0  # seconds
LOCAL, PORT = "127.0.0.1", 8000  # where `fusedstep serve` listens


def explain(url: str, seconds: float = 0.0) -> WindowCounts:
    """The windows of the server at ``url``: of the next ``seconds``, or of all its time.

    Raises ConfigError when there is no such server, or it is not ours.
    """
    before = read(url)
    if not seconds:
        return before
    began = time.monotonic()
    time.sleep(seconds)
    return read(url).since(before, time.monotonic() - began)


def watch(url: str, seconds: float) -> Iterator[WindowCounts]:
    """The windows of every ``seconds`` from now on, without a gap. Raises as ``explain``."""
    before, began = read(url), time.monotonic()
    while True:
        time.sleep(seconds)
        counts, now = read(url), time.monotonic()
        yield counts.since(before, now - began)
        before, began = counts, now


def metrics_url(server: str) -> str:
    """The address of a server's metrics, given as URL, ``host:port``, ``host`` or port.

    Raises ConfigError for anything else.
    """
    given = server.strip()
    if given.isdecimal():
        given = f"{LOCAL}:{given}"
    bare = "://" not in given
    if bare:
        given = f"http://{given}"
    try:
        parts = urllib.parse.urlsplit(given)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # no port
        fits = False
    if not fits or any(character.isspace() for character in given):
        raise ConfigError(
            f"no server address: {server!r}; give http://HOST:PORT, HOST:PORT or PORT"
        )
    if bare and parts.port is None:
        parts = parts._replace(netloc=f"{parts.netloc.rstrip(':')}:{PORT}")
    path = parts.path.rstrip("/").removesuffix("/metrics").removesuffix("/v1")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, f"{path}/metrics", "", ""))


def _fetch(url: str) -> str:
    """The text of a metrics page; ConfigError says why there is none."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            text: str = answer.read().decode()
            return text
    except urllib.error.HTTPError as error:
        words = f"the server has no metrics page: HTTP {error.code}"
        advice = "is it vLLM? `fusedstep serve` has one"
    except UnicodeDecodeError:
        words, advice = "no text", "is it vLLM?"
    except TimeoutError:
        words, advice = f"no answer in {TIMEOUT:g} s", "is it still starting, or stopped?"
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        words = str(getattr(reason, "strerror", None) or reason or type(error).__name__)
        advice = "is the server up? name it with --url HOST:PORT"
    raise ConfigError(f"no metrics at {url} ({words}): {advice}")


def families(url: str) -> list[Metric]:
    """Ours among the metrics of the server at ``url``.

    Raises ConfigError when there is no such server, or it is not ours.
    """
    from prometheus_client.parser import text_string_to_metric_families

    url = metrics_url(url)
    text = _fetch(url)
    try:
        found = list(text_string_to_metric_families(text))
    except ValueError:
        raise ConfigError(f"no metrics at {url} (a page of another kind): is it vLLM?") from None
    ours = [family for family in found if family.name.startswith(PREFIX)]
    if not ours and not any(family.name.startswith("vllm:") for family in found):
        raise ConfigError(f"no metrics of vLLM at {url}: it is another server's page")
    if not ours:
        raise ConfigError(
            f"no windows in {url}: fusedstep is off there (is it stock vLLM? start it with "
            "FUSEDSTEP=on), or the server has several API servers"
        )
    return ours


def read(url: str) -> WindowCounts:
    """Since the server's start."""
    counts = WindowCounts()
    found = [family for family in families(url) if family.name != TRACE]
    if not found:
        raise ConfigError(f"no windows in {metrics_url(url)} yet: nothing has been asked")
    for family in found:
        name = family.name.removeprefix(PREFIX)
        for sample in family.samples:
            if "reason" in sample.labels and sample.name.endswith("_total"):
                getattr(counts, name)[sample.labels["reason"]] += int(sample.value)
            elif name == "window_steps" and sample.name.endswith("_bucket"):
                if sample.labels["le"] != "+Inf":
                    counts.lengths[int(float(sample.labels["le"]))] += int(sample.value)
            elif sample.name.endswith("_total"):
                number = type(getattr(counts, name))(sample.value)
                setattr(counts, name, getattr(counts, name) + number)
    return counts
