"""`--url`: a model behind an HTTP endpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from string import Template
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from saddlepoint.cli.options import console
from saddlepoint.data import Dataset
from saddlepoint.errors import InputError
from saddlepoint.models import Classifier
from saddlepoint.models.adapt import Gives
from saddlepoint.models.http_model import HttpModel

Url = Annotated[
    str | None,
    typer.Option(
        help="In place of --model: an endpoint, POST {instances: ...} -> {predictions: ...}. $NAME is as in --header."
    ),
]
Classes = Annotated[int | None, typer.Option(min=2, help="With --url: how many classes there are; default: found out.")]
GivesText = Annotated[Gives | None, typer.Option(help="With --url: what the endpoint answers; default logits.")]
Labels = Annotated[str | None, typer.Option(help="With --gives labels: the endpoint's names of the classes: cat,dog,...")]
Header = Annotated[
    list[str] | None,
    typer.Option(help="With --url: 'Authorization: Bearer $TOKEN', in single quotes; $TOKEN is read from the environment."),
]
BatchRows = Annotated[int | None, typer.Option(min=1, help="With --url: inputs in a request; default 32.")]
Concurrency = Annotated[int | None, typer.Option(min=1, help="With --url: requests at the same time; default 4.")]
Rate = Annotated[float | None, typer.Option(help="With --url: requests a second, at most.")]
Limit = Annotated[int | None, typer.Option(min=1, help="With --url: inputs sent in the whole run, at most.")]
Cache = Annotated[bool, typer.Option("--cache", help="With --url: ask about no input twice.")]

_SECRET = re.compile("auth|cookie|key|secret|token", re.IGNORECASE)


def model(
    url: str,
    found: Dataset,
    *,
    classes: int | None = None,
    gives: Gives | None = None,
    labels: str | None = None,
    header: Sequence[str] | None = None,
    **settings: Any,
) -> tuple[str, HttpModel]:
    """Name and model for the words of `--url`. settings: of `HttpModel`, None for its default.

    `$NAME` stands for a variable of the environment, so that neither the shell's history nor config.toml holds a password.
    """
    names = None if labels is None else [name.strip() for name in labels.split(",")]
    if classes is None and names is None and gives == "labels":
        classes = found.num_classes
    headers = dict(_header(text) for text in header or ())
    given = {name: value for name, value in settings.items() if value is not None}
    if "@" in url.partition("://")[2].partition("/")[0] and "$" not in url:
        raise InputError("--url has a password in it: put it into a variable, --url 'https://user:$PASSWORD@host/path'")
    made = HttpModel(
        _filled("--url", url), num_classes=classes, bounds=found.bounds, gives=gives or "logits", labels=names, headers=headers,
        **given,
    )  # fmt: skip
    return urlsplit(made.url).hostname or made.url, made


def one_of(
    model: str | None, url: str | None, only_with_model: Mapping[str, object] | None = None, **only_with_url: object
) -> None:
    """Raise `InputError` unless there is one model, and no option that is for the other kind."""
    if (model is None) == (url is None):
        raise InputError("give either --model or --url")
    useless, kind = (only_with_url, "models behind --url") if url is None else (only_with_model or {}, "--model, not for --url")
    for name, value in useless.items():
        if value not in (None, [], False):
            raise InputError(f"--{name.replace('_', '-')} is for {kind}")


@contextmanager
def closing(model: Classifier) -> Iterator[None]:
    """Afterwards, whatever happened, say what was asked over HTTP, and close the connections; nothing for other models."""
    try:
        yield
    finally:
        if isinstance(model, HttpModel):
            console.print(f"{model.url}: {model.traffic}", markup=False, soft_wrap=True)
            model.close()


def _header(text: str) -> tuple[str, str]:
    name, colon, value = (part.strip() for part in text.partition(":"))
    if not colon or not name:
        raise InputError("--header is 'NAME: VALUE'")
    if _SECRET.search(name) and "$" not in value:
        raise InputError(f"--header {name}: put the value into a variable, and write '{name}: $VARIABLE' in single quotes")
    return name, _filled(f"--header {name}", value)


def _filled(what: str, text: str) -> str:
    try:
        return Template(text).substitute(os.environ)
    except KeyError as error:
        raise InputError(f"{what}: there is no variable {error} in the environment") from None
    except ValueError:
        raise InputError(f"{what}: a $ that begins no variable is written $$") from None
